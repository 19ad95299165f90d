"""Every test starts from the same seed, and fails when it leaves global state changed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from commands import SMALL, fit_rows, good, write_files
from pyro.poutine import runtime
from small_checks import CHECKED, refine_hardly, show_few_contrasts

torch.set_num_threads(1)


def _state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "Pyro's settings": pyro.settings.get(),
        "Pyro's parameters": sorted(pyro.get_param_store().keys()),
        "Pyro's handlers": len(runtime._PYRO_STACK),
        "Pyro's plates": list(runtime._DIM_ALLOCATOR._stack),
    }


@pytest.fixture
def global_state() -> Callable[[], dict[str, Any]]:
    """A function that reads all global state that a library could leave changed; random state is free to change."""
    return _state


@pytest.fixture(autouse=True)
def same_global_state() -> Iterator[None]:
    """Seeds the test, and compares global state before and after it."""
    pyro.set_rng_seed(0)
    before = _state()
    yield
    after = _state()
    pyro.clear_param_store()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"global state changed (before, after): {changed}"
    assert not after["Pyro's parameters"], "parameters in Pyro's global store"


# -- runs of the commands ----------------------------------------------------------------------------------------------


def _write_shortly(results: Any, path: Any, command: str = "", story: Any = (), pictures: Any = ()) -> Path:
    Path(path).write_text(f"{command}: {[result.name for result in results]}")
    return Path(path)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in a folder of its own, with small data and a user's file in it."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


@pytest.fixture
def short_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps are split in a few steps."""
    refine_hardly(monkeypatch)


@pytest.fixture
def short_check(short_gap: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about files and messages: reports are one line, and gaps are split in a few steps."""
    monkeypatch.setattr("calibrant.workflow.running.report", _write_shortly)
    monkeypatch.setattr("calibrant.workflow.running.pictures_of", lambda result, progress: {})


@pytest.fixture(scope="session")
def made_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, made once: `fitted` by `fit_rows`, and `whole`, ppca and vae with `SMALL` settings.

    Tests copy what they change.
    """
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("calibrant.workflow.running.report", _write_shortly)
        patch.setattr("calibrant.workflow.running.pictures_of", lambda result, progress: {})
        refine_hardly(patch)
        write_files(folder)
        fit_rows("fitted", "--batch-size", "40")
        out, err = good(
            *("run", "ppca", "vae", "--data", "rows.npz", "--set", "latents=2", "--quiet", "--out", "whole"), *SMALL
        )
        (folder / "whole.out").write_text(out)
        (folder / "whole.err").write_text(err)
    return folder


# -- checks and reports ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_check() -> Iterator[None]:
    """Checks take little time: few contrasts, and guides that are hardly refined."""
    with pytest.MonkeyPatch.context() as patch:
        show_few_contrasts(patch)
        refine_hardly(patch)
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ArviZ's pictures and those of the check, which take most of the time."""
    from calibrant.evaluation.reporting import pictures, predictive_plots, run_plots

    monkeypatch.setattr(run_plots, "arviz_pictures", lambda result, progress: {})
    for name in (*CHECKED, *predictive_plots.CAPTIONS):
        monkeypatch.setitem(pictures.OF_ONE, name, lambda result: None)


@pytest.fixture
def bare(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any picture."""
    from calibrant.evaluation.reporting import pictures

    for drawn in (pictures.OF_ALL, pictures.OF_ONE):
        for name in drawn:
            monkeypatch.setitem(drawn, name, lambda result: None)
