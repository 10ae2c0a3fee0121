import pytest
import torch
from plain_dit import SIZES, PlainDiT

from fastmask import VP, load_maskdit
from fastmask.kernels import unpatchify
from fastmask.models.foreign.dit import from_dit, reversed_time, signs_of_dit, without_null_row

LABELS = torch.tensor([0, 4, 5, 2])  # 5 is none


@pytest.mark.parametrize("sigma", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"patch": 4, "channels": 4, "depth": 1}, {"classes": 1}], ids=str)
def test_the_noise_is_that_of_a_dit(sizes, sigma):
    sizes = {**SIZES, **sizes}
    dit = PlainDiT(**sizes, sigma=sigma)
    net = load_maskdit(dit.state_dict(), num_heads=2, kind="dit").eval()
    assert net.process == VP()
    assert net.model.num_classes == sizes["classes"]
    x = torch.randn(4, sizes["channels"], 8, 8)
    labels = LABELS.clamp(max=sizes["classes"])
    t = torch.tensor([0.0, 17.0, 500.0, 999.0])
    raw = unpatchify(net.model(x, t, labels), sizes["patch"], 8, 8)
    exact = dit.double()(x.double(), t.double(), labels)[:, : sizes["channels"]]
    assert_close = torch.testing.assert_close
    assert_close(raw.double(), exact, rtol=0, atol=1e-4)
    assert exact.std() > 0.1
    # As a denoiser at the levels of integer timesteps.
    levels = VP().level_of(t).float()
    a, b = (factor[:, None, None, None] for factor in VP().mix(levels.double()))
    assert_close(net(x, levels, labels) * a, x - b * exact, rtol=0, atol=2e-4)


def test_what_is_left_out_is_noted():
    found, notes = from_dit(PlainDiT(**SIZES).state_dict())
    assert notes == ["the 3 channels of learned variance in its head are dropped: no sampler here uses a variance"]
    assert found["final_layer.linear.weight"].shape == (12, 16)
    weights = PlainDiT(**SIZES, sigma=False).state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    found, notes = from_dit(weights)
    assert notes == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())
    changed = {"y_embedder.embedding_table.weight", "t_embedder.mlp.2.bias"}
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items() if name not in changed)


def test_a_dit_is_known_by_its_head_and_its_table():
    weights = PlainDiT(**SIZES).state_dict()
    head, rows = (
        "its head gives 24 numbers for the 12 of a patch",
        "its label table has 6 rows, one of them for no label",
    )
    assert signs_of_dit(weights) == [head, rows]
    assert signs_of_dit(PlainDiT(**SIZES, sigma=False).state_dict()) == [rows]
    assert signs_of_dit(from_dit(weights)[0]) == []


def test_conditions_without_the_row_for_no_label():
    table, bias = torch.randn(4, 6), torch.randn(6)
    columns, moved = without_null_row(table, bias)
    assert columns.dtype == moved.dtype == torch.float32
    torch.testing.assert_close(columns.t() + moved, table[:-1] + bias)
    torch.testing.assert_close(moved, table[-1] + bias)


def test_a_time_embedding_of_the_reversed_time():
    frequency, t = torch.linspace(0, 2, 9, dtype=torch.float64), torch.linspace(0, 1, 7, dtype=torch.float64)
    weight = torch.randn(5, 18, dtype=torch.float64)

    def features(t):
        angle = t[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], 1)

    made = features(t) @ reversed_time(weight, frequency).double().t()
    torch.testing.assert_close(made, features(1 - t) @ weight.t(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_layer.linear.bias": None}, r"final_layer\.linear\.bias is missing"),
        ({"pos_embed": None}, "pos_embed is missing"),
        ({"mask_token": torch.zeros(1, 1, 8)}, "it has mask_token, which a DiT does not have"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, r"it has blocks\.0\.attn\.q_norm\.weight, which a DiT does"),
        ({"y_embedder.embedding_table.weight": torch.zeros(6, 8)}, r"label table has shape \(6, 8\) instead of"),
        ({"t_embedder.mlp.2.bias": torch.zeros(8)}, r"mlp\.2\.bias or \S+ has another shape than .* a width of 16"),
    ],
    ids=str,
)
def test_what_is_no_dit(change, message):
    weights = {**PlainDiT(**SIZES).state_dict(), **change}
    with pytest.raises(ValueError, match=message):
        from_dit({name: tensor for name, tensor in weights.items() if tensor is not None})


@pytest.mark.parametrize(
    ("sizes", "extra", "message"),
    [
        ({"ratio": 2}, {}, r"blocks\.0\.mlp\.fc1\.bias has shape \(32,\) instead of \(64,\)"),
        ({}, {"blocks.0.norm1.weight": torch.ones(16)}, r"blocks\.0\.norm1\.weight is not part of the network"),
        ({"heads": 2}, {}, None),
    ],
    ids=str,
)
def test_other_architectures_are_refused(sizes, extra, message):
    weights = {**PlainDiT(**{**SIZES, **sizes}).state_dict(), **extra}
    if message is None:
        with pytest.raises(ValueError, match="no published size has width 16, so its heads are unknown"):
            load_maskdit(weights, kind="dit")
        return
    with pytest.raises(ValueError, match=message):
        load_maskdit(weights, num_heads=2, kind="dit")


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_tensors_of_other_shapes_are_refused(kind):
    """Whichever it is."""
    weights = PlainDiT(**SIZES).state_dict()
    for name in weights:
        for tensor in (None, torch.tensor(1.0), torch.ones(3), torch.ones(2, 3, 1)):
            changed = {key: value for key, value in weights.items() if key != name}
            changed |= {} if tensor is None else {name: tensor}
            if (name, tensor) == ("y_embedder.embedding_table.weight", None):
                continue  # a network without classes
            with pytest.raises(ValueError, match="the given mapping") as error:
                load_maskdit(changed, num_heads=2, kind=kind)
            assert "\n" not in str(error.value)
