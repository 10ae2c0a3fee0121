"""The optimizer and its learning rate."""

import torch
from torch import nn

from fastmask.config import TrainConfig


def make_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters, in torch's fused form."""
    return torch.optim.AdamW(
        net.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear rise, a constant, and another one while unmasked."""
    if step >= config.masked_steps:
        return config.unmask_lr
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))
