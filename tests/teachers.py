"""Teachers for tests: image networks with random weights, always the same."""

import torch
from torch import nn


class Small(nn.Module):
    """A network with patches of 3 x 3 pixels and a class token, whose features depend on the position."""

    patch_size, mean, std = 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

    def __init__(self, width=24):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.patches = nn.Conv2d(3, width, self.patch_size, self.patch_size)
            self.mixed = nn.Linear(width, width)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        place = torch.linspace(0, 1, tokens.shape[1], device=x.device)[:, None]
        return self.mixed(torch.tanh(tokens + place))


def small():
    return Small()


class Blind(Small):
    """One that always has the same grid."""

    def forward(self, x):
        return super().forward(x[..., :6, :6])


def blind():
    return Blind()


class Broken(Small):
    """One whose features are not finite."""

    def forward(self, x):
        return super().forward(x) * torch.nan


def broken():
    return Broken()
