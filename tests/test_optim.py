import dataclasses

import pytest

from fastmask.config import TrainConfig
from fastmask.optim import learning_rate


def test_learning_rate_rises_then_stays_then_drops_for_the_unmasked_stage():
    config = dataclasses.replace(TrainConfig(), lr=1.0, warmup_steps=4, max_steps=10, unmask_steps=3, unmask_lr=0.1)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.1, 0.1, 0.1])


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(dataclasses.replace(TrainConfig(), lr=0.3), 0) == 0.3
