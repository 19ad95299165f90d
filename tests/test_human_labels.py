"""What people say about images: counts, entropies and their bias, files of the published formats, the real ones."""

import numpy as np
import pytest
from agreement import limit
from commands import good

from calibrant.data import HumanLabels, human_labels, list_human_labels, load
from calibrant.errors import DataError

CARDS = {(card.data, card.split): card for card in list_human_labels()}


def labels_of(counts: np.ndarray) -> HumanLabels:
    return HumanLabels("tiny", counts, "", "")


def write(root, card, counts: np.ndarray) -> None:
    """Counts in the published format of a set."""
    path = root / card.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        np.savetxt(path, counts, "%d", delimiter=",")
    elif path.suffix == ".npy":
        np.save(path, counts)
    else:
        chosen = np.stack([np.repeat(np.arange(10), row) for row in counts])
        np.savez(path, clean_label=chosen[:, 0], **{f"random_label{k + 1}": chosen[:, k] for k in range(3)})


def made_up(card, judgements: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.multinomial(judgements, np.full(10, 0.1), 10_000 if card.split == "test" else 50_000)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_shares_majority_and_entropy():
    found = labels_of(np.array([[4, 0, 0], [2, 2, 0], [1, 1, 2]]))
    assert found.judgements.tolist() == [4, 4, 4]
    assert found.majority.tolist() == [0, 0, 2]
    assert np.allclose(found.probabilities[2], [0.25, 0.25, 0.5])
    assert np.allclose(found.entropy(), [0, np.log(2), 1.5 * np.log(2)])
    assert np.allclose(found.entropy("miller-madow") - found.entropy(), [0, 1 / 8, 2 / 8])
    with pytest.raises(DataError, match="correction='jackknife' is given, wanted one of none, miller-madow"):
        found.entropy("jackknife")


def test_the_bias_of_the_entropy_is_what_its_docstring_says():
    """50 judgements among three classes: the plain entropy is too small by 2/100 nats, the corrected one is not."""
    p, n = np.array([0.5, 0.3, 0.2]), 20_000
    truth = -(p * np.log(p)).sum()
    found = labels_of(np.random.default_rng(1).multinomial(50, p, n))
    plain, corrected = found.entropy(), found.entropy("miller-madow")
    error = plain.std() / n**0.5
    assert abs(plain.mean() - truth + 0.02) < limit(2) * error + 0.001
    assert abs(corrected.mean() - truth) < limit(2) * error + 0.001
    assert abs(plain.mean() - truth) > limit(2) * error + 0.001  # the bias would be seen


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_published_formats_are_read(tmp_path, card):
    counts = made_up(card, 3 if card.split == "train" else 50)
    assert card.state(tmp_path) == "absent"
    write(tmp_path, card, counts)
    assert card.state(tmp_path) == "ready"
    found = human_labels(card.data, card.split, tmp_path)
    assert found.counts.dtype == np.int64
    assert np.array_equal(found.counts, counts)
    assert (found.name, found.source, found.licence) == (card.name, card.source, card.licence)


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_missing_and_damaged_files_say_where_they_are_published(tmp_path, card):
    with pytest.raises(DataError, match=f"{card.name}: there is no file {tmp_path}/{card.file}, .* get it from https:"):
        human_labels(card.data, card.split, tmp_path)
    for counts in (made_up(card, 3)[:100], np.zeros((len(made_up(card, 3)), 10), int)):
        if card.split == "test":
            write(tmp_path, card, counts)
            with pytest.raises(
                DataError, match=r"does not hold numbers of judgements of 10000 images .* copy it again"
            ):
                human_labels(card.data, card.split, tmp_path)
    (tmp_path / card.file).parent.mkdir(exist_ok=True)
    (tmp_path / card.file).write_text("who,knows\n")
    with pytest.raises(DataError, match=r"does not hold|cannot be read"):
        human_labels(card.data, card.split, tmp_path)


def test_unknown_sets_are_named_with_the_known_ones():
    with pytest.raises(DataError, match=r"no human labels of 'mnist', split='test'; there are human_labels\('cifar10'"):
        human_labels("mnist")
    assert {("cifar10", "test"), ("cifar10", "train"), ("fashion-mnist", "test")} == set(CARDS)


def test_the_list_of_data_shows_them_below_their_set():
    lines = good("list", "data")[0].splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("  fashion-mnist ")]
    assert lines[at + 1].startswith("  + Fashion-MNIST-H ")


# -- the published files -----------------------------------------------------------------------------------------------


def ready(data: str, split: str) -> pytest.MarkDecorator:
    card = CARDS[data, split]
    return pytest.mark.skipif(card.state() != "ready", reason=f"{card.file} is not there")


@pytest.mark.parametrize(
    ("data", "split", "entropy", "agreement", "most"),
    [
        pytest.param("fashion-mnist", "test", 0.82, 0.820, 79, marks=ready("fashion-mnist", "test")),
        pytest.param("cifar10", "test", 0.1545, 0.992, 63, marks=ready("cifar10", "test")),
        pytest.param("cifar10", "train", 0.280, 0.912, 3, marks=ready("cifar10", "train")),
    ],
)
def test_they_stand_in_the_order_of_the_images(data, split, entropy, agreement, most):
    """The majority agrees with the label for so many images, and for a tenth of them if rows are shifted by one."""
    people = human_labels(data, split)
    assert people.entropy().mean() == pytest.approx(entropy, abs=0.005)
    assert people.judgements.max() == most
    splits = load(data)
    parts = [splits["test"]] if split == "test" else [splits["train"], splits["validation"]]
    y = np.concatenate([part.split_keys(["x"], ["y"]).tensors()[1]["y"].numpy() for part in parts])
    majority = people.majority[np.concatenate([part.labels() for part in parts])]
    assert (majority == y).mean() == pytest.approx(agreement, abs=0.001)
    assert (np.roll(majority, 1) == y).mean() < 0.2
