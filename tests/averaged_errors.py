"""A variational autoencoder of 8 × 8 digits in plain torch, trained with its error summed or averaged over pixels."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import calibrant as cal
from calibrant.program.environment import seeded

LATENTS, PIXELS = 4, 64


def digits() -> Tensor:
    """Grey values from 0 to 16, with mean zero."""
    x = torch.as_tensor(load_digits().data, dtype=torch.float32)
    return x - x.mean(0)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(PIXELS, LATENTS)
        self.log_sd = nn.Parameter(torch.full((LATENTS,), -1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(x)
        return mean, self.log_sd.exp().expand_as(mean)


REDUCTIONS = {  # loss of a minibatch: error (data, pixels), divergence (data, latents)
    "mse.mean() + kl.sum(1).mean()": lambda error, kl: error.mean() + kl.sum(1).mean(),
    "(mse / 2).mean() + kl.sum(1).mean()": lambda error, kl: 0.5 * error.mean() + kl.sum(1).mean(),
    "mse.mean() + kl.mean()": lambda error, kl: error.mean() + kl.mean(),
}


def train(loss, steps: int = 500, lr: float = 3e-2) -> tuple[nn.Module, Encoder]:
    x = digits()
    with seeded(0):
        decoder, encoder = nn.Linear(LATENTS, PIXELS), Encoder()
        adam = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            mean, sd = encoder(x)
            z = mean + sd * torch.randn_like(sd)
            kl = 0.5 * (mean**2 + sd**2 - 1) - sd.log()
            adam.zero_grad()
            loss((decoder(z) - x) ** 2, kl).backward()
            adam.step()
            decay.step()
    return decoder, encoder


def wrapped(decoder: nn.Module, encoder: Encoder, scale: float):
    """The two as a program with a Gaussian of this scale, and its guide."""
    model = cal.models.from_decoder(decoder, LATENTS, {"name": "gaussian", "scale": scale, "learn": False})
    return model, cal.guides.from_encoder(encoder)
