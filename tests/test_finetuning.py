"""Runs that start from weights of something else: what they take, and the lines that say so."""

import pytest
import torch
from plain_dit import SIZES, PlainDiT
from test_train import SMALL, run, weights

from fastmask.models.foreign.dit import from_dit
from fastmask.models.foreign.sit import from_sit
from fastmask.train import main

DATA = ["--data", "synthetic", "--device", "cpu", "--batch-size", "4", "--micro-batch-size", "4", "--sample-every", "0"]
DENSE = [
    *DATA,
    "--width",
    "16",
    "--depth",
    "2",
    "--num-heads",
    "2",
    "--patch-size",
    "2",
    "--max-steps",
    "1",
    "--lr",
    "0",
]
SMALLER = ["--image-size", "128", "--num-classes", "3"]  # fewer classes, at twice the size
LABELS = "y_embedder.embedding_table.weight"


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("kind", "preset", "convert"), [("dit", "dit-xl2-in256-vp", from_dit), ("sit", "sit-xl2-in256", from_sit)]
)
def test_weights_of_others(tmp_path, kind, preset, convert, capsys):
    """With fewer classes, at twice the size; then from that run, with another process."""
    dit, source = PlainDiT(**{**SIZES, "channels": 4}), tmp_path / "it.pt"
    torch.save({"ema": dit.state_dict()}, source)
    flags = [*SMALLER, "--init", f"{kind}:{source}", "--run-dir", str(tmp_path / "a")]
    main(["--preset", preset, *DENSE, *flags])
    lines = said(capsys)
    assert f"{source}: the 4 channels of learned variance in its head are dropped" in lines
    assert f"{source} is for 5 classes: the label table for 3 is freshly initialized" in lines
    assert f"{source} is for images of 8 x 8: the position tables for 16 x 16 are recomputed" in lines
    exact, found = convert(dit.state_dict())[0], weights(tmp_path / "a")
    count = len(found)
    assert f"--init {kind}:{source}: took {count - 2} of {count} tensors, not pos_embed, {LABELS}" in lines
    for name, tensor in exact.items():
        if name not in (LABELS, "pos_embed"):
            assert torch.equal(found[f"model.{name}"], tensor), name

    other = "sit-xl2-in256" if kind == "dit" else "dit-xl2-in256"
    flags = [*SMALLER, "--init", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b")]
    main(["--preset", other, *DENSE, *flags])
    lines = said(capsys)
    assert "was trained with " in lines
    assert f"--init {tmp_path / 'a'}: took {count} of {count} tensors" in lines
    again = weights(tmp_path / "b")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_from_masked_to_unmasked(tmp_path, capsys):
    run(tmp_path / "a", "--mask-ratio", "0.5", steps=1, unmask=0)
    capsys.readouterr()
    more = ["--mask-ratio", "0", "--lr", "0", "--init", str(tmp_path / "a"), "--max-steps", "1", "--unmask-steps", "0"]
    main(["--run-dir", str(tmp_path / "b"), *SMALL, *more])
    before, after = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert f"--init {tmp_path / 'a'}: took {len(before)} of {len(before)} tensors" in said(capsys)


def test_a_dit_does_not_start_a_network_with_a_decoder(tmp_path):
    torch.save(PlainDiT(**{**SIZES, "channels": 4}).state_dict(), tmp_path / "it.pt")
    flags = ["--decoder-width", "16", "--decoder-depth", "1", "--image-size", "64", "--num-classes", "5"]
    with pytest.raises(ValueError, match=r"it\.pt is of another network: .*decoder_blocks\S+ is missing"):
        main([*DENSE, *flags, "--init", f"dit:{tmp_path / 'it.pt'}", "--run-dir", str(tmp_path / "a")])
