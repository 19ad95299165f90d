"""Trains an uncertainty head for efficientnet-lite0, and asks where it beats class entropy.

`python -m benchmarks.pretrained_head FOLDER` writes features, the head and results.json there; about 4 minutes of one
core. The head learns the order of losses (Kirchhof et al. 2024, arXiv 2402.16569): on augmented views of
`imagenet-1000` those under the backbone's own classifier, on CIFAR-10 those under linear classifiers that have not seen
the image. Losses are replaced by their ranks within each set, since their order is all that is learned. The head is
judged on what it was not trained on: other images and classes of ImageNet, the test set of CIFAR-10, and Caltech-101.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

import calibrant as cal
from calibrant import representations
from calibrant.evaluation.representations.cropping import crop_shares, cropped
from calibrant.evaluation.statistics.counted import counted_spearman

BACKBONE, SIZE = "efficientnet-lite0", 96
VIEWS, TRAINED_ON, TESTED_ON = 8, 4000, 3000
RESAMPLES, SEED = 500, 0

Scores = dict[str, Tensor]


def feature_sets(folder: Path, backbone: Any) -> dict[str, cal.data.Data]:
    """Cached features of every set that is trained or judged on."""
    imagenet, caltech, cifar = (cal.data.load(name) for name in ("imagenet-1000", "caltech-101", "cifar10"))
    views = {"views": VIEWS, "augment": representations.Views(area=(0.25, 1.0)), "seed": SEED}

    def cached(name: str, data: cal.data.Data, **how: Any) -> cal.data.Data:
        return representations.features(backbone, data, file=folder / f"{name}.h5", **how)

    unseen = caltech["test"]
    crops = cropped(unseen.values("x"), crop_shares(len(unseen), SEED))
    return {
        "imagenet views": cached("imagenet-views", imagenet["train"], **views),
        "imagenet held out": cached("imagenet-validation", imagenet["validation"]),
        "imagenet test": cached("imagenet-test", imagenet["test"]),
        "cifar train": cached("cifar-train", cifar["train"][:TRAINED_ON]),
        "cifar test": cached("cifar-test", cifar["test"][:TESTED_ON]),
        "caltech": cached("caltech", unseen),
        "caltech crops": cached("caltech-crops", cal.data.Data({"x": crops, "y": unseen.values("y")})),
    }


def losses_of(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, in nats."""
    return functional.cross_entropy(logits, y.long(), reduction="none")


def probe(data: cal.data.Data) -> representations.Trained:
    """A linear classifier of features."""
    return representations.train_representation("classifier", data, steps=600, seed=SEED)


def losses_of_others(data: cal.data.Data) -> Tensor:
    """Loss of each image under a classifier that was trained on the other half of the data."""
    found, half = torch.empty(len(data)), len(data) // 2
    for own, other in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        probabilities = probe(data[other]).class_probabilities(data[own].values("x"))
        found[own] = losses_of(probabilities.clamp(min=1e-12).log(), data[own].values("y"))
    return found


def training_set(sets: Mapping[str, cal.data.Data], classifier: Any) -> cal.data.Data:
    """Features with the rank of their loss in its set, from 0 to 1; the label says which set."""
    imagenet, cifar = sets["imagenet views"], sets["cifar train"]
    with torch.no_grad():
        parts = [losses_of(classifier(imagenet.values("x")), imagenet.values("y")), losses_of_others(cifar)]
    ranks = [part.argsort().argsort() / len(part) for part in parts]
    features = torch.cat([imagenet.values("x"), cifar.values("x")])
    label = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
    images = np.concatenate(
        [imagenet.coords["image"], 10**6 + cifar.labels()]
    )  # views of an image are held out together
    return cal.data.Data({"y": label}, {"x": features, "loss": torch.cat(ranks)}, {"image": images})


def scores_of(head: representations.Trained, classify: Any, features: Tensor) -> Scores:
    """What is compared: the head, entropy of a classifier's probabilities, and one over the norm of the features."""
    with torch.no_grad():
        probabilities = classify(features)
    entropy = torch.special.entr(probabilities).sum(-1)
    return {"head": head.uncertainty(features), "class entropy": entropy, "1/norm": 1 / features.norm(dim=-1)}


def with_difference(score: Any, scores: Scores) -> dict[str, list[float]]:
    """Value with 95% bootstrap interval of each score, and of the head's lead over class entropy, image by image."""
    count = len(scores["head"])
    rng = np.random.default_rng(SEED)
    rows = [np.arange(count), *(rng.integers(count, size=count) for _ in range(RESAMPLES))]
    found = {name: np.array([score(value.numpy(), row) for row in rows]) for name, value in scores.items()}
    found["head − class entropy"] = found["head"] - found["class entropy"]
    return {
        name: [float(v[0]), *(float(q) for q in np.nanquantile(v[1:], [0.025, 0.975]))] for name, v in found.items()
    }


def auroc(is_wrong: np.ndarray) -> Any:
    """AUROC of a score for what is wrong, of some rows."""

    def value(score: np.ndarray, rows: np.ndarray) -> float:
        wrong = is_wrong[rows]
        return float(roc_auc_score(wrong, score[rows])) if 0 < wrong.sum() < len(wrong) else float("nan")

    return value


def rank_correlation(other: np.ndarray, groups: np.ndarray) -> Any:
    """Spearman's correlation of a score with other numbers, of ranks within groups."""

    def value(score: np.ndarray, rows: np.ndarray) -> float:
        statistic = counted_spearman(score, other, groups.astype(np.int64))
        return float(statistic(np.bincount(rows, minlength=len(score))[None].astype(np.float64))[0])

    return value


def judged(sets: Mapping[str, cal.data.Data], head: representations.Trained, classifier: Any) -> dict[str, Any]:
    """Every comparison on data that the head was not trained on."""
    of_imagenet = lambda features: classifier(features).softmax(-1)  # noqa: E731
    held = [sets[name] for name in ("imagenet held out", "imagenet test")]
    features, labels = (torch.cat([data.values(key) for data in held]) for key in ("x", "y"))
    wrong = (of_imagenet(features).argmax(1) != labels).numpy()
    results = {"imagenet: wrong class": with_difference(auroc(wrong), scores_of(head, of_imagenet, features))}
    cifar, of_cifar = sets["cifar test"], probe(sets["cifar train"])
    features, labels = cifar.values("x"), cifar.values("y").long()
    scores = scores_of(head, of_cifar.class_probabilities, features)
    wrong = (of_cifar.class_probabilities(features).argmax(1) != labels).numpy()
    entropy = cal.data.human_labels("cifar10").entropy()[cifar.coords["data"]]
    results["cifar10: wrong class"] = with_difference(auroc(wrong), scores)
    results["cifar10: human entropy"] = with_difference(rank_correlation(entropy, np.zeros(len(entropy))), scores)
    results["cifar10: human entropy within classes"] = with_difference(
        rank_correlation(entropy, labels.numpy()), scores
    )
    caltech, crops = sets["caltech"].values("x"), sets["caltech crops"].values("x")
    scores, of_crops = (scores_of(head, of_imagenet, part) for part in (caltech, crops))
    results["caltech-101: R-AUROC"] = with_difference(auroc(~neighbour_is_right(sets["caltech"])), scores)
    rises = {name: (of_crops[name] > scores[name]).float() for name in scores}
    results["caltech-101: crop is less certain"] = with_difference(lambda rise, rows: rise[rows].mean(), rises)
    return results


def neighbour_is_right(data: cal.data.Data) -> np.ndarray:
    """Whether the nearest other image by cosine has the same class."""
    found = cal.evaluation.retrieval(data.values("x"), data.values("y"), resamples=100)
    return np.asarray(found["correct"]).astype(bool)


def main(folder: Path) -> None:
    """Cache features, train the head, and write it with its results."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = representations.backbone(BACKBONE, size=SIZE)
    sets = feature_sets(folder, backbone)
    data = training_set(sets, backbone.classifier)
    head = representations.train_representation(
        "loss-prediction", data, seed=SEED, steps=1500, batch_size=256, head=256, weight_decay=1e-2
    )
    results = judged(sets, head, backbone.classifier)
    beats = [name for name, values in results.items() if values["head − class entropy"][1] > 0]
    about = {"backbone": BACKBONE, "size": SIZE, "trained on": len(data), "held-out loss": head.history[-1]["held out"]}
    (folder / "results.json").write_text(
        json.dumps({**about, "beats class entropy": beats, "results": results}, indent=1)
    )
    head.save(folder / f"{BACKBONE}.safetensors", half=True)
    for name, values in results.items():
        print(name, {score: [round(number, 3) for number in value] for score, value in values.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
