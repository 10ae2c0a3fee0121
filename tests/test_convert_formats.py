"""Conversion between formats as its users run it: runs, published files, DiT, SiT and folders for diffusers."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from plain_dit import SIZES, PlainDiT
from test_folder import draw_elsewhere
from test_train import run, weights
from util import files_of_at_most, golden, small_net

from fastmask import VP, load_maskdit
from fastmask.cli import run_command
from fastmask.convert import main
from fastmask.diffusion import sample as integrate
from fastmask.sample import main as sample_main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder, "--lr", "1e-2", steps=8, unmask=2)
    (folder / "evaluation.json").write_text(json.dumps({"frechet": 12.5, "protocol": {"samples": 300}}))
    return folder


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


def test_published_ours_published(tmp_path, capsys):
    """Bit for bit, in both formats."""
    torch.save({"ema": golden().weights}, tmp_path / "published.pt")
    heads = ["--num-heads", "4"]
    main([str(tmp_path / "published.pt"), "--out", str(tmp_path / "ours.safetensors"), *heads])
    assert f"{tmp_path / 'ours.safetensors'}: the weights of {tmp_path / 'published.pt'}, with EDM(" in said(capsys)
    main([str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "again.pt")])
    assert_same(torch.load(tmp_path / "again.pt"), golden().weights)
    main([str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "folder")])
    main([str(tmp_path / "folder"), "--out", str(tmp_path / "ours2.safetensors")])
    assert (tmp_path / "ours2.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()


def test_a_run_becomes_a_folder_that_draws_the_same(run_dir, tmp_path, capsys):
    out = tmp_path / "digits"
    main([str(run_dir), "--out", str(out), "--license", "mit"])
    assert f"{out}: the weights of {run_dir / 'checkpoints' / 'step-00000008' / 'ema.safetensors'}, with" in said(
        capsys
    )
    card = (out / "README.md").read_text().splitlines()
    for line in (
        "license: mit",
        "| preset | digits |",
        "| step | 8 |",
        "| frechet | 12.5 |",
        "| protocol.samples | 300 |",
    ):
        assert line in card, line
    assert_same(load_maskdit(out).state_dict(), weights(run_dir, "ema"))
    # The same samples by fastmask's own command, from the run and from the folder.
    for source, name in ((run_dir, "a"), (out, "b")):
        flags = ["--out", str(tmp_path / f"{name}.npz"), "--num-samples", "4", "--sample-steps", "3", "--device", "cpu"]
        sample_main([str(source), *flags])
    arrays = [np.load(tmp_path / f"{name}.npz") for name in "ab"]
    assert all((arrays[0][key] == arrays[1][key]).all() for key in arrays[0].files)
    # And by diffusers, where fastmask is not installed.
    net, noise = load_maskdit(run_dir).eval(), torch.randn(4, 1, 8, 8)
    options = {"alone": True, "latents": noise, "output_type": "latent", "class_labels": [1, 3, 5, 9]}
    drawn = draw_elsewhere(tmp_path, {"it": (str(out), options)})["it"]
    exact = integrate(net, noise, torch.tensor([1, 3, 5, 9]), net.process.times(5), cfg_scale=1.5)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=1e-4)


def test_an_upload_is_asked_for(run_dir, tmp_path, monkeypatch, capsys):
    calls = []
    hub = types.SimpleNamespace(create_repo=lambda name, exist_ok: calls.append(name))
    hub.upload_folder = lambda repo_id, folder_path: calls.append(folder_path) or f"https://hub/{repo_id}"
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    main([str(run_dir), "--out", str(tmp_path / "a")])
    assert calls == []
    main([str(run_dir), "--out", str(tmp_path / "b"), "--push-to-hub", "me/it"])
    assert calls == ["me/it", str(tmp_path / "b")]
    assert said(capsys).endswith("uploaded: https://hub/me/it")


def test_raw_weights_and_a_checkpoint(run_dir, tmp_path):
    main([str(run_dir / "checkpoints"), "--weights", "raw", "--out", str(tmp_path / "a.safetensors")])
    assert_same(load_maskdit(tmp_path / "a.safetensors").state_dict(), weights(run_dir))


@pytest.mark.parametrize("out", ["a.pt", "a.safetensors", "a"])
def test_a_full_disk_is_one_line_and_leaves_nothing(run_dir, tmp_path, out, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["convert", str(run_dir), "--out", str(tmp_path / out)])
    with pytest.raises(SystemExit) as stop, files_of_at_most(5000):
        run_command("fastmask.convert", main)
    lines = capfd.readouterr().err
    assert (stop.value.code, len(lines.splitlines())) == (2, 1), lines
    assert f"--out {tmp_path / out} cannot be written: " in lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [["--kind", "dit"], "dit:"])
def test_a_dit_becomes_a_file_of_ours(tmp_path, how, capsys):
    torch.save(PlainDiT(**SIZES).state_dict(), tmp_path / "it.pt")
    prefix, flags = (how, []) if isinstance(how, str) else ("", how)
    out = tmp_path / "out.safetensors"
    main([f"{prefix}{tmp_path / 'it.pt'}", *flags, "--num-heads", "2", "--out", str(out)])
    assert "3 channels of learned variance in its head are dropped" in said(capsys)
    net = load_maskdit(out)
    assert net.process == VP()
    assert_same(net.state_dict(), load_maskdit(tmp_path / "it.pt", num_heads=2, kind="dit").state_dict())
    sample_main(
        [str(out), "--out", str(tmp_path / "a.npz"), "--num-samples", "2", "--sample-steps", "2", "--device", "cpu"]
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["it.pt", "--out", "a.safetensors"], "it is a DiT or a SiT (its head gives 24 numbers for the 12 of a patch"),
        (
            ["it.pt", "--kind", "dit", "--out", "a.safetensors"],
            "no published size has width 16, so its heads are unknown",
        ),
        (["it.pt", "--kind", "vit", "--out", "a.safetensors"], "invalid choice 'vit'"),
        (["it.pt", "--kind", "dit", "--num-heads", "3", "--out", "a.pt"], "width 16 does not divide into num_heads 3"),
        (
            ["it.pt", "--kind", "dit", "--num-heads", "2", "--out", "a.pt"],
            "a .pt file states no process and is read as",
        ),
        (["dit:it.pt", "--kind", "sit", "--out", "a.pt"], "names another kind of weights than sit"),
        (["other.pt", "--out", "a.pt"], "other.pt is no MaskDiT: it lacks a usable x_embedder.proj.weight"),
        (["whole.pt", "--out", "a.pt"], "of which no code is run: if you trust it, load it by torch.load"),
        (["absent", "--out", "a.pt"], "absent does not exist"),
        (["own.pt", "--num-heads", "2", "--out", "taken"], "exists already: name another folder, or delete it"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_with_code_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    torch.save(PlainDiT(**SIZES).state_dict(), "it.pt")
    torch.save({"conv.weight": torch.ones(2)}, "other.pt")
    torch.save(small_net(), "whole.pt")
    torch.save(small_net(decoder_depth=0).state_dict(), "own.pt")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").touch()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["convert", *argv])
    with pytest.raises(SystemExit) as stop:
        run_command("fastmask.convert", main)
    lines = capsys.readouterr().err
    assert (stop.value.code, len(lines.splitlines())) == (2, 1), lines
    assert message in lines
    assert "\x1b" not in lines
    assert sorted(tmp_path.iterdir()) == before
