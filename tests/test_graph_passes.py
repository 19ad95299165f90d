"""Graphs are simplified without a change of what they return: bit by bit, and with the same random numbers."""

from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from calibrant.inference.graphs import passes
from calibrant.inference.graphs.passes import simplify

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
W = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))


def calls(graph):
    """How often the graph calls each operator."""
    return Counter(str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function")


def both(function, *example):
    """The results before and after, at the same random numbers and on copies of the example, and the new graph."""
    graph = make_fx(function)(*example)
    found = []
    for simplified in (False, True):
        if simplified:
            simplify(graph)
        torch.manual_seed(3)
        found.append(graph(*(tensor.clone() for tensor in example)))
    return *found, graph


def assert_kept(function, *example):
    before, after, graph = both(function, *example)
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    return calls(graph)


def test_equal_calls_are_merged():
    def twice(x, w):
        first = torch.tanh(x @ w).sum(1)
        second = torch.tanh(x.detach() @ w.detach()).sum(1)
        return first + second, first - second

    found = assert_kept(twice, X, W)
    assert found["mm"] == found["tanh"] == 1
    assert found["detach"] == 0


def test_a_gradient_at_frozen_weights_takes_no_second_pass():
    def step(x, w):
        w = w.detach().requires_grad_()
        loc = torch.tanh(x @ w)
        z = loc + torch.randn_like(loc)
        value = ((z - torch.tanh(x @ w.detach())) ** 2).sum()
        return value, *torch.autograd.grad(value, [w])

    found = assert_kept(step, X, W)
    assert found["tanh"] == 1
    assert found["mm"] == 2  # forwards and backwards


def test_what_is_not_used_is_left_out_but_draws():
    def wasteful(x, w):
        (x @ w).exp()
        torch.randn(2)
        return (x + torch.rand_like(x),)

    found = assert_kept(wasteful, X, W)
    assert found["mm"] == found["exp"] == 0
    assert found["rand_like"] == 1
    assert found["randn"] + found["normal_"] == 1


DRAWS = {
    "randn": lambda x: torch.randn(4),
    "rand_like": torch.rand_like,
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "normal": lambda x: torch.normal(x, x.exp()),
    "gamma": lambda x: torch._standard_gamma(x.exp()),
    "poisson": lambda x: torch.poisson(x.exp()),
    "multinomial": lambda x: torch.multinomial(x.exp(), 1),
    "dropout": lambda x: torch.dropout(x, 0.5, True),
    "exponential": lambda x: torch.empty(4).exponential_(),
    "in place": lambda x: torch.empty(4).normal_(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_two_draws_stay_two(draw):
    before, after, _ = both(lambda x: (draw(x), draw(x)), X)
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    assert not after[0].equal(after[1])


def test_a_pass_that_merged_draws_would_be_noticed(monkeypatch):
    """The planted defect of the test above."""
    monkeypatch.setattr(passes, "_is_random", lambda op: False)
    before, after, _ = both(lambda x: (torch.rand_like(x), torch.rand_like(x)), X)
    assert not before[1].equal(after[1])


def written_between(x, w):
    x = x.clone()
    before = x.exp()
    x.mul_(2.0)
    return before, x.exp()


def written_through_a_view(x, w):
    x = x.clone()
    before = x.sum(0)
    x[1].add_(1.0)
    return before, x.sum(0)


def written_beside_a_view(x, w):
    x = x.clone()
    row = x.t()[:, 1].detach()
    before = row.exp()
    x.index_put_((torch.tensor([1]),), w[:1])
    return before, row.exp()


def written_results(x, w):
    first, second = x + 1.0, x + 1.0
    first.mul_(3.0)
    return first, second


def written_input(x, w):
    before = x @ w
    x.zero_()
    return before, x @ w


def written_constants(x, w):
    first, second = torch.zeros(3), torch.zeros(3)
    first += 1.0
    return first, second, torch.tensor([1.0, 2.0]).mul_(2.0), torch.tensor([1.0, 2.0])


WRITING = [
    written_between,
    written_through_a_view,
    written_beside_a_view,
    written_results,
    written_input,
    written_constants,
]


@pytest.mark.parametrize("function", WRITING, ids=lambda function: function.__name__)
def test_what_is_written_in_place_is_not_merged(function):
    assert_kept(function, X, W)


@pytest.mark.parametrize("function", WRITING[1:4], ids=lambda function: function.__name__)
def test_a_pass_that_ignored_writes_would_be_noticed(function, monkeypatch):
    """The planted defect of the test above."""
    monkeypatch.setattr(passes._Memory, "is_written", lambda self, node: False)
    before, after, _ = both(function, X, W)
    assert not all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_one_memory_under_two_names_is_not_taken_for_two():
    """An input that the graph writes to may be the memory of another one."""
    graph = simplify(make_fx(lambda x, y: (y.exp(), x.mul_(2.0), y.exp()))(X.clone(), X.clone()))
    shared = X.clone()
    before, _, after = graph(shared, shared)
    assert before.equal(X.exp())
    assert after.equal((2 * X).exp())


def test_equal_reads_after_a_write_are_merged():
    def reads(x, w):
        noise = torch.empty(5, 3).normal_()
        return (noise.exp() @ w).sum(), (noise.exp() @ w).sum()

    found = assert_kept(reads, X, W)
    assert found["exp"] == found["mm"] == 1


def test_numbers_of_different_kinds_are_different():
    def numbers(x, w):
        return x.pow(2), x.pow(2.0), torch.full((2,), 1), torch.full((2,), True), x * 0.0, x * -0.0

    before, after, _ = both(numbers, X, W)
    assert [a.dtype for a in after] == [b.dtype for b in before]
    assert all(a.equal(b) and a.signbit().equal(b.signbit()) for a, b in zip(before, after, strict=True))


def test_buffers_that_are_equal_today_are_not_merged():
    """A graph holds buffers as they are, and training changes some of them."""
    first, second = torch.ones(3), torch.ones(3)
    graph = simplify(make_fx(lambda x: (x + first, x + second))(X))
    second.fill_(5.0)
    ours, theirs = graph(X)
    assert ours.equal(X + 1.0)
    assert theirs.equal(X + 5.0)


def test_constants_of_a_program_are_merged():
    def constants(x, w):
        return x * torch.tensor(2.0), x * torch.tensor(2.0), x * torch.tensor(3.0)

    assert assert_kept(constants, X, W)["mul"] == 2
