"""Every registered data set, by its card: what it holds, its splits, its options, and what is said where its files are
missing. A new data set is tested by existing."""

import numpy as np
import pytest
import torch
from cases import parameters

import calibrant as cal
from calibrant.data import list_data, load
from calibrant.data.splits import SPLITS
from calibrant.errors import DataError
from calibrant.registries import Case

CARDS = list_data()
ROWS = 64


def cases_of(card):
    """The default options with the shapes of the card's keys, then its other cases."""
    return [Case({}, {key: shape for key, (shape, _) in card.keys.items()}, name="default"), *card.cases]


READY = parameters(
    [(card.name, case, (card, case)) for card in CARDS if card.state() == "ready" for case in cases_of(card)]
)


@pytest.fixture(scope="module", params=READY)
def loaded(request):
    """A card, its case, and the splits."""
    card, case = request.param
    return card, case, load(card.name, **case.arguments)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_says_what_the_set_is(card):
    assert all((card.description, card.source, card.licence, card.function.__doc__))
    assert "\n" not in card.description
    assert card.keys
    assert all(np.dtype(dtype).kind in "fiub" for _, dtype in card.keys.values())
    assert all(set(case.arguments) <= set(card.options) for case in card.cases)
    assert not card.downloads or card.folder


def test_the_published_sets_are_registered():
    names = {card.name for card in CARDS}
    assert {"natural-patches", "van-hateren", "digits", "mnist", "fashion-mnist", "cifar10", "svhn"} <= names


def test_splits_hold_what_the_card_says(loaded):
    _, case, splits = loaded
    assert tuple(splits) == SPLITS
    for data in splits.values():
        observed, covariates = data.batch(slice(0, ROWS))
        values = {**observed, **covariates}
        assert {key: tuple(value.shape[1:]) for key, value in values.items()} == dict(case.observed)
        assert all(value.isfinite().all() for value in values.values())
        assert data.name
    assert len(splits["train"]) > len(splits["validation"])


def test_dtypes_are_those_of_the_card(loaded):
    card, _, splits = loaded
    first, *others = card.keys
    values = splits["test"].split_keys([first], others).batch(slice(0, ROWS))[1]  # covariates keep their dtype
    for key in others:
        assert values[key].dtype == getattr(torch, card.keys[key][1])
    assert np.dtype(card.keys[first][1]).kind == "f" or bool((splits["test"].batch([0])[0][first] % 1 == 0).all())


def test_no_datum_is_in_two_splits(loaded):
    _, _, splits = loaded
    seen = set()
    for data in splits.values():
        observed, _ = data.batch(slice(0, ROWS))
        rows = torch.cat([value.reshape(len(value), -1).double() for value in observed.values()], dim=1)
        here = {row.numpy().tobytes() for row in rows}
        assert not here & seen
        seen |= here


def test_the_seed_decides_where_the_set_takes_one(loaded):
    card, case, splits = loaded
    again = load(card.name, **case.arguments)["validation"].batch(slice(0, ROWS))[0]
    first = splits["validation"].batch(slice(0, ROWS))[0]
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_unknown_options_are_refused(card):
    with pytest.raises(DataError, match=f"{card.name} has no option 'nothing_of_the_kind'"):
        load(card.name, nothing_of_the_kind=3)


@pytest.mark.parametrize("card", [card for card in CARDS if card.folder], ids=lambda card: card.name)
def test_missing_files_say_where_they_belong(card, tmp_path):
    assert card.state(tmp_path) == ("to download" if card.downloads else "absent")
    with pytest.raises(DataError, match=str(tmp_path / card.folder)):
        load(card.name, root=tmp_path)


def test_a_name_is_registered_once():
    card = CARDS[0]
    about = {"description": "none", "source": "none", "licence": "none"}
    with pytest.raises(DataError, match=f"'{card.name}' is given to two"):
        cal.data.register_data(card.name, **about)(lambda root, download: {})
