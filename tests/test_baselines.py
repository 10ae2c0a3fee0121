"""The baselines compute the published numbers, so that what they are compared with is the same work."""

import pytest
import torch
from util import golden

from bench.baselines.plain import PlainDiT, PlainLoss, PlainTrainer
from fastmask.testing import assert_near, network_steps


def golden_loss():
    config = golden().info["config"]
    names = {"hidden_size": "width", "decoder_hidden_size": "decoder_width"}
    model = PlainDiT(**{names.get(name, name): value for name, value in config.items()})
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in golden().weights.items()})
    return PlainLoss(model, golden().info["mae_coef"])


def check_golden():
    """Raise an AssertionError unless the baseline computes the published losses."""
    loss = golden_loss()
    assert_near(loss(*inputs(), *masks()), golden().arrays["total_loss"], 2 * network_steps(11))
    assert_near(loss(*inputs()), golden().arrays["full_loss"], 2 * network_steps(11))


def inputs():
    arrays, info = golden().arrays, golden().info
    labels = arrays["labels"].clone()
    labels[info["dropped_label_samples"]] = info["config"]["num_classes"]
    return arrays["images"], labels, arrays["sigma"], arrays["noise"]


def masks():
    return golden().arrays["ids_keep"].long(), golden().arrays["ids_restore"].long()


def test_masked_and_full_loss():
    check_golden()


def test_every_gradient_norm():
    loss = golden_loss()
    parameters = {f"model.{name}": p for name, p in loss.model.named_parameters()}
    grads = torch.autograd.grad(loss(*inputs(), *masks()).mean(), parameters.values())
    for (name, norm), grad in zip(
        sorted(golden().info["grad_norms"].items()), sorted_by(parameters, grads), strict=True
    ):
        assert_near(grad.norm(), torch.tensor(norm), 2 * network_steps(11, backward=True), name=name)


def sorted_by(parameters, grads):
    return [grad for _, grad in sorted(zip(parameters, grads, strict=True), key=lambda item: item[0])]


def test_a_dense_network_is_one_without_a_decoder():
    torch.manual_seed(0)
    model = PlainDiT(8, 2, 3, 16, 2, 2, 5, decoder_depth=0)
    assert PlainLoss(model)(
        torch.randn(2, 3, 8, 8), torch.tensor([0, 5]), torch.ones(2), torch.randn(2, 3, 8, 8)
    ).shape == (2,)


@pytest.mark.parametrize("keep", [None, 8])
def test_training_moves_the_weights_and_their_average(keep):
    torch.manual_seed(0)
    trainer = PlainTrainer(PlainLoss(PlainDiT(8, 2, 3, 16, 1, 2, 5, 12, 1, 3)), lr=1e-2, ema_decay=0.9)
    before = trainer.loss.model.final_layer.linear.weight.clone()
    losses = [trainer.step(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64), keep) for _ in range(30)]
    after = trainer.loss.model.final_layer.linear.weight
    average = trainer.ema.final_layer.linear.weight
    assert not torch.equal(after, before)
    assert 0 < (average - before).norm() < (after - before).norm() * 1.5
    assert torch.stack(losses[-5:]).mean() < 0.9 * torch.stack(losses[:5]).mean()
