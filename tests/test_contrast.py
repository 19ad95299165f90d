"""The contrast experiment on models whose posterior is known, with guides that are exact, flat, or wrong on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from calibrant.inference.exact import solve
from calibrant.inference.reference import exact_structure
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

import calibrant as cal
from calibrant.data import Data
from calibrant.errors import CalibrantError, InferenceError
from calibrant.evaluation import contrast, contrast_experiment, contrast_verdicts

SHAPE, LATENTS, LEVELS, FEW = (1, 4, 4), 5, [0.1, 0.3, 1.0, 3.0, 10.0], [0.1, 1.0, 10.0]


def model(name: str, **arguments: Any) -> PyroModule:
    torch.manual_seed(0)
    if name == "ea-vae":  # small scales likely, so that a blank image leaves the latents at their prior
        arguments = {"scale_prior": {"name": "lognormal", "loc": -1.5, "scale": 1.5}, **arguments}
    return cal.models.create(name, shape=list(SHAPE), latents=LATENTS, **arguments).eval()


def images(count: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Images of very different contrast, none of them blank: what the decoders of `model` make, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(count, 1, generator=generator) + 0.5
    x = torch.randn(count, LATENTS, generator=generator) @ model("vae").decoder.weight.detach().T
    x = strength * x + 0.1 * torch.randn(count, x.shape[1], generator=generator)
    return {"x": x.reshape(count, *SHAPE)}


# -- guides ------------------------------------------------------------------------------------------------------------


class GridScale(TorchDistribution):
    """A positive variable whose logarithm has a piecewise constant density: `weights` (size, cells) on one grid."""

    arg_constraints: Mapping[str, constraints.Constraint] = {}
    support = constraints.positive
    has_rsample = False

    def __init__(self, grid: Tensor, log_weights: Tensor) -> None:
        self.grid, self.width = grid, grid[1] - grid[0]
        self.cells = torch.distributions.Categorical(logits=log_weights, validate_args=False)
        super().__init__(log_weights.shape[:1], validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        cell = self.cells.sample(sample_shape)
        return (self.grid[cell] + self.width * (torch.rand(cell.shape) - 0.5)).exp()

    def log_prob(self, value: Tensor) -> Tensor:
        cell = ((value.log() - self.grid[0]) / self.width).round().long().clamp(0, len(self.grid) - 1)
        return self.cells.log_prob(cell) - self.width.log() - value.log()


class ExactGuide(PyroModule):
    """The exact posterior of a linear model by dense algebra of its own, with the scale on a fine grid.

    `widen` multiplies the sd of z: a planted defect.
    """

    def __init__(self, target: PyroModule, widen: float = 1.0) -> None:
        super().__init__()
        self.target, self.widen = target, widen
        self.register_buffer("grid", torch.linspace(-9.0, 6.0, 600))

    def forward(self, observed: Mapping[str, Tensor], size: int) -> None:
        images, row = observed["x"].flatten(1).unique(dim=0, return_inverse=True)
        loading, noise = self.target.decoder.weight, self.target.likelihood.scale
        error = images - self.target.decoder.bias
        with pyro.plate("data", size):
            scale = torch.ones(size)
            if hasattr(self.target, "prior_of_scale"):
                scale = pyro.sample("scale", GridScale(self.grid, self.log_weights(error)[row]))
            gain = (loading.T @ loading)[None] * (scale / noise)[:, None, None] ** 2
            covariance = torch.linalg.inv(torch.eye(loading.shape[1]) + gain)
            mean = (scale / noise**2)[:, None] * torch.einsum("nij,nj->ni", covariance, (error @ loading)[row])
            root = self.widen * torch.linalg.cholesky(covariance)
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=root))

    def log_weights(self, error: Tensor) -> Tensor:
        """log p(log s) p(x | s) of the unique images on the grid, `(images, cells)`."""
        scale, loading = self.grid.exp(), self.target.decoder.weight
        values, vectors = torch.linalg.eigh(loading @ loading.T)
        variance = scale[:, None] ** 2 * values.clamp_min(0) + self.target.likelihood.scale**2
        power = (error @ vectors)[:, None] ** 2 / variance
        return (
            -0.5 * (power.sum(-1) + variance.log().sum(-1)) + self.target.prior_of_scale().log_prob(scale) + self.grid
        )


class PlainGuide(PyroModule):
    """Normal z around zero with an sd that may depend on the image's contrast, and a scale that does not."""

    def __init__(self, sd: Callable[[Tensor], Tensor], scale: bool) -> None:
        super().__init__()
        self.sd, self.scale = sd, scale

    def forward(self, observed: Mapping[str, Tensor], size: int) -> None:
        width = self.sd(observed["x"].flatten(1).std(1))[:, None].expand(size, LATENTS)
        with pyro.plate("data", size):
            if self.scale:
                pyro.sample("scale", dist.LogNormal(torch.zeros(size), 0.3))
            pyro.sample("z", dist.Normal(torch.zeros_like(width), width).to_event(1))


def flat(width: float) -> Callable[[Tensor], Tensor]:
    return lambda strength: torch.full_like(strength, width)


def experiment(target: PyroModule, guide: PyroModule, **options: Any) -> xr.Dataset:
    return contrast_experiment(target, guide, images(), **{"levels": FEW, "chains": 2, **options})


def statuses(result: xr.Dataset) -> dict[tuple[str, str], str]:
    return {(v.site, v.quantity): v.status for v in contrast_verdicts(result)}


# -- known truth -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> dict[str, xr.Dataset]:
    return {name: experiment(m := model(name), ExactGuide(m), levels=LEVELS, draws=1500) for name in ("vae", "ea-vae")}


def test_an_exact_guide_of_the_ea_vae_passes_with_its_model(oracle):
    assert statuses(oracle["ea-vae"]) == {
        ("model", "contrast"): "pass",
        ("guide", "posterior_sd"): "pass",
        ("guide", "scale_cv"): "pass",
    }
    first, second, _ = (v.sentence for v in contrast_verdicts(oracle["ea-vae"]))
    assert first.startswith("model: the exact posterior sd falls from 0.9")
    assert first.endswith("as it should")
    assert second.startswith("guide: its posterior sd follows the exact curve within ")
    assert oracle["ea-vae"].attrs["spearman_exact"] == pytest.approx(-1.0)
    assert oracle["ea-vae"].attrs["spearman_amortized"] == pytest.approx(-1.0)


def test_a_linear_vae_fails_by_itself_and_its_exact_guide_passes(oracle):
    assert statuses(oracle["vae"]) == {("model", "contrast"): "fail", ("guide", "posterior_sd"): "pass"}
    sentence = contrast_verdicts(oracle["vae"])[0].sentence
    assert "is flat" in sentence
    assert "does not depend on the image" in sentence


@pytest.mark.parametrize(
    ("name", "guide", "expected"),
    [
        ("ea-vae", PlainGuide(flat(0.5), scale=True), {"model": "pass", "guide": "fail"}),
        ("vae", PlainGuide(lambda strength: 1 / (1 + strength), scale=False), {"model": "fail", "guide": "fail"}),
    ],
    ids=["flat guide of the ea-vae", "falling guide of the vae"],
)
def test_a_wrong_guide_is_failed_whatever_its_model_does(name, guide, expected):
    result = experiment(model(name), guide)
    assert {site: status for (site, quantity), status in statuses(result).items() if quantity != "scale_cv"} == expected
    sentence = contrast_verdicts(result)[1].sentence
    assert sentence.startswith("guide: its posterior sd is too ")
    assert "at contrast" in sentence


@pytest.mark.parametrize(("widen", "status"), [(1.2, "fail"), (1.02, "pass")])
def test_the_margin_of_the_guide_is_a_tenth(widen, status):
    target = model("vae")
    result = experiment(target, ExactGuide(target, widen))
    verdict = contrast_verdicts(result)[1]
    assert verdict.status == status
    if status == "fail":
        assert abs(verdict.effect - (widen - 1)) < limit(len(FEW)) * verdict.se
        assert "too large by up to" in verdict.sentence


@pytest.mark.parametrize("name", ["vae", "ea-vae"])
def test_statistics_are_those_of_the_exact_solution(oracle, name):
    result, target = oracle[name], model(name)
    structure = exact_structure(target, images())
    for level in LEVELS:
        solution = solve(structure, shown(level * result.attrs["noise"]))
        wanted = {"posterior_sd": solution.sd["z"].mean(1).numpy()}
        if name == "ea-vae":
            wanted["scale_cv"] = (solution.sd["scale"] / solution.mean["scale"]).numpy()
        for statistic, truth in wanted.items():
            found, se = (result[f"{statistic}_by_image{end}"].sel(contrast=level).values for end in ("", "_se"))
            assert np.isfinite(found).all()
            assert (np.abs(found - truth) < limit(20 * len(LEVELS) * len(truth)) * se).all()
            assert result[statistic].sel(contrast=level).values == pytest.approx(found.mean(1))
        mean = solution.mean["z"].numpy()
        assert result["mean_norm"].sel(contrast=level).values == pytest.approx(
            np.linalg.norm(mean, axis=1).mean(), abs=0.05
        )


def test_the_errors_of_the_statistics_are_not_too_large_either(oracle):
    """With too large errors the test above would pass any result: their squares must be the variances."""
    result, target = oracle["ea-vae"], model("ea-vae")
    squares = []
    for level in LEVELS:
        truth = solve(exact_structure(target, images()), shown(level * result.attrs["noise"])).sd["z"].mean(1).numpy()
        found, se = (result[f"posterior_sd_by_image{end}"].sel(contrast=level).values for end in ("", "_se"))
        squares.append(((found - truth) / se) ** 2)
    mean, count = np.mean(squares), np.size(squares)
    assert abs(mean - 1) < limit(1) * math.sqrt(2 / count) * 1.5  # the draws of the scale have heavier tails


def shown(strength: float) -> Tensor:
    """The images of `images()` at a contrast, as the experiment should show them."""
    x = images()["x"].double()
    centred = x - x.mean((1, 2, 3), keepdim=True)
    return strength * centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt()


def test_signal_variance_is_free_of_monte_carlo_bias():
    """With few draws the posterior mean's own noise would add its variance to one that is zero."""
    target, data = model("vae"), images(32)
    options = {"levels": [0.001, 0.002, 1.0], "chains": 2, "draws": 25}
    result = contrast_experiment(target, ExactGuide(target), data, **options)
    covariance = solve(exact_structure(target, images()), data["x"]).covariance(0)
    draws = np.array([50, 25])[:, None]
    noise = covariance.trace().item() / LATENTS / draws
    error = math.sqrt(2 / 31) * covariance.square().sum().sqrt().item() / LATENTS / draws
    low = result["signal_variance"].isel(contrast=[0, 1]).values
    assert (np.abs(low) < limit(4) * error).all()
    assert (noise > 1.2 * limit(4) * error).all()  # so the biased statistic would be caught


# -- what is shown, and what is left out -------------------------------------------------------------------------------


def test_images_keep_their_labels_and_blank_ones_are_left_out():
    target, x = model("ea-vae"), images()["x"]
    x[3] = 0.25  # blank, whatever its mean
    data = Data({"x": x}, coords={"data": np.array([f"patch {i}" for i in range(len(x))])})
    result = contrast_experiment(target, ExactGuide(target), data, levels=FEW, chains=2, draws=50)
    assert "patch 3" not in result["image"].values
    assert result.sizes["image"] == len(x) - 1
    few = contrast_experiment(target, ExactGuide(target), data, levels=FEW, chains=2, draws=50, images=4)
    assert set(few["image"].values) < set(result["image"].values)
    assert few.sizes["image"] == 4


def test_the_same_seed_gives_the_same_result_and_leaves_the_random_state_alone():
    target = model("ea-vae")
    before = torch.random.get_rng_state()
    first, second = (experiment(target, ExactGuide(target), draws=50, seed=3) for _ in "12")
    assert first.identical(second)
    assert torch.equal(before, torch.random.get_rng_state())


def test_defaults_and_attributes(tmp_path):
    target = model("ea-vae")
    result = contrast_experiment(target, ExactGuide(target), images(), chains=1, draws=40)
    levels = result["contrast"].values
    assert len(levels) >= 10
    assert (levels[0], levels[-1]) == pytest.approx((0.1, 10.0))
    assert np.diff(np.log(levels)) == pytest.approx(np.diff(np.log(levels))[0])
    assert result.attrs["noise"] == pytest.approx(0.4)
    assert {k: result.attrs[k] for k in ("latent", "scale", "n_latents", "structure", "reference_method")} == {
        "latent": "z",
        "scale": "scale",
        "n_latents": LATENTS,
        "structure": "scaled linear-gaussian",
        "reference_method": "exact",
    }
    assert result.attrs["prior_sd"] == pytest.approx(1.0)
    assert result.attrs["share_reference"] == 1.0
    assert all(isinstance(value, str | int | float) for value in result.attrs.values())
    result.to_netcdf(tmp_path / "contrast.nc", engine="h5netcdf")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "contrast.nc", engine="h5netcdf"), result)


def test_noise_of_single_pixels_is_averaged_as_a_variance():
    torch.manual_seed(0)
    target = cal.models.create("ppca", shape=list(SHAPE), latents=LATENTS, noise="diagonal")
    with torch.no_grad():
        target.likelihood.log_scale[0, 0, 0] = math.log(2.0)
    wanted = math.sqrt((15 * 0.25 + 4.0) / 16)
    assert contrast.noise_equivalent_contrast(target) == pytest.approx(wanted)


def test_only_latents_that_respond_to_images_are_informative():
    target = model("vae")
    with torch.no_grad():
        target.decoder.directions[:, 1] = 1e-4
    result = experiment(target, ExactGuide(target), draws=100)
    assert (result.attrs["n_informative"], result.attrs["n_latents"]) == (LATENTS - 1, LATENTS)
    exact = solve(exact_structure(target, images()), shown(1.0)).sd["z"][:, [0, 2, 3, 4]].mean()
    assert result["posterior_sd"].sel(source="exact").values == pytest.approx(exact.item(), rel=0.03)


def test_a_model_without_informative_latents_is_flat_at_the_prior():
    target = model("vae")
    with torch.no_grad():
        target.decoder.directions.fill_(1e-5)
    result = experiment(target, ExactGuide(target))
    assert result.attrs["n_informative"] == 0
    assert statuses(result) == {("model", "contrast"): "fail", ("guide", "posterior_sd"): "pass"}
    assert "is flat, 1.00 of the prior" in contrast_verdicts(result)[0].sentence


def test_prior_sd_of_a_correlated_prior_and_of_one_that_must_be_simulated():
    covariance = [[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.25]]
    torch.manual_seed(0)
    target = cal.models.create("gsm", shape=list(SHAPE), latents=3, covariance=covariance)
    site = cal.program.sites(target, images(3))["y"]
    patches = contrast._choose(Data(images()), "x", 8, 0)
    assert contrast._prior_sd(target, site, patches) == pytest.approx([2.0, 1.0, 0.5])

    def nested(size: int) -> None:
        with pyro.plate("data", size):
            width = pyro.sample("width", dist.LogNormal(0.0, 0.5))
            z = pyro.sample("z", dist.Normal(0.0, width[..., None]).expand([size, 2]).to_event(1))
            mean = z.sum(-1)[:, None, None, None].expand(size, *SHAPE)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(3))

    program = cal.program.as_program(nested)
    site = cal.program.sites(program, images(3))["z"]
    assert site.parents == ("width",)
    assert contrast._prior_sd(program, site, patches) == pytest.approx([math.exp(0.25)] * 2, rel=0.04)


# -- references that may fail ------------------------------------------------------------------------------------------


def test_errors_of_correlated_draws_use_their_effective_number(monkeypatch, oracle):
    """Every draw three times: the same curve, with errors √3 times those of independent draws."""

    def reference(*arguments: Any, **options: Any) -> xr.DataTree:
        tree = cal.inference.reference(*arguments, **options)
        draws = tree["posterior"].to_dataset().isel(draw=np.repeat(np.arange(500), 3))
        draws = draws.assign_coords(draw=np.arange(1500)).assign_attrs(independent_draws=0, method="pyro-nuts")
        return xr.DataTree.from_dict({"/posterior": draws, "/convergence": tree["convergence"].to_dataset()})

    monkeypatch.setattr(contrast, "reference", reference)
    target = model("ea-vae")
    result = experiment(target, ExactGuide(target), levels=LEVELS)
    assert result.attrs["reference_method"] == "pyro-nuts"
    for name in ("posterior_sd_by_image_se", "scale_cv_by_image_se"):
        ratio = result[name].sel(source="exact") / oracle["ea-vae"][name].sel(source="exact")  # that of 1,500 draws
        assert float(ratio.median()) == pytest.approx(3**0.5, rel=0.15)
    assert contrast_verdicts(result)[0].sentence.startswith("model: the reference posterior sd falls from 0.9")


def test_a_reference_that_was_interrupted_ends_the_experiment(monkeypatch):
    def reference(*arguments: Any, **options: Any) -> xr.DataTree:
        return cal.inference.reference(*arguments, **options).isel(data=slice(5))

    monkeypatch.setattr(contrast, "reference", reference)
    target = model("vae")
    with pytest.raises(KeyboardInterrupt):
        experiment(target, ExactGuide(target), draws=50)


@pytest.fixture
def failing(monkeypatch) -> Callable[[Callable[[int, int], bool]], None]:
    """References some of which fail the gate: `fails(call, image)`; call 0 is that of the unscaled images."""

    def install(fails: Callable[[int, int], bool]) -> None:
        calls = iter(range(1000))

        def reference(*arguments: Any, **options: Any) -> xr.DataTree:
            tree, call = cal.inference.reference(*arguments, **options), next(calls)
            passed = np.array([not fails(call, i) for i in range(tree["posterior"].sizes["data"])])
            gate = tree["convergence"].to_dataset().assign(is_reference=("data", passed))
            tree["convergence"] = xr.DataTree(gate)
            return tree

        monkeypatch.setattr(contrast, "reference", reference)

    return install


def test_only_data_that_pass_the_gate_count_for_both_sources(failing):
    target = model("ea-vae")
    failing(lambda call, image: call == 2 and image < 6)
    result = experiment(target, ExactGuide(target), draws=200)
    assert result["images_passed"].values.tolist() == [12, 6, 12]
    assert np.isnan(result["posterior_sd_by_image"].isel(contrast=1, image=slice(6)).values).all()
    assert np.isfinite(result["posterior_sd_by_image"].isel(contrast=1, image=slice(6, None)).values).all()
    assert np.isfinite(result["posterior_sd"].values).all()
    assert result.attrs["share_reference"] == pytest.approx(30 / 36)
    assert set(statuses(result).values()) == {"cannot tell"}
    assert "17% of the images × contrasts have no reference posterior" in contrast_verdicts(result)[0].sentence


def test_a_contrast_without_reference_leaves_the_verdict_open(failing):
    target = model("ea-vae")
    failing(lambda call, image: call == 1 and image > 0)
    result = experiment(target, ExactGuide(target), draws=100)
    assert np.isnan(result["posterior_sd"].isel(contrast=0).values).all()
    assert set(statuses(result).values()) == {"cannot tell"}


def test_no_image_with_a_reference_is_an_error(failing):
    target = model("ea-vae")
    failing(lambda call, image: True)
    with pytest.raises(InferenceError, match="12 of 12 images fails the gate"):
        experiment(target, ExactGuide(target), draws=50)


# -- verdicts on curves of any shape -----------------------------------------------------------------------------------


def curves(exact: list[float], ours: list[float], se: float = 1e-3, share: float = 1.0) -> xr.Dataset:
    """A result with these posterior sds, without a scale."""
    values = np.repeat(np.array([exact, ours])[:, :, None], 4, 2)
    dims = ("source", "contrast", "image")
    return xr.Dataset(
        {"posterior_sd_by_image": (dims, values), "posterior_sd_by_image_se": (dims, np.full_like(values, se))},
        coords={"source": ["exact", "amortized"], "contrast": np.geomspace(0.1, 10, len(exact))},
        attrs={
            "prior_sd": 1.0,
            "scale": "",
            "structure": "",
            "reference_method": "exact",
            "share_reference": share,
            "spearman_exact": float(np.corrcoef(np.argsort(np.argsort(exact)), range(len(exact)))[0, 1]),
        },
    )


FALLING = [0.99, 0.9, 0.6, 0.3, 0.1]


@pytest.mark.parametrize(
    ("exact", "ours", "expected", "words"),
    [
        (FALLING, FALLING, ("pass", "pass"), "falls from 0.99 to 0.10"),
        (FALLING, [0.95 * v for v in FALLING], ("pass", "pass"), "falls"),
        (FALLING, [0.8 * v for v in FALLING], ("pass", "fail"), "falls"),
        (FALLING, [0.99, 0.9, 0.6, 0.3, 0.3], ("pass", "fail"), "falls"),
        ([0.5, 0.5, 0.5, 0.5, 0.5], [0.5] * 5, ("fail", "pass"), "is flat, 0.50 of the prior"),
        ([0.50, 0.49, 0.48, 0.47, 0.46], [0.48] * 5, ("fail", "pass"), "is flat"),
        ([0.1, 0.3, 0.6, 0.9, 0.99], FALLING, ("fail", "fail"), "it should fall steadily"),
        ([0.5, 0.4, 0.3, 0.2, 0.1], [0.5, 0.4, 0.3, 0.2, 0.1], ("fail", "pass"), "it should start near the prior"),
    ],
)
def test_verdicts_of_known_curves(exact, ours, expected, words):
    first, second = contrast_verdicts(curves(exact, ours))
    assert (first.status, second.status) == expected
    assert words in first.sentence


def test_a_flat_curve_is_flat_however_its_noise_is_ranked():
    """Noise that happens to fall has rank correlation −1."""
    still = [0.556, 0.553, 0.55, 0.547, 0.544]
    assert contrast_verdicts(curves(still, still, se=0.005))[0].status == "fail"
    assert "is flat" in contrast_verdicts(curves(still, still, se=0.005))[0].sentence
    noisy = [0.60, 0.57, 0.55, 0.53, 0.50]
    assert "is flat" not in contrast_verdicts(curves(noisy, noisy, se=0.001))[0].sentence


def test_a_curve_that_is_not_known_is_not_called_flat():
    falling = [1.0, 0.9, 0.7, 0.5, 0.4]
    assert contrast_verdicts(curves(falling, falling, se=3.0))[0].status == "cannot tell"


def test_a_guide_at_the_margin_is_left_open():
    verdict = contrast_verdicts(curves(FALLING, [1.1 * v for v in FALLING], se=0.01))[1]
    assert verdict.status == "cannot tell"
    assert verdict.sentence.startswith("guide: cannot tell whether its posterior sd follows the exact curve within 10%")


def test_a_guide_is_failed_even_where_many_references_are_missing():
    first, second = contrast_verdicts(curves(FALLING, [0.5] * 5, share=0.8))
    assert (first.status, second.status) == ("cannot tell", "fail")


# -- refusals ----------------------------------------------------------------------------------------------------------


class Two(PyroModule):
    """Two vector latents, two scales, noise of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.likelihood = cal.models.Gaussian(0.5)

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            a, b = (pyro.sample(n, dist.LogNormal(0.0, 1.0)) for n in ("a", "b"))
            u, v = (pyro.sample(n, dist.Normal(0.0, 1.0).expand([2]).to_event(1)) for n in ("u", "v"))
            mean = (a * u.sum(-1) + b * v.sum(-1))[:, None, None, None].expand(size, *SHAPE)
            pyro.sample("x", self.likelihood(mean))


class Scalar(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.likelihood = cal.models.Gaussian(0.5)

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.likelihood(z[:, None, None, None].expand(size, *SHAPE)))


class Pair(PyroModule):
    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1)[:, None, None, None].expand(size, *SHAPE), 1.0).to_event(3))
            pyro.sample("w", dist.Normal(z.sum(-1), 1.0))


def binary() -> dict[str, Tensor]:
    return {"x": (images()["x"] > 0).float()}


@pytest.mark.parametrize(
    ("target", "data", "options", "message"),
    [
        (model("vae", likelihood="bernoulli"), binary(), {}, "has no `likelihood.scale`.*give noise="),
        (model("vae"), images(), {"noise": 0.0}, "noise=0.0"),
        (model("vae"), images(), {"noise": math.nan}, "noise=nan"),
        (model("vae"), images(), {"levels": [1.0, 2.0]}, "levels are"),
        (model("vae"), images(), {"levels": [0.0, 1.0, 2.0]}, "levels are"),
        (model("vae"), images(), {"levels": [1.0, 1.0, 2.0]}, "levels are"),
        (model("vae"), images(), {"images": 1}, "images=1"),
        (model("vae"), {"x": torch.ones(9, *SHAPE)}, {}, "of 9 data 0 have contrast"),
        (model("vae"), images(), {"latent": "y"}, r"latent='y' is no vector.*\['z'\]"),
        (model("vae"), images(), {"scale": "z"}, "scale='z' is no positive scalar"),
        (Scalar(), images(), {}, "no local vector latent"),
        (Two(), images(), {}, r"vector latents \['u', 'v'\]: name one with latent="),
        (Two(), images(), {"latent": "u"}, r"positive scalar latents \['a', 'b'\]: name one with scale="),
        (Pair(), {**images(), "w": torch.zeros(12)}, {"noise": 1.0}, "contrast is that of one site"),
        (model("vae"), {"x": torch.zeros(9, 5)}, {}, "'x' has shape"),
    ],
)
def test_what_the_experiment_cannot_use_is_refused(target, data, options, message):
    with pytest.raises(CalibrantError, match=message):
        contrast_experiment(target, nn.Identity(), data, **options)


def test_a_guide_without_any_spread_fails():
    target = model("vae")
    result = experiment(target, PlainGuide(flat(1e-30), scale=False), draws=50)
    assert statuses(result)["guide", "posterior_sd"] == "fail"
    assert "too small by up to 100%" in contrast_verdicts(result)[1].sentence


def test_a_guide_with_draws_that_are_not_finite_is_refused():
    target = model("vae")
    broken = PlainGuide(flat(math.inf), scale=False)
    with pyro.validation_enabled(False), pytest.raises(InferenceError, match="draws of 'z' are not finite"):
        experiment(target, broken, draws=50)
