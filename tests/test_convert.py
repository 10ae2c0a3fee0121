"""Post-hoc EMA as its users run it: a run that keeps snapshots, and the average that was not tracked."""

import contextlib
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_train import run, weights
from util import files_of_at_most

from fastmask import EDMPrecond, MaskDiT, load_maskdit
from fastmask.cli import run_command
from fastmask.convert import main
from fastmask.diffusion.weights import save_weights
from fastmask.rundir import checkpoints, snapshots

WIDTHS = ["--ema-widths", "0.05", "0.1", "--checkpoint-every", "1000", "--snapshot-every", "4"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    # The third width is there to compare with: its snapshots are put away.
    run(folder, *WIDTHS[:3], "0.07", *WIDTHS[3:], "--lr", "1e-2", steps=40, unmask=0)
    for snapshot in snapshots(folder):
        if snapshot.width == 0.07 and snapshot.step < 40:
            snapshot.path.unlink()
    tracked = next(s.path for s in snapshots(folder) if s.width == 0.07)
    tracked.rename(folder / "tracked.safetensors")
    return folder


def test_the_average_equals_the_one_that_was_tracked(run_dir, tmp_path, capsys):
    assert [(s.step, s.width) for s in snapshots(run_dir)] == [(s, w) for s in range(4, 41, 4) for w in (0.05, 0.1)]
    out = tmp_path / "made.safetensors"
    main([str(run_dir), "--posthoc-ema", "0.07", "--out", str(out)])
    assert "an average of relative width 0.07 at step 40, from 20 snapshots" in capsys.readouterr().out
    made, tracked = load_file(out), load_file(run_dir / "tracked.safetensors")
    newest = load_file(next(s.path for s in reversed(snapshots(run_dir)) if s.width == 0.05))
    assert made.keys() == tracked.keys()
    distance = [sum(float((a[k].double() - tracked[k]).square().sum()) for k in made) ** 0.5 for a in (made, newest)]
    assert distance[0] < 0.1 * distance[1]
    assert torch.equal(made["model.pos_embed"], weights(run_dir)["model.pos_embed"])
    assert len(load_maskdit(out).model.blocks) == 1


def test_an_earlier_step_takes_the_snapshots_before_it(run_dir, tmp_path, capsys):
    main([str(run_dir), "--posthoc-ema", "0.1", "--step", "20", "--out", str(tmp_path / "a.safetensors")])
    assert "at step 20, from 10 snapshots" in capsys.readouterr().out
    made = load_file(tmp_path / "a.safetensors")
    stored = load_file(next(s.path for s in snapshots(run_dir) if (s.step, s.width) == (20, 0.1)))
    for name, tensor in stored.items():
        torch.testing.assert_close(made[name], tensor.float(), rtol=1e-5, atol=1e-5)


def test_what_snapshots_miss_is_said(run_dir, tmp_path, capsys):
    few = tmp_path / "few"
    (few / "snapshots").mkdir(parents=True)
    shutil.copy(snapshots(run_dir)[-1].path, few / "snapshots")
    main([str(few), "--posthoc-ema", "0.02"])
    said = capsys.readouterr().out
    assert "the snapshots miss" in said
    assert (few / "ema-0.02.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--posthoc-ema", "0.4"], r"above 0 and at most 0\.2887, not 0\.4"),
        (
            ["--posthoc-ema", "0.05", "--out", "a.npz"],
            r"--out a\.npz: weights are written as \.safetensors or \.pt, or",
        ),
        (["--posthoc-ema", "0.05", "--kind", "dit"], "leave --kind and --weights out"),
        (
            ["--posthoc-ema", "0.05", "--vae", "a/b"],
            "--vae belongs to a folder for diffusers: give --out a name without",
        ),
        (["--out", "a.pt", "--push-to-hub", "me/it"], "--push-to-hub belongs to a folder for diffusers"),
        (["--out", "a.pt", "--step", "3"], "--step belongs to --posthoc-ema: name the checkpoint of that step instead"),
        ([], r"name the output: --out X\.safetensors, X\.pt, or a folder for diffusers"),
        (["--posthoc-ema", "0.05", "--step", "3"], "the first snapshot of .* is of step 4"),
    ],
)
def test_mistakes(run_dir, flags, message):
    with pytest.raises(ValueError, match=message):
        main([str(run_dir), *flags])


def test_a_run_without_snapshots(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no snapshots but checkpoints: train with --ema-widths"):
        main([str(tmp_path), "--posthoc-ema", "0.05"])


def test_what_names_a_run_by_a_part_of_it_also_names_the_step(run_dir, tmp_path, capsys):
    out = str(tmp_path / "made.safetensors")
    for source, step in [
        (run_dir, 40),
        (run_dir / "checkpoints", 40),
        (run_dir / "snapshots", 40),
        (checkpoints(run_dir)[-1], 40),
        (snapshots(run_dir)[6].path, 16),
    ]:
        main([str(source), "--posthoc-ema", "0.07", "--out", out])
        assert f"of relative width 0.07 at step {step}, from " in capsys.readouterr().out
    shutil.copytree(run_dir, tmp_path / "run")
    checkpoints(tmp_path / "run")[-1].rename(tmp_path / "run" / "checkpoints" / "step-00000020")
    main([str(tmp_path / "run" / "checkpoints" / "step-00000020"), "--posthoc-ema", "0.07"])
    assert "at step 20, from 10 snapshots" in capsys.readouterr().out
    assert (tmp_path / "run" / "ema-0.07.safetensors").exists()
    with pytest.raises(ValueError, match=r"made\.safetensors does not lie in the folder of a run, whose snapshots are"):
        main([out, "--posthoc-ema", "0.07"])


@pytest.mark.parametrize("at", [0.02, 0.3, 0.6, 0.999])
def test_a_flipped_bit_of_a_snapshot_is_found(run_dir, tmp_path, at):
    shutil.copytree(run_dir / "snapshots", tmp_path / "snapshots")
    bad = snapshots(tmp_path)[3].path
    content = bytearray(bad.read_bytes())
    content[int(at * len(content))] ^= 1
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{bad.name} (is damaged|cannot be read as weights): "):
        main([str(tmp_path), "--posthoc-ema", "0.05"])
    assert not (tmp_path / "ema-0.05.safetensors").exists()


def test_a_snapshot_that_is_cut_off_or_of_another_network(run_dir, tmp_path):
    shutil.copytree(run_dir / "snapshots", tmp_path / "snapshots")
    bad = snapshots(tmp_path)[3].path
    content = bad.read_bytes()
    bad.write_bytes(content[:500])
    with pytest.raises(ValueError, match=rf"{bad.name} cannot be read as weights: "):
        main([str(tmp_path), "--posthoc-ema", "0.05"])
    net = load_maskdit(snapshots(run_dir)[-1].path)
    sizes = {"num_heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    small = EDMPrecond(MaskDiT(8, 2, 1, width=16, depth=1, num_classes=3, **sizes))
    assert net.state_dict().keys() == small.state_dict().keys()
    save_weights(bad, small)
    with pytest.raises(
        ValueError, match=rf"{bad.name} is for 3 classes: .* is freshly initialized, and the newest one is not"
    ):
        main([str(tmp_path), "--posthoc-ema", "0.05"])


@pytest.mark.parametrize("cause", ["full", "a folder", "no folder"])
def test_a_target_that_cannot_be_written_is_one_line(run_dir, tmp_path, cause, monkeypatch, capfd):
    out = tmp_path / "a.safetensors"
    if cause == "a folder":
        out.mkdir()
    elif cause == "no folder":
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "a.safetensors"
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["convert", str(run_dir), "--posthoc-ema", "0.07", "--out", str(out)])
    full = files_of_at_most(5000) if cause == "full" else contextlib.nullcontext()
    with pytest.raises(SystemExit) as stop, full:
        run_command("fastmask.convert", main)
    printed, said = capfd.readouterr()
    assert (stop.value.code, printed, len(said.splitlines())) == (2, "", 1), said
    assert f"fastmask.convert: error: --out {out} cannot be written: " in said
    assert sorted(tmp_path.iterdir()) == before


def test_profiles_go_on_with_the_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*WIDTHS[:3], "--checkpoint-every", "2", "--keep-checkpoints", "9"]
    run(whole, *flags, steps=6)
    shutil.copytree(whole, cut)
    for folder in (cut / "checkpoints").glob("step-*"):
        if folder.name > "step-00000002":
            shutil.rmtree(folder)
    shutil.rmtree(cut / "snapshots")
    run(cut, *flags, steps=6)
    for snapshot in snapshots(cut):
        other = load_file(whole / "snapshots" / snapshot.path.name)
        assert all(torch.equal(tensor, other[name]) for name, tensor in load_file(snapshot.path).items())
    assert [s.step for s in snapshots(cut)] == [4, 4, 6, 6]
