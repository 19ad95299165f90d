"""The structure of guides: published examples, and every independence that an inverse claims, by brute force.

The oracle knows d-separation from its definition alone: it lists all paths between two nodes, and each must be blocked.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations, product
from random import Random

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from calibrant.errors import ProgramError
from calibrant.guides.structure import STRUCTURES, Structure, structure_of
from calibrant.program import Site

Graph = Mapping[str, tuple[str, ...]]  # node → parents, parents first


# -- d-separation by definition ----------------------------------------------------------------------------------------


def paths(graph: Graph, start: str, end: str) -> Iterator[list[str]]:
    neighbours = {n: {m for m in graph if m in graph[n] or n in graph[m]} for n in graph}

    def extend(path: list[str]) -> Iterator[list[str]]:
        if path[-1] == end:
            yield path
            return
        for node in neighbours[path[-1]] - set(path):
            yield from extend([*path, node])

    return extend([start])


def descendants(graph: Graph, node: str) -> set[str]:
    found = {node}
    for child, parents in graph.items():  # parents first: one pass is enough
        if found & set(parents):
            found.add(child)
    return found


def is_open(graph: Graph, path: list[str], below: Mapping[str, set[str]], given: set[str]) -> bool:
    for before, node, after in zip(path, path[1:], path[2:], strict=False):
        collides = before in graph[node] and after in graph[node]
        if collides != bool(given & below[node] if collides else node in given):
            return False
    return True


def separated(graph: Graph, a: str, b: str) -> list[frozenset[str]]:
    """All sets of other nodes that separate a from b."""
    between, below = list(paths(graph, a, b)), {node: descendants(graph, node) for node in graph}
    rest = [node for node in graph if node not in (a, b)]
    sets = (set(given) for k in range(len(rest) + 1) for given in combinations(rest, k))
    return [frozenset(s) for s in sets if not any(is_open(graph, path, below, s) for path in between)]


@pytest.mark.parametrize(
    ("graph", "given", "independent"),
    [
        ({"a": (), "b": ("a",), "c": ("b",)}, "", False),
        ({"a": (), "b": ("a",), "c": ("b",)}, "b", True),
        ({"b": (), "a": ("b",), "c": ("b",)}, "", False),
        ({"b": (), "a": ("b",), "c": ("b",)}, "b", True),
        ({"a": (), "c": (), "b": ("a", "c")}, "", True),
        ({"a": (), "c": (), "b": ("a", "c")}, "b", False),
        ({"a": (), "c": (), "b": ("a", "c"), "d": ("b",)}, "d", False),
    ],
)
def test_the_oracle_knows_chain_fork_and_collider(graph, given, independent):
    assert (frozenset(given) in separated(graph, "a", "c")) == independent


# -- programs as graphs ------------------------------------------------------------------------------------------------


def sites_of(graph: Graph, observed: str | set[str], shared: str | set[str] = "") -> dict[str, Site]:
    """The latent sites of a program with this graph."""
    return {
        name: Site(
            name=name,
            support=constraints.real,
            event_shape=torch.Size(()),
            prior=dist.Normal(0.0, 1.0),
            local=name not in shared,
            parents=tuple(parent for parent in parents if parent not in observed),
            children=tuple(child for child in graph if name in graph[child]),
        )
        for name, parents in graph.items()
        if name not in observed
    }


def false_claims(graph: Graph, observed: set[str], inverse: Structure) -> list[tuple[str, str, frozenset[str]]]:
    """Independences of latents given the observations (and others) that the inverse has and the posterior has not."""
    wrong = []
    for a, b in combinations(inverse, 2):
        true = {given - observed for given in separated(graph, a, b) if given >= observed}
        wrong += [(a, b, given) for given in separated(inverse, a, b) if given not in true]
    return wrong


def without(inverse: Structure, child: str, parent: str) -> Structure:
    return {name: tuple(p for p in parents if (name, p) != (child, parent)) for name, parents in inverse.items()}


def assert_faithful_and_minimal(graph: Graph, observed: set[str], shared: set[str] = frozenset()) -> None:
    """No dependency is lost; and of every edge, that it is lost when that edge is dropped (the planted defect)."""
    inverse = structure_of("faithful", sites_of(graph, observed, shared))
    assert set(inverse) == set(graph) - observed
    assert not false_claims(graph, observed, inverse), (graph, observed, inverse)
    for child, parents in inverse.items():
        for parent in parents:
            dropped = without(inverse, child, parent)
            assert false_claims(graph, observed, dropped), (graph, observed, inverse, child, parent)


def test_all_graphs_of_four_nodes():
    pairs = list(combinations("abcd", 2))
    for edges in product([False, True], repeat=len(pairs)):
        kept = [pair for pair, is_edge in zip(pairs, edges, strict=True) if is_edge]
        graph = {node: tuple(a for a, b in kept if b == node) for node in "abcd"}
        for observed in ({"d"}, {"c", "d"}, {"c"}, {"a"}, {"b", "d"}):
            assert_faithful_and_minimal(graph, observed)


def random_graph(random: Random, nodes: int) -> tuple[Graph, set[str], set[str]]:
    """A graph, its observed nodes, and shared latents (which nothing local precedes)."""
    names = "abcdefgh"[:nodes]
    density = random.choice([0.3, 0.5, 0.7])
    shared = {name for name in names[: random.randint(0, 3)] if random.random() < 0.7}
    graph = {
        name: tuple(p for p in names[:i] if random.random() < density and (name not in shared or p in shared))
        for i, name in enumerate(names)
    }
    observed = {name for name in names if name not in shared and random.random() < 0.3} | {names[-1]}
    return graph, observed, shared


@pytest.mark.parametrize("seed", range(200))
def test_random_graphs(seed):
    assert_faithful_and_minimal(*random_graph(Random(seed), 5 + seed % 2))


@pytest.mark.slow
def test_many_random_graphs():
    for seed in range(200, 2000):
        assert_faithful_and_minimal(*random_graph(Random(seed), 5 + seed % 3))


def for_two_data(graph: Graph, shared: set[str]) -> dict[str, tuple[str, ...]]:
    """Every local node twice, as two data have it."""
    return {
        copy: tuple(parent if parent in shared else parent + copy[-1] for parent in parents)
        for name, parents in graph.items()
        for copy in ([name] if name in shared else [f"{name}1", f"{name}2"])
    }


@pytest.mark.parametrize("seed", range(60))
def test_local_latents_of_two_data_meet_in_shared_ones_alone(seed):
    graph, observed, shared = random_graph(Random(seed), 4)
    inverse = structure_of("faithful", sites_of(graph, observed, shared))
    both = for_two_data(graph, shared)
    assert not false_claims(both, {name for name in both if name[0] in observed}, for_two_data(inverse, shared))


# -- examples ----------------------------------------------------------------------------------------------------------

EXAMPLES: dict[str, tuple[Graph, str, str, Structure]] = {
    "chain": ({"a": (), "b": ("a",), "x": ("b",)}, "x", "", {"a": (), "b": ("a",)}),
    "fork": ({"a": (), "b": ("a",), "x": ("a",), "y": ("b",)}, "xy", "", {"a": (), "b": ("a",)}),
    "collider": ({"a": (), "b": (), "x": ("a", "b")}, "x", "", {"a": (), "b": ("a",)}),
    "apart": ({"a": (), "b": (), "x": ("a",), "y": ("b",)}, "xy", "", {"a": (), "b": ()}),
    "nothing observed below": (
        {"a": (), "b": (), "c": ("a", "b"), "x": ("a",)},
        "x",
        "",
        {"a": (), "b": (), "c": ("a", "b")},
    ),
    # Webb et al., figure 2: a has the children b and c, seen through d and e. Heuristic inversion draws b from d and c
    # from e, although b and c depend on one another as long as a is unknown.
    "Webb figure 2": (
        {"a": (), "b": ("a",), "c": ("a",), "d": ("b",), "e": ("c",)},
        "de",
        "",
        {"a": (), "b": ("a",), "c": ("a",)},
    ),
    # A hidden Markov chain: backward sampling, each state given one neighbour.
    "hidden Markov": (
        {"a": (), "x": ("a",), "b": ("a",), "y": ("b",), "c": ("b",), "z": ("c",)},
        "xyz",
        "",
        {"a": (), "b": ("a",), "c": ("b",)},
    ),
    # A Gaussian mixture with its weights and means shared: given both, the data are independent.
    "mixture": (
        {"weights": (), "means": (), "label": ("weights",), "x": ("means", "label")},
        "x",
        {"weights", "means"},
        {"weights": (), "means": ("weights",), "label": ("weights", "means")},
    ),
    "shared last in the program": (
        {"z": (), "theta": (), "x": ("z", "theta")},
        "x",
        {"theta"},
        {"theta": (), "z": ("theta",)},
    ),
    "local that the shared latent doesn't touch": (
        {"theta": (), "a": ("theta",), "b": ("a",), "x": ("b",)},
        "x",
        {"theta"},
        {"theta": (), "a": ("theta",), "b": ("a",)},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    graph, observed, shared, wanted = EXAMPLES[name]
    inverse = structure_of("faithful", sites_of(graph, observed, shared))
    assert inverse == wanted
    assert list(inverse) == list(wanted)
    assert_faithful_and_minimal(graph, set(observed), set(shared))


def binary_tree(depth: int) -> dict[str, tuple[str, ...]]:
    """Nodes "" (root), "0", "1", "00", …: each is the parent of two."""
    nodes = [""] + ["".join(bits) for k in range(1, depth) for bits in product("01", repeat=k)]
    return {f"t{node}": (f"t{node[:-1]}",) if node else () for node in nodes}


def test_the_inverse_of_a_binary_tree_is_as_sparse_as_the_tree():
    """Webb et al., section 4.1: leaves observed, one parent for every inner node."""
    graph = binary_tree(4)
    leaves = {name for name in graph if len(name) == 4}
    inverse = structure_of("faithful", sites_of(graph, leaves))
    assert inverse == {name: parents for name, parents in graph.items() if name not in leaves}


def test_the_heuristic_inverse_of_webb_is_noticed():
    graph, observed, _, _ = EXAMPLES["Webb figure 2"]
    heuristic = {"b": (), "c": (), "a": ("b", "c")}
    assert ("b", "c", frozenset()) in false_claims(graph, set(observed), heuristic)
    assert not false_claims(graph, set(observed), {"c": (), "b": ("c",), "a": ("b", "c")})  # the paper's answer


def test_min_fill_spares_edges():
    """Root factors a, b, c, each with data of its own beside z: z first would join all three."""
    graph = {"z": (), "a": (), "b": (), "c": (), "x": ("z", "a"), "y": ("z", "b"), "w": ("z", "c")}
    inverse = structure_of("faithful", sites_of(graph, "xyw"))
    assert inverse == {"z": (), "a": ("z",), "b": ("z",), "c": ("z",)}


# -- the other structures ----------------------------------------------------------------------------------------------


def test_other_structures():
    graph = {"a": (), "theta": (), "b": ("a", "theta"), "c": ("b",), "x": ("c",)}
    sites = sites_of(graph, "x", {"theta"})
    wanted = {
        "mean-field": {"theta": (), "a": (), "b": (), "c": ()},
        "program": {"theta": (), "a": (), "b": ("theta", "a"), "c": ("b",)},
        "full": {"theta": (), "a": ("theta",), "b": ("theta", "a"), "c": ("theta", "a", "b")},
        "faithful": {"theta": (), "a": ("theta",), "b": ("theta", "a"), "c": ("b",)},
    }
    for name, structure in wanted.items():
        found = structure_of(name, sites)
        assert found == structure, name
        assert list(found) == list(structure), name


@pytest.mark.parametrize("seed", range(20))
def test_no_structure_lets_a_latent_see_a_later_one_or_a_shared_latent_a_local_one(seed):
    graph, observed, shared = random_graph(Random(seed), 6)
    for name in STRUCTURES:
        structure = structure_of(name, sites_of(graph, observed, shared))
        order = list(structure)
        assert set(order) == set(graph) - observed
        for i, latent in enumerate(order):
            assert set(structure[latent]) <= set(order[:i])
            assert latent not in shared or set(structure[latent]) <= shared


def test_mean_field_loses_a_dependency_and_full_none():
    graph, observed, _, _ = EXAMPLES["collider"]
    sites = sites_of(graph, observed)
    assert false_claims(graph, set(observed), structure_of("mean-field", sites))
    assert not false_claims(graph, set(observed), structure_of("full", sites))


def test_an_unknown_structure_is_refused():
    with pytest.raises(ProgramError, match="unknown structure 'tree'"):
        structure_of("tree", {})
