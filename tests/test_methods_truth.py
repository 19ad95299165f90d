"""Methods on classes whose overlap is known, each with a defect that the same test catches."""

import math
from typing import Any

import pytest
import torch
from overlapping_classes import Overlapping, overlapping
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

import calibrant as cal
from calibrant import representations
from calibrant.representations.learners.learner import Learner
from calibrant.representations.learners.loss_prediction import order_loss

TRAIN, FRESH = overlapping(4000), overlapping(2000, seed=1)
SHARED: dict[str, Any] = {"steps": 400, "lr": 2e-2, "trunk": "none"}


def train(method: str, data: Overlapping = TRAIN, **arguments: Any) -> representations.Trained:
    return representations.train_representation(method, data.data, **{**SHARED, **arguments})


def rank_correlation(first: Tensor, second: Tensor) -> float:
    return float(spearmanr(first.numpy(), second.numpy())[0])


@pytest.fixture(scope="module")
def classifier() -> representations.Trained:
    return train("classifier")


# -- class entropy -----------------------------------------------------------------------------------------------------


def excess(probabilities: Tensor, truth: Overlapping) -> float:
    """Mean Kullback–Leibler divergence of predictions from p(y | x), in nats."""
    return float((truth.expected_loss(probabilities) - truth.entropy).mean())


def test_a_classifier_finds_the_entropy_of_the_class(classifier):
    """Softmax regression has the truth among its members: 21 weights, 3,600 data, so an excess of 21/7,200 = .003."""
    assert excess(classifier.class_probabilities(FRESH.x), FRESH) < 0.02
    errors = classifier.uncertainty(FRESH.x) - FRESH.entropy
    assert float(errors.square().mean().sqrt()) < 0.08
    sharpened = (classifier.class_probabilities(FRESH.x).log() * 2).softmax(
        -1
    )  # the planted defect: half the temperature
    assert excess(sharpened, FRESH) > 0.04
    assert float((torch.special.entr(sharpened).sum(-1) - FRESH.entropy).square().mean().sqrt()) > 0.12


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("mc-dropout", {"score": "entropy"}), ("ensemble", {}), ("sngp", {"length": 2.0}), ("het-xl", {})],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_others_that_predict_classes_find_it_too(method, arguments):
    found = train(method, **arguments)
    assert excess(found.class_probabilities(FRESH.x), FRESH) < 0.05
    assert rank_correlation(found.uncertainty(FRESH.x), FRESH.entropy) > 0.9


def test_dropout_of_nothing_changes_nothing():
    whole, dropped = train("mc-dropout", steps=20, rate=0.0), train("mc-dropout", steps=20, rate=0.3)
    assert float(whole.uncertainty(FRESH.x).max()) < 1e-5  # H(mean) − mean H of equal passes, but for rounding
    assert float(dropped.uncertainty(FRESH.x).mean()) > 1e-3


# -- ensembles and HET-XL beside the classifier ------------------------------------------------------------------------


def test_a_deep_ensemble_of_one_is_the_classifier():
    one, alone = train("ensemble", form="deep", members=1, steps=30), train("classifier", steps=30)
    assert torch.equal(one.class_probabilities(FRESH.x), alone.class_probabilities(FRESH.x))
    two = train("ensemble", form="deep", members=2, steps=30)
    assert not torch.equal(two.class_probabilities(FRESH.x), alone.class_probabilities(FRESH.x))


def test_a_shallow_ensemble_of_equal_members_is_the_classifier(classifier):
    many = train("ensemble", members=3, steps=1, score="jsd")
    output: Any = classifier.program.output
    with torch.no_grad():
        many.learner.heads.weight.copy_(output.weight.repeat(3, 1))
        many.learner.heads.bias.copy_(output.bias.repeat(3))
    torch.testing.assert_close(many.class_probabilities(FRESH.x), classifier.class_probabilities(FRESH.x))
    assert float(many.uncertainty(FRESH.x).max()) < 1e-5
    with torch.no_grad():
        many.learner.heads.bias[:4] += torch.tensor([1.0, 0.0, 0.0, 0.0])  # the first member differs
    assert float(many.uncertainty(FRESH.x).mean()) > 1e-3


def test_het_xl_without_noise_is_the_classifier(classifier):
    size = FRESH.x.shape[1]
    noisy = train("het-xl", steps=1, latents=size)
    program: Any = noisy.program
    output: Any = classifier.program.output
    with torch.no_grad():
        program.location.weight.copy_(torch.eye(size))
        program.location.bias.zero_()
        program.output.weight.copy_(output.weight)
        program.output.bias.copy_(output.bias)
        program.log_temperature.zero_()
        for head in (program.factor, program.diagonal):
            head.weight.zero_()
            head.bias.zero_()
        program.diagonal.bias.fill_(-30.0)  # what is left is the least variance, 1e-4
    largest = 5 * 0.01 * float(output.weight.detach().norm(dim=1).max())  # change of a logit by noise with sd .01
    errors = noisy.class_probabilities(FRESH.x) - classifier.class_probabilities(FRESH.x)
    assert float(errors.abs().max()) < largest / 4  # a probability changes by a quarter of a logit at most
    with torch.no_grad():
        program.diagonal.bias.fill_(2.0)
    errors = noisy.class_probabilities(FRESH.x) - classifier.class_probabilities(FRESH.x)
    assert float(errors.abs().max()) > largest / 4


# -- loss prediction ---------------------------------------------------------------------------------------------------


def test_the_hinge_of_pairs_by_hand():
    uncertainty, losses = torch.tensor([0.30, 0.10, 0.20, 0.90, 5.0]), torch.tensor([2.0, 1.0, 3.0, 1.0, 0.0])
    # pair (0, 1) is in order by .2, which is enough; pair (2, 3) is out of order by .7; the last one has no partner
    assert float(order_loss(uncertainty, losses)) == pytest.approx((0 + 0.8) / 2)
    assert float(order_loss(uncertainty[:2], losses[:2].flip(0))) == pytest.approx(0.3)
    assert float(order_loss(uncertainty[:2], torch.ones(2))) == pytest.approx(0.1)


@pytest.mark.parametrize("form", ["order", "value"])
def test_predicted_losses_rank_images_by_the_expected_loss(form):
    found = train("loss-prediction", form=form, lr=2e-3, steps=300, head=64)
    expected = FRESH.expected_loss(found.class_probabilities(FRESH.x))
    assert rank_correlation(found.uncertainty(FRESH.x), expected) > 0.8
    if form == "value":  # nats of cross-entropy
        assert float((found.uncertainty(FRESH.x) - expected).mean().abs()) < 0.1


def with_losses(sign: float) -> cal.data.Data:
    """The training data with losses of a classifier that is perfect, or with their sign swapped."""
    losses = -TRAIN.probabilities.gather(1, TRAIN.y[:, None])[:, 0].log()
    return cal.data.Data({"y": TRAIN.y}, {"x": TRAIN.x, "loss": sign * losses})


@pytest.mark.parametrize(("sign", "low", "high"), [(1.0, 0.8, 1.0), (-1.0, -1.0, -0.8)], ids=["right", "swapped"])
def test_losses_that_are_given_are_learned(sign, low, high):
    found = representations.train_representation("loss-prediction", with_losses(sign), trunk="none", steps=300, head=64)
    assert low < rank_correlation(found.uncertainty(FRESH.x), FRESH.entropy) < high


def slope_of_trunk(stop_gradient: bool) -> float:
    """Size of the gradient that the head's loss alone gives to the trunk."""
    learner: Learner = train("loss-prediction", trunk="linear", steps=1, stop_gradient=stop_gradient).learner
    values = {"x": TRAIN.x, "y": TRAIN.y, "loss": torch.rand(4000)}
    learner.zero_grad()
    learner.loss(values).backward()
    slopes = [weight.grad for weight in learner.trunk.parameters()]
    return sum(float(slope.abs().sum()) for slope in slopes if slope is not None)


def test_the_gradient_of_the_head_stops_before_the_trunk():
    assert slope_of_trunk(stop_gradient=True) == 0
    assert slope_of_trunk(stop_gradient=False) > 0


# -- SNGP --------------------------------------------------------------------------------------------------------------


def far(distance: float) -> Tensor:
    """Inputs at so many standard deviations of the data from their centre."""
    directions = functional.normalize(torch.randn(200, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    return TRAIN.x.mean(0) + distance * TRAIN.x.std(0) * directions


@pytest.mark.parametrize(("ridge", "grows"), [(1.0, True), (1e6, False)], ids=["right", "a ridge far above the data"])
def test_the_variance_of_sngp_grows_away_from_the_data(ridge, grows):
    found = train("sngp", steps=20, ridge=ridge, score="variance")
    near, away = (float(found.uncertainty(x).mean()) for x in (FRESH.x, far(20.0)))
    assert (away > 3 * near) == grows
    assert away > 0.6  # the variance of the prior is 1


def test_the_variance_of_sngp_is_that_of_a_gaussian_process():
    """Its dual form: k(x, x) − k(x, X) (k(X, X) + ridge)⁻¹ k(X, x), with k = φᵀφ, nearly the Gaussian kernel."""
    small = overlapping(100)
    found = train("sngp", small, steps=5, ridge=0.5, length=1.5, fourier=1024)
    learner: Any = found.learner.double()
    with torch.no_grad():
        old, new = learner.fourier_features(small.x.double()), learner.fourier_features(FRESH.x[:50].double())
        kernel, cross = old @ old.T, new @ old.T
        inverse = torch.linalg.inv(kernel + 0.5 * torch.eye(100, dtype=torch.float64))
        dual = (new @ new.T).diagonal() - ((cross @ inverse) * cross).sum(1)
        torch.testing.assert_close(learner.variance(FRESH.x[:50].double()), dual, rtol=1e-3, atol=1e-5)
        inputs = learner.trunk(small.x.double())
        gaussian = (-torch.cdist(inputs, inputs).square() / (2 * 1.5**2 * 6)).exp()
        # A term 2 cos a cos b has a variance of 1 at most, so that 4,950 errors of means of 1,024 stay below 5/√1,024
        assert float((kernel - gaussian).abs().max()) < 5 / math.sqrt(1024)


def test_a_running_precision_is_nearly_the_exact_one():
    exact, running = (train("sngp", steps=150, momentum=m, score="variance", fourier=256) for m in (-1.0, 0.98))
    assert rank_correlation(exact.uncertainty(FRESH.x), running.uncertainty(FRESH.x)) > 0.95


def test_spectral_norms_stay_below_their_limit():
    for limit, holds in ((0.9, True), (None, False)):
        found = train("sngp", trunk="mlp", steps=20, width=32, spectral=limit, fourier=64)
        layers = [part for part in found.learner.trunk.network if isinstance(part, torch.nn.Linear)]
        norms = [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in layers]
        assert all(norm < 0.901 for norm in norms) == holds
