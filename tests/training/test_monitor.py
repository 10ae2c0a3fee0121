"""What a run watches: sums of losses, leaps, and norms."""

import pytest
import torch
from util import small_net

from fastmask.ranks import Ranks
from fastmask.training.monitor import DivergedError, Tally, check_spike, gradient_norm, update_ratio

ALONE = Ranks()
NAMES = ("loss", "denoising", "reconstruction")


def losses(*parts):
    return dict(zip(NAMES, parts, strict=True))


def empty_tally():
    return Tally(torch.device("cpu"), NAMES)


def tally_of(*batches, size=3):
    """Add up batches of total losses, each from the sample on that its number times ``size`` says."""
    tally = empty_tally()
    for number, total in enumerate(batches):
        total = torch.tensor(total)
        tally.add(torch.tensor(number * size), losses(total, total / 2, total / 4), torch.arange(0.0, len(total)))
    return tally


def test_means_are_per_image_and_by_noise_level():
    tally = tally_of([1.0, 2.0, 3.0], [10.0])  # log-SNR 0, 1, 2 and 0
    taken = tally.take(ALONE)
    assert taken["loss"], taken["denoising"] == (4.0, 2.0)
    assert taken["reconstruction"] == 1.0
    levels = {name: value for name, value in taken.items() if name.startswith("loss_at_log_snr/")}
    assert levels == {
        "loss_at_log_snr/-2.0..0.0": 5.5,
        "loss_at_log_snr/0.0..2.0": 2.5,
    }
    tally.add(torch.tensor(9), losses(*torch.tensor([[6.0], [5.0], [4.0]])), torch.full((1,), 9.0))
    taken = tally.take(ALONE)
    assert taken == {"loss": 6.0, "denoising": 5.0, "reconstruction": 4.0, "loss_at_log_snr/6.0..inf": 6.0}


def test_low_precision_losses_are_summed_in_fp32():
    tally = empty_tally()
    parts = losses(*(torch.full((1000,), 300.0, dtype=torch.float16) for _ in range(3)))
    tally.add(torch.tensor(0), parts, torch.ones(1000))
    assert tally.take(ALONE)["loss"] == 300


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_batch_that_is_not_finite_is_named(bad):
    tally = tally_of([1.0, 2.0, 3.0], [1.0, bad, 3.0], [1.0, 1.0, 1.0], [bad] * 3)
    with pytest.raises(DivergedError, match=r"batch from sample 3 on is not finite \(its log-SNR: 0 to 2\)"):
        tally.take(ALONE)


def test_finite_losses_pass():
    tally_of([1e30], [0.0]).check_finite(ALONE)


def test_sums_are_changed_in_place_alone():
    """A CUDA graph that holds `add` sees nothing else."""
    tally = empty_tally()
    before = [id(value) for value in vars(tally).values()]
    tally.add(torch.tensor(0), losses(*torch.ones(3, 4)), torch.ones(4))
    tally.take(ALONE)
    assert [id(value) for value in vars(tally).values()] == before


@pytest.mark.parametrize(
    ("loss", "before", "factor", "limit", "message"),
    [
        (2.1, [1.0, 1.0, 1.0], 2.0, 100.0, "rose to 2.1, more than 2 times the 1 before"),
        (1.9, [1.0, 1.0, 1.0], 2.0, 100.0, ""),
        (9.0, [1.0], 2.0, 100.0, "rose to 9, more than 2 times the 1 before"),  # from the second report on
        (9.0, [], 2.0, 100.0, ""),
        (9.0, [1.0, 1.0, 1.0], 0.0, 100.0, ""),
        (4.0, [1.0, 3.0, 3.0, 9.0], 2.0, 100.0, ""),  # the median, not the mean or the least
        (101.0, [], 2.0, 100.0, "the loss is 101, above --loss-limit 100"),  # at the first report too
        (101.0, [90.0], 2.0, 0.0, ""),
    ],
)
def test_a_loss_spike(loss, before, factor, limit, message):
    if message:
        with pytest.raises(DivergedError, match=message):
            check_spike(loss, before, factor, limit)
    else:
        check_spike(loss, before, factor, limit)


def test_the_mean_loss_can_be_seen_without_starting_anew():
    tally = tally_of([1.0, 2.0, 3.0], [10.0])
    assert tally.mean_loss(ALONE) == 4.0
    assert tally.take(ALONE)["loss"] == 4.0


def test_norms():
    net = small_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    for step in range(3):
        for p in net.parameters():
            p.grad = torch.randn_like(p) * (step + 1)
        last = torch.cat([p.detach().flatten() for p in net.parameters()])
        optimizer.step()
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert gradient_norm(net) == pytest.approx(gradients.norm().item(), rel=1e-5)
    assert update_ratio(net, optimizer) == pytest.approx(((after - last).norm() / after.norm()).item(), rel=1e-3)
    assert not torch.equal(before, after)


def test_norms_before_any_step():
    net = small_net()
    assert gradient_norm(net) == 0
    assert update_ratio(net, torch.optim.AdamW(net.parameters())) == 0
