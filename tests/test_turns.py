"""Threads of one process take turns, and none waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import hierarchical

import calibrant as cal
from calibrant import turns
from calibrant.errors import InferenceError
from calibrant.turns import outside, turn


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Results, or errors, of functions that run at the same time."""
    found: list[Any] = [None] * len(functions)

    def run(number: int) -> None:
        try:
            found[number] = functions[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def fitted(seed: int) -> float:
    with turn():  # the data too: torch's default dtype, in which they are drawn, is that of all threads
        observed = {"x": torch.randn(40, generator=torch.Generator().manual_seed(seed))}
        guide = cal.guides.amortize(hierarchical, observed, seed=seed)
        return cal.inference.fit(hierarchical, guide, observed, epochs=3, batch_size=8, seed=seed).elbo


def test_two_trainings_in_two_threads_are_those_of_one_thread():
    alone = [fitted(seed) for seed in range(3)]
    together = in_threads(*(lambda seed=seed: fitted(seed) for seed in range(3)))
    assert together == alone


def test_calls_within_calls_of_a_thread_go_on():
    with turn(), turn(), outside(), turn():
        assert turns._turns.depth == 3
        assert turns._turns.outside_since is None
    assert (turns._turns.owner, turns._turns.depth) == (None, 0)


@pytest.mark.parametrize("inner", [lambda: None, lambda: fitted(0)])
def test_a_function_of_the_user_that_waits_for_another_thread_does_not_stop_both(monkeypatch, inner):
    monkeypatch.setattr(turns, "_STUCK", 0.3)

    def with_turn() -> Any:
        with turn():
            return inner()

    def waiting() -> Any:
        with turn(), outside():
            return in_threads(with_turn)[0]

    refused = waiting()
    assert isinstance(refused, InferenceError)
    assert "it must not wait for this thread" in str(refused)
    assert in_threads(with_turn) != [refused]  # the remedy: afterwards it has its turn


def test_a_long_call_is_waited_for(monkeypatch):
    monkeypatch.setattr(turns, "_STUCK", 0.1)
    started, order = threading.Event(), list[str]()

    def first() -> None:
        with turn():
            started.set()
            with outside():
                pass  # a function of the user that returns
            threading.Event().wait(0.5)
            order.append("first")

    def second() -> None:
        started.wait()
        with turn():
            order.append("second")

    assert in_threads(first, second) == [None, None]
    assert order == ["first", "second"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forked processes")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_lacks():
    queue: Any = multiprocessing.get_context("fork").Queue()

    def child() -> None:
        with turn():
            queue.put("done")

    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with turn():
            inside.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert queue.get(timeout=30) == "done"
    process.join()
    leave.set()
    holder.join()
