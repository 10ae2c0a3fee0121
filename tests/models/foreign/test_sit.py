import pytest
import torch
from plain_dit import SIZES, PlainDiT

from fastmask import RectifiedFlow, load_maskdit
from fastmask.kernels import unpatchify
from fastmask.models.foreign.sit import from_sit

LABELS = torch.tensor([0, 4, 5, 2, 5])


@pytest.mark.parametrize("sigma", [True, False])
def test_the_velocity_is_that_of_a_sit(sigma):
    """A SiT's time is 1 - t, and its velocity, image - noise, the negative of ours."""
    sit = PlainDiT(**SIZES, sigma=sigma)
    net = load_maskdit(sit.state_dict(), num_heads=2, kind="sit").eval()
    assert net.process == RectifiedFlow(t_uniform=True)
    x, t = torch.randn(5, 3, 8, 8), torch.tensor([0.0, 0.03, 0.4, 0.77, 1.0])
    velocity = unpatchify(net.model(x, t, LABELS), 2, 8, 8)
    exact = sit.double()(x.double(), 1 - t.double(), LABELS)[:, :3]
    torch.testing.assert_close(velocity.double(), -exact, rtol=0, atol=1e-4)
    assert (exact - sit(x.double(), t.double(), LABELS)[:, :3]).abs().max() > 0.05  # the direction of time is seen
    # D = x - t v, with the SiT's own: x + t (image - noise).
    images = x + t[:, None, None, None] * exact
    torch.testing.assert_close(net(x, t, LABELS).double(), images, rtol=0, atol=1e-4)


def test_a_time_embedding_that_cannot_be_turned():
    weights = PlainDiT(**SIZES).state_dict()
    for other in ({}, {"t_embedder.mlp.0.weight": torch.zeros(16, 128)}):
        changed = {name: tensor for name, tensor in weights.items() if name != "t_embedder.mlp.0.weight"} | other
        with pytest.raises(ValueError, match=r"t_embedder\.mlp\.0\.weight is missing, or not of 256 columns"):
            from_sit(changed)
