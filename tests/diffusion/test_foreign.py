import pytest
import torch
from plain_dit import SIZES, PlainDiT
from util import small_net

from fastmask import VP, Denoiser, EDMPrecond, RectifiedFlow, load_maskdit
from fastmask.diffusion.foreign import read_source, split_kind
from fastmask.diffusion.weights import save_weights, weights_for
from fastmask.models.foreign.dit import from_dit


@pytest.fixture(scope="module")
def dit():
    return PlainDiT(**SIZES)


def test_a_path_may_name_its_kind():
    assert split_kind("dit:a/b.pt") == ("dit", "a/b.pt")
    assert split_kind("sit:/a:b.pt") == ("sit", "/a:b.pt")
    for source in ("a/b.pt", "vit:a.pt", "dit:", "ditto:a"):
        assert split_kind(source) == (None, source)


@pytest.mark.parametrize(("kind", "process"), [("dit", VP()), ("sit", RectifiedFlow(t_uniform=True))])
def test_a_file_in_whatever_wrapping(tmp_path, dit, kind, process, capsys):
    weights = {f"module._orig_mod.{name}": tensor for name, tensor in dit.state_dict().items()}
    torch.save({"model": weights, "ema": weights, "args": None}, tmp_path / "it.pt")
    net = load_maskdit(f"{kind}:{tmp_path / 'it.pt'}", num_heads=2)
    assert net.process == process
    assert len(net.model.decoder_blocks) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'it.pt'}: the 3 channels of learned variance in its head are dropped" in said
    assert "states no diffusion process" not in said
    same = load_maskdit(tmp_path / "it.pt", num_heads=2, kind=kind).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in net.state_dict().items())
    # A file of fastmask's own states what it is.
    save_weights(tmp_path / "own.safetensors", net)
    again = load_maskdit(tmp_path / "own.safetensors")
    assert again.process == process
    assert all(torch.equal(tensor, same[name]) for name, tensor in again.state_dict().items())


def test_a_dit_and_a_sit_look_alike(tmp_path, dit):
    torch.save(dit.state_dict(), tmp_path / "DiT-XL-2-256x256.pt")
    head, rows = (
        "its head gives 24 numbers for the 12 of a patch",
        "its label table has 6 rows, one of them for no label",
    )
    path = tmp_path / "DiT-XL-2-256x256.pt"
    message = (
        rf"{path}: it is a DiT or a SiT \({head}, {rows}\), .* name it as dit:{path} or sit:{path} \(in Python kind"
    )
    for load in (lambda: load_maskdit(path, num_heads=2), lambda: weights_for(small_net(decoder_depth=0), path)):
        with pytest.raises(ValueError, match=message) as error:
            load()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the given mapping: it is a DiT or a SiT"):
        load_maskdit(dit.state_dict(), num_heads=2)
    unconditional = {name: tensor for name, tensor in dit.state_dict().items() if "y_embedder" not in name}
    with pytest.raises(ValueError, match=rf"it is a DiT or a SiT \({head}\)"):
        load_maskdit(unconditional, num_heads=2)
    assert load_maskdit(unconditional, num_heads=2, kind="dit").model.num_classes == 0


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("it.pt", "vit", "the kind of weights 'vit' is unknown: it is dit or sit"),
        ("sit:it.pt", "dit", r"sit:\S*it\.pt names another kind of weights than dit"),
        ("dit:absent.pt", None, r"absent\.pt does not exist"),
        (
            "dit:maskdit.pt",
            None,
            r"maskdit\.pt cannot be read as weights of a DiT: it has \S+, which a DiT does not have",
        ),
        ("sit:own.safetensors", None, "cannot be read as weights of a SiT: it states its network"),
        ("dit:other.pt", None, "is no MaskDiT: it lacks a usable x_embedder.proj.weight, and holds conv.weight"),
        ("dit:short.pt", None, r"cannot be read as weights of a DiT: pos_embed is missing"),
    ],
)
def test_mistakes(tmp_path, dit, source, kind, message):
    torch.save(dit.state_dict(), tmp_path / "it.pt")
    torch.save(
        {name: tensor for name, tensor in dit.state_dict().items() if name != "pos_embed"}, tmp_path / "short.pt"
    )
    torch.save(small_net().state_dict(), tmp_path / "maskdit.pt")
    torch.save({"conv.weight": torch.ones(2)}, tmp_path / "other.pt")
    save_weights(tmp_path / "own.safetensors", small_net(decoder_depth=0))
    named, _, name = source.rpartition(":")
    with pytest.raises(ValueError, match=message) as error:
        read_source(f"{named}:{tmp_path / name}" if named else tmp_path / name, kind)
    assert "\n" not in str(error.value)


def test_weights_of_a_dit_start_a_run(tmp_path, dit):
    """With the process that it was trained with, or another; with its classes, or others."""
    torch.save(dit.state_dict(), tmp_path / "it.pt")
    exact, _ = from_dit(dit.state_dict())
    model = small_net(decoder_depth=0).model
    dropped = f"{tmp_path / 'it.pt'}: the 3 channels of learned variance in its head are dropped"
    weights, notes = weights_for(Denoiser(model, VP()), tmp_path / "it.pt", "dit")
    assert all(torch.equal(weights[f"model.{name}"], tensor) for name, tensor in exact.items())
    assert len(notes) == 1
    assert notes[0].startswith(dropped)
    _, notes = weights_for(EDMPrecond(model), tmp_path / "it.pt", "dit")
    assert notes[1:] == [f"{tmp_path / 'it.pt'} was trained with VP(), and continues with {EDMPrecond(model).process}"]
    other = Denoiser(small_net(decoder_depth=0, num_classes=7).model, RectifiedFlow(t_uniform=True))
    weights, notes = weights_for(other, tmp_path / "it.pt", "sit")
    assert "model.y_embedder.embedding_table.weight" not in weights
    assert notes[1:] == [f"{tmp_path / 'it.pt'} is for 5 classes: the label table for 7 is freshly initialized"]
