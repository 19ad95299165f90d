"""The density of a Normal whose scale is shared: the numbers of `log_prob`, and its gradients."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Independent

from calibrant.program.normal_density import log_prob

SHAPES = [(), (1, 1, 1), (1, 4, 1), (1, 4, 5), (6, 1, 1, 1), (6, 1, 4, 5)]


def built(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Location, scale of this shape, and value."""
    torch.manual_seed(0)
    loc, value = torch.randn(2, 6, 1, 4, 5)
    return loc.requires_grad_(), (torch.rand(shape) + 0.5).requires_grad_(), value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("events", [0, 1, 3])
def test_numbers_are_equal_and_gradients_agree(shape, events):
    loc, scale, value = built(shape)
    fn = dist.Normal(loc, scale).to_event(events)
    ours, theirs = log_prob(fn, value), fn.log_prob(value)
    assert torch.equal(ours, theirs)
    slopes = [torch.autograd.grad(term.sum(), [loc, scale]) for term in (ours, theirs)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_shared_scale_is_taken_once(monkeypatch):
    """The logarithm is that of one number; a planted change of it shows that this path is taken."""
    loc, scale, value = built(())
    fn, sizes = dist.Normal(loc, scale).to_event(3), list[int]()
    logarithm = torch.Tensor.log
    monkeypatch.setattr(torch.Tensor, "log", lambda self: sizes.append(self.numel()) or logarithm(self))
    log_prob(fn, value)
    assert sizes == [1]


def test_expanded_priors_and_other_distributions():
    value = torch.ones(7, 16)
    for fn in (
        dist.Normal(0.0, 1.0).expand([16]).to_event(1).expand([7]),
        dist.Normal(torch.zeros(16), 2.0).to_event(1).expand([7]),
        dist.Laplace(0.0, 1.0).expand([7, 16]).to_event(1),
        dist.LogNormal(0.0, 1.0).expand([7, 16]).to_event(1),
        dist.Normal(0.0, 1.0).expand([7, 16]).mask(False).to_event(1),
        Independent(torch.distributions.Normal(torch.zeros(7, 16), torch.tensor(2.0)), 1),
    ):
        assert torch.equal(log_prob(fn, value), fn.log_prob(value))


def test_values_outside_the_support_are_refused():
    fn = dist.Normal(torch.zeros(3), torch.tensor(1.0), validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        log_prob(fn, torch.tensor([0.0, torch.nan, 0.0]))


def test_inside_vmap():
    def density(z: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        fn = dist.Normal(z * torch.ones(5), scale, validate_args=False).to_event(1)
        return log_prob(fn, torch.ones(5)) - fn.log_prob(torch.ones(5))

    z, scale = torch.randn(7, 1), torch.rand(7) + 0.5
    for dims in ((0, 0), (0, None)):
        given = scale if dims[1] == 0 else scale[0]
        assert not torch.func.vmap(density, dims)(z, given).any()
