"""Models, encoders and guides of one's own: the same ELBO as their own code, checked without retraining."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import calibrant as cal
from calibrant.errors import DataError, ProgramError, RunError
from calibrant.guides.contract import check_guide
from calibrant.inference.fitting.objectives import analytic_kl, elbo_terms

LATENTS, PIXELS = 2, 64


class PlainVAE(nn.Module):
    """A VAE as PyTorch users write it: no Pyro, its own loss, methods as well as modules."""

    def __init__(self, outputs=PIXELS):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 64), nn.ReLU(), nn.Linear(64, outputs))

    def encode(self, x):
        return self.encoder(x).chunk(2, 1)

    def decode(self, z):
        return self.decoder(z).chunk(2, 1)

    def sample(self, x):
        mean, log_variance = self.encode(x)
        return mean + torch.randn_like(mean) * (log_variance / 2).exp(), mean, log_variance

    def kl(self, mean, log_variance):
        return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)

    def cross_entropy(self, x, z):
        return functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)


def digits():
    return torch.as_tensor(load_digits().images).reshape(-1, PIXELS)


@pytest.fixture(scope="module")
def trained():
    """A VAE of binary digits, trained by code of its own, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, x = PlainVAE().double(), (digits() > 8).double()
        optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
        for _ in range(150):
            rows = x[torch.randint(len(x), (128,))]
            z, mean, log_variance = vae.sample(rows)
            loss = (vae.cross_entropy(rows, z) + vae.kl(mean, log_variance)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return vae.eval(), x


def same_noise(own, ours):
    """Both run on the same random stream."""
    torch.manual_seed(1)
    first = own()
    torch.manual_seed(1)
    return first, ours()


# -- the same ELBO -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def gap(vae, model, guide, x, error):
    """Largest difference from the VAE's own −(error + KL), over data."""

    def own():
        z, mean, log_variance = vae.sample(x)
        return -error(z) - vae.kl(mean, log_variance)

    with cal.program.defaults(model, {}):
        wanted, found = same_noise(own, lambda: analytic_kl(model, guide, {"x": x}, len(x), {}).local)
    return float((wanted - found).abs().max())


def test_bernoulli_elbo_is_the_vae_s_own(trained):
    vae, x = trained
    model = cal.models.from_decoder(vae.decoder, prior=LATENTS, likelihood="bernoulli")
    for encoder in (vae.encode, vae.encoder):  # a pair; one tensor of both
        guide = cal.guides.from_encoder(encoder, "loc, log_variance")
        assert gap(vae, model, guide, x, lambda z: vae.cross_entropy(x, z)) < 1e-6
    wrong = cal.guides.from_encoder(vae.encoder, "loc, log_scale")
    assert gap(vae, model, wrong, x, lambda z: vae.cross_entropy(x, z)) > 0.1


def test_monte_carlo_elbo_is_the_vae_s_own(trained):
    vae, x = trained
    model = cal.models.from_decoder(vae.decoder, LATENTS, "bernoulli")
    guide = cal.guides.from_encoder(vae.encode, "loc, log_variance")

    def own():
        z, mean, log_variance = vae.sample(x)
        log_q = -0.5 * ((z - mean) ** 2 / log_variance.exp() + log_variance + math.log(2 * math.pi)).sum(1)
        log_prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
        return log_prior - vae.cross_entropy(x, z) - log_q

    with torch.no_grad(), cal.program.defaults(model, {}):
        wanted, found = same_noise(own, lambda: elbo_terms(model, guide, {"x": x}, len(x), {}).local)
    assert float((wanted - found).abs().max()) < 1e-6


def test_a_decoder_that_ends_in_a_sigmoid(trained):
    vae, x = trained
    decoder = nn.Sequential(vae.decoder, nn.Sigmoid())
    guide = cal.guides.from_encoder(vae.encode, "loc, log_variance")
    model = cal.models.from_decoder(decoder, LATENTS, lambda p: dist.Bernoulli(p).to_event(p.dim() - 1))
    assert gap(vae, model, guide, x, lambda z: vae.cross_entropy(x, z)) < 1e-6
    with pytest.warns(UserWarning, match="sigmoid"):
        cal.models.from_decoder(decoder, LATENTS, "bernoulli")


@pytest.mark.parametrize(("mean", "beta"), [(False, 1.0), (True, 1.0), (False, 4.0)])
def test_squared_error_is_a_gaussian_of_the_stated_scale(trained, mean, beta):
    """Up to the Gaussian's constant, and the factor β: maximising either ELBO is minimising the loss."""
    vae, _ = trained
    x = digits() / 4 - 2
    guide = cal.guides.from_encoder(vae.encode, "loc, log_variance")
    scale = (beta * (PIXELS if mean else 1) / 2) ** 0.5

    def error(z):
        total = (x - vae.decoder(z)).pow(2).sum(1) / (PIXELS if mean else 1)
        return total / beta + PIXELS * math.log(scale * (2 * math.pi) ** 0.5)

    likelihood = {"name": "beta", "beta": beta * (PIXELS if mean else 1)}
    model = cal.models.from_decoder(vae.decoder, LATENTS, likelihood)
    assert gap(vae, model, guide, x, error) < 1e-6
    with torch.no_grad():
        model.likelihood.log_scale.fill_(0.0)
    assert gap(vae, model, guide, x, error) > 0.1


def test_a_decoder_of_mean_and_log_variance():
    torch.manual_seed(0)
    vae, x = PlainVAE(2 * PIXELS).double().eval(), digits() / 4 - 2
    model = cal.models.from_decoder(vae.decode, LATENTS, lambda o: dist.Normal(o[0], (o[1] / 2).exp()).to_event(1))
    guide = cal.guides.from_encoder(vae.encode, "loc, log_variance")

    def error(z):
        mean, log_variance = vae.decode(z)
        return 0.5 * ((x - mean) ** 2 / log_variance.exp() + log_variance + math.log(2 * math.pi)).sum(1)

    assert gap(vae, model, guide, x, error) < 1e-6


class ConditionalVAE(nn.Module):
    """A conditional VAE as PyTorch users write it: encoder and decoder see the label."""

    def __init__(self, classes=10):
        super().__init__()
        self.classes = classes
        self.encoder, self.decoder = nn.Linear(PIXELS + classes, 2 * LATENTS), nn.Linear(LATENTS + classes, PIXELS)

    def join(self, value, label):
        return torch.cat([value, functional.one_hot(label, self.classes).to(value.dtype)], 1)

    def encode(self, x, label):
        return self.encoder(self.join(x, label)).chunk(2, 1)

    def decode(self, z, label):
        return self.decoder(self.join(z, label)).sigmoid()

    def elbo(self, x, label):
        mean, log_variance = self.encode(x, label)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = functional.binary_cross_entropy(self.decode(z, label), x, reduction="none").sum(1)
        return -error - 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)


@torch.no_grad()
def test_the_elbo_of_a_conditional_vae_is_its_own():
    torch.manual_seed(0)
    vae, x = ConditionalVAE().double().eval(), (digits() > 8).double()
    label = torch.as_tensor(load_digits().target)
    likelihood = lambda p: dist.Bernoulli(p).to_event(p.dim() - 1)  # noqa: E731
    model = cal.models.from_decoder(vae.decode, LATENTS, likelihood, covariates=["label"])
    guide = cal.guides.from_encoder(vae.encode, "loc, log_variance", covariates=["label"])

    def ours(covariate):
        return analytic_kl(model, guide, {"x": x}, len(x), {"label": covariate}).local

    with cal.program.defaults(model, {}):
        wanted, found = same_noise(lambda: vae.elbo(x, label), lambda: ours(label))
        assert float((wanted - found).abs().max()) < 1e-6
        wanted, found = same_noise(lambda: vae.elbo(x, label), lambda: ours((label + 1) % 10))
    assert float((wanted - found).abs().mean()) > 0.1


# -- checked without retraining ----------------------------------------------------------------------------------------


def test_a_trained_vae_is_checked_without_retraining(trained):
    vae, x = trained
    before = copy.deepcopy(vae.state_dict())
    model = cal.models.from_decoder(vae.decoder, LATENTS, "bernoulli")
    guide = cal.guides.from_encoder(vae.encode, "loc, log_variance")
    few = {"x": x[:4]}
    post = cal.inference.posterior(model, guide, few, draws=500)
    ref = cal.inference.reference(model, few, method="nuts", warmup=200, draws=500)
    result = cal.evaluation.compare(post, ref)
    assert int(ref["convergence"]["is_reference"].sum()) >= 2
    assert set(result["latent"].values) == {"z[0]", "z[1]"}
    assert bool((result["sd_ratio"].notnull()).any())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert model.decoder is vae.decoder


def test_it_is_stored_and_loaded_into_modules_built_again(trained, tmp_path):
    vae, x = trained
    model = cal.models.from_decoder(vae.decoder, LATENTS, "bernoulli")
    guide = cal.guides.from_encoder(vae.encode, "loc, log_variance")
    observed = {"x": x[:300]}
    fit = cal.inference.fit(copy.deepcopy(model), copy.deepcopy(guide), observed, epochs=1, batch_size=128)
    cal.store.save_run(tmp_path / "run", model, guide, fit)
    with pytest.raises(RunError, match="model="):
        cal.load(tmp_path / "run")
    torch.manual_seed(5)
    fresh = PlainVAE()
    again = cal.load(
        tmp_path / "run",
        model=cal.models.from_decoder(fresh.decoder, LATENTS, "bernoulli"),
        guide=cal.guides.from_encoder(fresh.encode, "loc, log_variance"),
    )
    posts = [cal.inference.posterior(*pair, observed, draws=3, seed=2) for pair in ((model, guide), again)]
    for stat in ("log_p", "log_q"):
        np.testing.assert_allclose(posts[0]["sample_stats"][stat], posts[1]["sample_stats"][stat], rtol=1e-9)


def test_fit_trains_the_modules_in_place(trained):
    vae, x = copy.deepcopy(trained[0]), trained[1]
    model = cal.models.from_decoder(vae.decoder, LATENTS, "bernoulli")
    guide = cal.guides.from_encoder(vae.encode, "loc, log_variance")
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    cal.inference.fit(model, guide, {"x": x[:512]}, epochs=2, batch_size=128)
    assert all(not torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_covariates_of_a_conditional_vae():
    class Concat(nn.Module):
        def __init__(self, entries, outputs):
            super().__init__()
            self.layer = nn.Linear(entries + 3, outputs)

        def forward(self, value, label):
            return self.layer(torch.cat([value, functional.one_hot(label, 3).to(value.dtype)], 1))

    model = cal.models.from_decoder(Concat(2, 5).eval(), 2, "gaussian", covariates=["label"])
    guide = cal.guides.from_encoder(Concat(5, 4).eval(), "loc, log_scale", covariates=["label"])
    assert cal.program.covariate_names(model) == ("label",)
    data = {"x": torch.randn(40, 5), "label": torch.randint(3, (40,))}
    cal.inference.fit(copy.deepcopy(model), guide, data, epochs=1, batch_size=16)
    first, second = (
        cal.inference.posterior(model, guide, {**data, "label": label}, draws=4)
        for label in (data["label"], (data["label"] + 1) % 3)
    )
    assert (first["posterior"]["z"] != second["posterior"]["z"]).all()
    with pytest.raises(DataError, match="label"):
        cal.inference.posterior(model, guide, {"x": data["x"]}, draws=4)


# -- priors ------------------------------------------------------------------------------------------------------------

PRIORS = {
    "normal": lambda: dist.Normal(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 3.0])).to_event(1),
    "expanded": lambda: dist.Laplace(0.0, 2.0).expand([2]).to_event(1),
    "dense": lambda: dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    "lognormal": lambda: dist.LogNormal(0.5, 2.0).expand([2]).to_event(1),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        dist.Normal(torch.tensor([[-1.0, 0.0], [2.0, 1.0]]), 0.5).to_event(1),
    ),
    "student": lambda: dist.StudentT(3.0, 0.0, 1.0).expand([2]).to_event(1),
    "dirichlet": lambda: dist.Dirichlet(torch.tensor([2.0, 3.0])),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_distribution_follows_the_model_to_another_dtype(name):
    model = cal.models.from_decoder(nn.Linear(2, 4), PRIORS[name](), "gaussian")
    for moved in (model, copy.deepcopy(model).double()):
        with cal.program.defaults(moved, {}) as (_, dtype):
            run = cal.program.trace(moved, 9)
            fn, value = run.nodes["z"]["fn"], run.nodes["z"]["value"]
            wanted = PRIORS[name]().log_prob(value)
            assert fn.batch_shape == (9,)
            assert fn.log_prob(value).dtype == value.dtype == dtype == next(moved.parameters()).dtype
        assert torch.allclose(fn.log_prob(value), wanted, rtol=1e-5)
    cal.program.check_program(model, {"x": torch.randn(8, 4)})
    assert any(key.startswith("prior.") for key in model.state_dict())


def test_priors_by_shape_and_by_function():
    maps = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1))
    model = cal.models.from_decoder(maps, (2, 4, 4), "gaussian")
    assert cal.program.sample_prior(model, 3, seed=0)["z"].shape == (3, 2, 4, 4)
    model = cal.models.from_decoder(
        nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3)), lambda: dist.Gamma(2.0, 1.0), "gaussian", latent="g"
    )
    assert cal.program.sample_prior(model, 5, seed=0)["g"].shape == (5,)

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self):
            return dist.Normal(self.loc, 1.0).to_event(1)

    model = cal.models.from_decoder(nn.Linear(2, 4), Learned(), "gaussian", site="image")
    assert "prior.loc" in dict(model.named_parameters())
    guide = cal.guides.from_encoder(nn.Linear(4, 4), "loc, log_scale", site="image")
    cal.inference.fit(model, guide, {"image": torch.randn(64, 4)}, epochs=1, batch_size=16)
    assert model.prior.loc.abs().sum() > 0


# -- refusals ----------------------------------------------------------------------------------------------------------


def decoder():
    return nn.Linear(2, 4).eval()


WEIGHT = nn.Parameter(torch.zeros(4))
WRONG_MODELS = {
    "batch norm in training": (lambda: nn.Sequential(decoder(), nn.BatchNorm1d(4)), 2, "gaussian", r"call \.eval\(\)"),
    "dropout in training": (lambda: nn.Sequential(decoder(), nn.Dropout(0.5)), 2, "gaussian", r"call \.eval\(\)"),
    "a class": (lambda: nn.Identity, 2, "gaussian", "instance"),
    "a function": (lambda: lambda z: z, 2, "gaussian", "nn.Module"),
    "other latents": (decoder, 3, "gaussian", r"\(7, 3\).*event shape"),
    "no latents": (decoder, 0, "gaussian", "prior=0"),
    "not a prior": (decoder, "normal", "gaussian", "prior"),
    "a prior without to_event": (decoder, dist.Normal(torch.zeros(2), 1.0), "gaussian", r"\.to_event\(1\)"),
    "a torch prior": (decoder, torch.distributions.Dirichlet(torch.ones(2)), "gaussian", "pyro.distributions"),
    "a prior with weights": (decoder, dist.Normal(WEIGHT[:2], 1.0).to_event(1), "gaussian", "module whose forward"),
    "a prior with transforms": (
        decoder,
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 1.0).to_event(1), [dist.transforms.AffineTransform(torch.ones(2), 2.0)]
        ),
        "gaussian",
        "'transforms'.*function",
    ),
    "a prior with arguments": (decoder, lambda size: dist.Normal(0.0, 1.0), "gaussian", "arguments"),
    "an unknown likelihood": (decoder, 2, "poisson", "unknown likelihood"),
    "a likelihood without to_event": (decoder, 2, lambda o: dist.Normal(o, 1.0), r"\.to_event"),
    "a likelihood of another thing": (decoder, 2, lambda o: dist.Normal(o[0], o[1].exp()).to_event(1), "leading"),
    "a tensor": (decoder, 2, lambda o: o, "Tensor"),
    "a torch likelihood": (decoder, 2, lambda o: torch.distributions.Poisson(o.exp()), "pyro.distributions"),
    "a likelihood that fails": (decoder, 2, lambda o: dist.Normal(o.mean_of_x, 1.0), "decoder's output"),
    "a decoder of a pair": (lambda: PlainVAE(8).decode, 2, "gaussian", "tuple of 2"),
    "a decoder of one output": (decoder, 2, "gaussian-per-pixel", r"return the tuple \(location, log_scale\)"),
    "a decoder that flattens": (lambda: nn.Sequential(decoder(), nn.Flatten(0)), 2, "gaussian", "leading"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_what_is_no_decoder_prior_or_likelihood_is_refused(name):
    make, prior, likelihood, match = WRONG_MODELS[name]
    with pytest.raises(ProgramError, match=match):
        cal.models.from_decoder(make(), prior, likelihood)


def test_a_likelihood_with_hidden_weights_is_refused_with_the_data():
    model = cal.models.from_decoder(decoder(), 2, lambda o: dist.Normal(o, WEIGHT.exp()).to_event(1))
    with pytest.raises(ProgramError, match="no parameters of the module"):
        cal.program.check_program(model, {"x": torch.randn(8, 4)})


def test_grey_values_are_refused_by_the_bernoulli():
    model = cal.models.from_decoder(decoder(), 2, "bernoulli")
    with pytest.raises(DataError, match="Bernoulli"):
        cal.program.check_program(model, {"x": torch.rand(8, 4)})


ENCODERS = {
    "three things": (lambda x: (x, x, x), "loc, scale", "pair"),
    "two shapes": (lambda x: (x[:, :2], x[:, :1]), "loc, scale", "shapes"),
    "an odd tensor": (lambda x: x[:, :3], "loc, scale", "halves"),
    "a negative scale": (lambda x: (x[:, :2], -x[:, :2].abs() - 1), "loc, scale", "output="),
    "other latents": (lambda x: (x[:, :3], x[:, :3]), "loc, log_scale", "shape"),
    "mixed data": (lambda x: (x[:, :2] - x[:, :2].mean(0), x[:, :2]), "loc, log_scale", "other data|permuting"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_no_encoder_is_refused(name):
    function, output, match = ENCODERS[name]

    class Encoder(nn.Module):
        def forward(self, x):
            return function(x)

    model = cal.models.from_decoder(decoder(), 2, "gaussian")
    guide = cal.guides.from_encoder(Encoder(), output)
    with pytest.raises(ProgramError, match=match):
        check_guide(model, guide, {"x": torch.randn(8, 4)}, {})


def test_from_encoder_checks_what_it_can_at_once():
    with pytest.raises(ProgramError, match="log_variance"):
        cal.guides.from_encoder(nn.Linear(4, 4), "mean, variance")
    with pytest.raises(ProgramError, match=r"call \.eval\(\)"):
        cal.guides.from_encoder(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ProgramError, match=r"nn\.Module"):
        cal.guides.from_encoder(lambda x: (x, x))


# -- guides written by hand --------------------------------------------------------------------------------------------


def by_hand(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"][:, :2], 0.5).to_event(1))


class Owner(nn.Module):
    """A module whose method is the guide."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 2)

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(self.encoder(observed["x"]), 0.5).to_event(1))

    guide = forward

    def old_style(self, x):
        return x


def test_guides_written_by_hand():
    torch.manual_seed(0)
    model, observed = cal.models.from_decoder(decoder(), 2, "gaussian"), {"x": torch.randn(32, 4)}
    owner = Owner()
    for guide, weights in ((by_hand, 0), (owner, 2), (owner.guide, 2)):
        wrapped = cal.guides.wrap(guide)
        assert len(list(wrapped.parameters())) == weights
        assert cal.inference.posterior(model, wrapped, observed, draws=3)["posterior"]["z"].shape == (1, 3, 32, 2)
    program = pyro.nn.PyroModule[Owner]()
    assert cal.guides.wrap(program) is program


@pytest.mark.parametrize(
    ("guide", "match"),
    [
        (lambda: lambda x: None, "observed, size"),
        (lambda: Owner().old_style, "observed, size"),
        (lambda: Owner, "instance"),
        (lambda: "guide", "guide|model"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout()), "observed, size"),
    ],
)
def test_what_is_no_guide_is_refused(guide, match):
    with pytest.raises(ProgramError, match=match):
        cal.guides.wrap(guide())


def test_a_guide_with_a_layer_in_training_is_refused():
    owner = Owner()
    owner.norm = nn.BatchNorm1d(2)
    with pytest.raises(ProgramError, match=r"call \.eval\(\)"):
        cal.guides.wrap(owner)
    owner.eval()
    assert cal.guides.wrap(owner)


def test_pyro_param_in_a_guide_is_refused_with_the_data():
    def guide(observed, size):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    model = cal.models.from_decoder(decoder(), 2, "gaussian")
    with pytest.raises(ProgramError, match=r"pyro\.param"):
        check_guide(model, cal.guides.wrap(guide), {"x": torch.randn(8, 4)}, {})
