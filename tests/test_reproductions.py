"""Reproductions: tables beside the paper's numbers, which any interruption leaves the same."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_paper
from commands import call, good, refused

import calibrant as cal
from calibrant.errors import DataError, RunError
from calibrant.reproductions import Needs
from calibrant.reproductions.cells import Cell, read_cell
from calibrant.reproductions.found import Found, table
from calibrant.reproductions.registering import experiment
from calibrant.reproductions.source import code_of
from calibrant.reproductions.splits import Source

HERE = Path(__file__).parent
KEPT = ("seconds",)  # what differs from run to run


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINY_PAPER", raising=False)
    monkeypatch.setenv("CALIBRANT_DATA", str(tmp_path / "data"))


def rows(folder: Path | str) -> list[dict[str, Any]]:
    found = cal.reproductions.load_results(folder).table("means")
    return [{name: value for name, value in row.items() if name not in KEPT} for row in found]


def quick(**options: Any) -> cal.reproductions.Results:
    return cal.reproductions.run("tiny", **{"only": ["means"], "quick": True, "out": "run", **options})


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_run_gives_a_table_beside_the_papers_numbers():
    results = quick()
    found = {(row["row"], row["number"]): row for row in results.table("means")}
    mean = found["much", "mean"]
    values = np.array(list(mean["seeds"].values()))
    assert list(mean["seeds"]) == ["0", "1", "2"]
    assert mean["ours"] == values.mean()
    within = np.array(list(mean["monte_carlo_se"].values()))
    assert np.isclose(mean["se"] ** 2, values.var(ddof=1) / 3 + (within**2).mean())
    assert (mean["paper"], mean["answer"]) == (7.0, "")  # a quick run is not judged
    assert mean["not_reproduced_because"] == "this is a quick run"
    assert found["much", "noise"]["not_reproduced_because"] == "it is"
    assert found["best", "mean"]["ours"] == mean["ours"]
    # the same seeds have the same data and streams: the rows differ by what is added, and their draws do not
    little = found["little", "mean"]["seeds"]
    assert np.allclose([mean["seeds"][seed] - little[seed] for seed in little], 1.0, atol=1e-6)
    assert found["much", "noise"]["seeds"] == found["little", "noise"]["seeds"]
    assert len(set(found["much", "noise"]["seeds"].values())) == 3
    assert results.sentences("means")[1].startswith("As stated, much is more than little (mean of much minus little: 1")


def test_results_say_how_they_came_about():
    content = json.loads((quick().folder / "results.json").read_text())
    assert (content["schema"], content["version"]) == ("calibrant-reproduction", 1)
    assert {"calibrant", "python", "torch", "pyro-ppl", "numpy"} <= set(content["versions"])
    assert re.fullmatch("[0-9a-f]{64}", content["config_sha256"])
    part = content["experiments"]["means"]
    assert part["data"] == {"digits": "digits"}
    assert part["settings"] == {"noise": 0.2}
    keys = {
        "row",
        "number",
        "unit",
        "paper",
        "tolerance",
        "ours",
        "se",
        "se_of",
        "seeds",
        "answer",
        "failed",
        "steps",
        "stopped",
    }
    keys |= {"not_reproduced_because", "monte_carlo_se", "seconds", "devices"}
    assert all(set(row) == keys for row in part["rows"])
    assert {"left_out": ""}.items() <= part.items()


def test_a_full_run_is_judged_by_the_papers_tolerance():
    results = quick(quick=False)
    answers = {(row["row"], row["number"]): row["answer"] for row in results.table("means")}
    assert answers["little", "mean"] == "reached"
    assert answers["much", "mean"] == "not reached"
    said = " ".join(results.sentences("means"))
    assert "Within the tolerance of the paper's mean: little (0." in said
    assert "Not within the tolerance of the paper's mean: much (1." in said
    assert "The paper's noise is not reproduced here, since it is: much (" in said


def test_the_report_opens_without_other_files():
    page = quick(command="calibrant reproduce tiny").report.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "@import" not in page
    assert "url(" not in page
    for text in (
        "A tiny paper",
        tiny_paper.PIXEL,
        "Much is ",
        "Less noise",
        "calibrant reproduce tiny",
        ">holds</span>",
    ):
        assert text in page


def test_a_copy_of_the_results_is_read_and_a_damaged_one_is_not():
    results = quick()
    copy = Path("copy.json")
    copy.write_bytes((results.folder / "results.json").read_bytes())
    assert cal.reproductions.load_results(copy).content == results.content
    with (results.folder / "results.json").open("a") as file:
        file.write(" ")
    with pytest.raises(RunError, match="run the command again with --resume"):
        cal.reproductions.load_results("run")
    assert rows(quick(resume=True).folder) == [
        {k: v for k, v in r.items() if k not in KEPT} for r in results.table("means")
    ]
    copy.write_text('{"schema": "other"}')
    with pytest.raises(RunError, match="is no calibrant-reproduction of version 1"):
        cal.reproductions.load_results(copy)


def test_experiments_without_data_are_left_out_and_refused_by_name():
    results = cal.reproductions.run("tiny", quick=True, seeds=1, out="run")
    assert results.experiments == ["means"]
    assert "van-hateren is not there" in results.content["experiments"]["absent"]["left_out"]
    assert "Left out: absent" in results.report.read_text()
    with pytest.raises(DataError, match="van-hateren is not there: put its files below the data root"):
        quick(only=["absent"], out="other")
    assert not Path("other").exists()
    before = rows("run")
    with pytest.raises(DataError, match="van-hateren is not there"):
        quick(only=["absent"], overwrite=True)
    assert rows("run") == before  # the run that was to be replaced


def test_a_run_is_not_replaced_before_its_data_are_read(monkeypatch):
    quick()
    before = rows("run")

    def damaged(*_: Any) -> None:
        raise DataError("the file is damaged")

    monkeypatch.setattr(Source, "data", damaged)
    with pytest.raises(DataError, match="damaged"):
        quick(overwrite=True)
    assert rows("run") == before


def test_a_fallback_is_named_and_compared_with_no_paper():
    card = replace(experiment("tiny", "means"), needs=(Needs("van-hateren", fallback=Needs("digits")),))
    source = Source(None, False, False)
    assert source.used(card) == {"van-hateren": "digits"}
    found = Found(card, {("much", 0): Cell("", {"mean": 7.0})}, (0,), False, source.used(card))
    row = next(
        row for row in table(found, cal.reproductions.Summary()) if row["number"] == "mean" and row["row"] == "much"
    )
    assert row["answer"] == ""
    assert row["not_reproduced_because"] == "these are other data, digits in place of van-hateren"


def test_data_of_a_quick_run_are_few_and_of_one_seed():
    card = experiment("tiny", "means")
    few, all_data, other = (
        Source(None, False, q).data(card, s)["digits"] for q, s in ((True, 0), (False, 0), (True, 1))
    )
    assert len(few["train"]) == 100
    assert set(few["train"].labels()) <= set(all_data["train"].labels())
    assert len(few["test"]) == len(all_data["test"])
    assert few["test"].fingerprint() != other["test"].fingerprint()
    assert few["test"].keys() == ("x",)


# -- stopped and resumed -----------------------------------------------------------------------------------------------

START = "import tiny_paper; from calibrant.cli import app; app()"


def apart(*words: str, tiny: str = "", threads: str = "1", code: int = 0) -> str:
    """Run a command in a process of its own; what it prints on standard error."""
    path = os.pathsep.join([str(Path(cal.__file__).parents[1]), str(HERE)])
    env = {**os.environ, "PYTHONPATH": path, "TINY_PAPER": tiny, "OMP_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stderr


def test_a_run_that_is_killed_is_resumed_to_the_same_table():
    words = ["reproduce", "tiny", "--only", "means", "--quick", "--out", "run"]
    apart(*words, tiny="kill much 1", code=-signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in Path("run/cells").rglob("*.safetensors")}
    assert {path.name for path in done} == {"little.0.safetensors", "much.0.safetensors", "little.1.safetensors"}
    assert not Path("run/results.json").exists()
    out, _ = good(*words, "--resume")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # finished cells are not run again
    quick(out="whole")
    assert rows("run") == rows("whole")
    assert "report: run/report.html" in out


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="cells run one by one where processes cannot be interrupted")
def test_cells_side_by_side_give_the_same_table_also_if_their_process_is_killed():
    words = ["reproduce", "tiny", "--only", "means", "--quick", "--out", "run"]
    told = apart(*words, threads="2", tiny="kill much 1", code=2)
    assert "ended from outside (exit status -9)" in told
    apart(*words, "--resume", threads="2")
    quick(out="whole")
    assert rows("run") == rows("whole")


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(monkeypatch):
    monkeypatch.setenv("TINY_PAPER", "fail much 1")
    words = ["reproduce", "tiny", "--only", "means", "--quick", "--out", "run", "--quiet"]
    code, out, err = call(*words)
    assert (code, err) == (1, "")
    assert "failed: means, much, seed 1: ValueError: planted" in out
    much = next(row for row in rows("run") if (row["row"], row["number"]) == ("much", "mean"))
    assert [value is None for value in much["seeds"].values()] == [False, True, False]
    assert much["failed"] == {"1": "ValueError: planted"}
    assert "ValueError: planted" in Path("run/report.html").read_text()
    monkeypatch.delenv("TINY_PAPER")
    good(*words, "--resume")  # a cell that failed is tried again
    quick(out="whole")
    assert rows("run") == rows("whole")


def test_a_row_that_fails_for_every_seed_says_so_in_the_table(monkeypatch):
    monkeypatch.setenv("TINY_PAPER", "fail much 0")
    code, out, _ = call("reproduce", "tiny", "--only", "means", "--quick", "--seeds", 1, "--out", "run", "--quiet")
    assert code == 1
    assert re.search(r"│ much +│ +failed: ValueError: planted │", out)


def test_an_interrupt_tells_the_command_that_goes_on(monkeypatch):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    words = ["reproduce", "tiny", "--only", "means", "--quick", "--seeds", "2", "--out", "run"]
    with monkeypatch.context() as patched:
        patched.setattr("calibrant.reproductions.running.sorted_out", interrupted)
        code, _, err = call(*words)
    assert code == 130
    told = err.splitlines()[-1]
    assert told.startswith("interrupted; run keeps 0 of 4 cells")
    command = re.search(r"Resume with: calibrant (.*)$", told)
    assert command is not None
    good(*shlex.split(command[1]))
    assert len(rows("run")[0]["seeds"]) == 2


def test_changed_settings_are_refused_or_computed_again(monkeypatch):
    quick(seeds=2)
    before = {path: path.read_bytes() for path in Path("run/cells").rglob("*.safetensors")}
    card = experiment("tiny", "means")
    changed = replace(card, rows={**card.rows, "much": {"added": 2.0}})
    monkeypatch.setitem(cal.reproductions.registering._EXPERIMENTS["tiny"]._cards, "means", changed)
    told = refused("reproduce", "tiny", "--only", "means", "--quick", "--out", "run", "--resume")
    assert (
        "2 of the finished cells in run were made with other settings, data or code, the first is means, much" in told
    )
    command = re.search(r"calibrant (reproduce .*--overwrite) computes", told)
    assert command is not None
    good(*shlex.split(command[1]))
    after = {path: path.read_bytes() for path in before}
    assert sorted(path.name for path in before if after[path] != before[path]) == [
        "much.0.safetensors",
        "much.1.safetensors",
    ]
    assert rows("run")[2]["ours"] > 2.0


def test_a_damaged_cell_is_computed_again():
    quick()
    before = rows("run")
    damaged = Path("run/cells/means/much.1.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert read_cell(damaged) is None
    quick(resume=True)
    assert rows("run") == before


def test_more_seeds_can_be_added():
    quick(seeds=1)
    one = rows("run")[0]["seeds"]
    assert list(rows(quick(seeds=3, resume=True).folder)[0]["seeds"].items())[:1] == list(one.items())


def test_folders_are_not_overwritten_unasked():
    quick(seeds=1)
    assert "--resume continues it, --overwrite replaces it" in refused("reproduce", "tiny", "--quick", "--out", "run")
    assert "quick was True, is False" in refused("reproduce", "tiny", "--out", "run", "--resume").replace(
        "--quick", "quick"
    )
    quick(seeds=2, overwrite=True)
    assert len(rows("run")[0]["seeds"]) == 2
    Path("other").mkdir()
    Path("other/file").write_text("mine")
    assert "so it is left alone" in refused("reproduce", "tiny", "--out", "other", "--overwrite")
    assert "other/file is a file: name a folder" in refused("reproduce", "tiny", "--out", "other/file")
    assert "leave --resume out" in refused("reproduce", "tiny", "--out", "new", "--resume")
    assert "holds a reproduction of tiny" in refused("check", "run")


def test_the_code_of_a_cell_belongs_to_its_configuration(tmp_path):
    def code(text: str) -> str:
        path = tmp_path / f"paper_{abs(hash(text))}.py"
        path.write_text(text)
        from calibrant.userfile import load_object

        return code_of(load_object(f"{path}:cell")[0])

    text = '''
SCALE = 2.0
OTHER = 3.0
def helper(x):
    """Text."""
    return SCALE * x
def summarise(found):
    return OTHER
def cell(context, row, seed):
    return helper(seed)  # a comment
'''
    base = code(text)
    assert "SCALE" in base
    for same in (text.replace("a comment", "another"), text.replace("Text", "Words"), text.replace("3.0", "4.0")):
        assert code(same) == base
    for other in (text.replace("2.0", "2.5"), text.replace("* x", "+ x"), text.replace("(seed)", "(-seed)")):
        assert code(other) != base


# -- commands and cards ------------------------------------------------------------------------------------------------


def test_the_list_says_what_there_is():
    out, _ = good("reproduce")
    assert "tiny: A tiny paper (arXiv 0000.00000)" in out
    assert "means (Figure 0): That a mean moves by what is added." in out
    assert "data: van-hateren (absent); quick: 1 min, full: 1.7 h" in out
    assert "data: digits (ready); quick: 1 s, full: 1 s" in out


def test_unknown_names_are_refused_with_the_nearest():
    assert "unknown paper 'tinny'; did you mean tiny?" in refused("reproduce", "tinny")
    assert "unknown experiment 'mean'; did you mean means?" in refused("reproduce", "tiny", "--only", "mean")
    assert "name the paper" in refused("reproduce", "--quick")
    assert not Path("runs").exists()


def test_help_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['reproduce', '--help']\nfrom calibrant.cli import app\ntry:\n    app()\n"
    code += "finally:\n    assert not {'torch', 'numpy', 'calibrant.reproductions'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(cal.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


# -- a real experiment -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_that_is_killed_is_resumed_to_the_same_table():
    words = ["reproduce", "sigma-vae", "--only", "sigma-over-steps", "--quick", "--seeds", "1", "--quiet"]
    script = """
import os, signal, sys
import calibrant.inference.fitting.loop as loop
save, count = loop.save_checkpoint, iter(range(100))
def killing(*args):
    save(*args)
    if next(count) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
loop.save_checkpoint = killing
from calibrant.cli import app
app(sys.argv[1:])
"""
    env = {**os.environ, "PYTHONPATH": str(Path(cal.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *words, "--out", "run"], env=env, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert len(list(Path("run").rglob("training.safetensors"))) > len(list(Path("run/cells").rglob("*.safetensors")))
    good(*words, "--out", "run", "--resume")
    begin = time.process_time()
    good(*words, "--out", "whole")
    assert time.process_time() - begin < 60
    first, second = (cal.reproductions.load_results(folder).content["experiments"] for folder in ("run", "whole"))
    for part in (first, second):
        for row in part["sigma-over-steps"]["rows"]:
            del row["seconds"]
    assert first == second
