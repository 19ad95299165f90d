"""What cells depend on besides their card: optional packages; and files that they share within a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_trainings

from calibrant.reproductions import folder, jobs
from calibrant.reproductions.folder import Plan, clear
from calibrant.reproductions.jobs import jobs_of
from calibrant.reproductions.registering import experiment
from calibrant.reproductions.shelf import context_of
from calibrant.reproductions.splits import Source

PLAN = Plan(tiny_trainings.PAPER, ("models",), (), True, 1, "cpu", Path("run"))


def digests(monkeypatch: pytest.MonkeyPatch, optional: tuple[str, ...], installed: dict[str, str]) -> set[str]:
    card = replace(experiment(PLAN.paper, "models"), optional=optional)
    monkeypatch.setattr(folder, "list_experiments", lambda paper: [card])
    monkeypatch.setattr(folder, "experiment", lambda paper, name: card)
    monkeypatch.setattr(jobs, "versions_of", lambda names: {n: installed[n] for n in names if n in installed})
    return {job.digest for job in jobs_of(PLAN, Source(None, False, True), ())}


def test_cells_follow_from_the_optional_packages_that_are_installed(monkeypatch):
    plain = digests(monkeypatch, (), {"a": "1"})
    absent = digests(monkeypatch, ("a",), {})
    one, two = (digests(monkeypatch, ("a",), {"a": version}) for version in ("1", "2"))
    assert plain == absent  # a package that is not there changes nothing
    assert not one & two
    assert not one & plain


def test_cells_share_a_folder_that_is_deleted_with_the_run(tmp_path):
    plan = replace(PLAN, out=tmp_path)
    source = Source(None, False, True)
    contexts = [context_of(plan, job, source) for job in jobs_of(plan, source, ())]
    [shared] = {context.caches for context in contexts}
    assert shared is not None
    assert shared.parent == tmp_path
    (shared / "inner").mkdir(parents=True)
    (shared / "inner/file").write_text("features")
    (tmp_path / "own").write_text("of the user")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_versions_are_those_of_installed_packages():
    from calibrant.folders.configuration import versions_of

    found = versions_of(["torch", "no-such-package"])
    assert list(found) == ["torch"]
