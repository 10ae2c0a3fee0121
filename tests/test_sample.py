"""Sampling as its users run it."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from util import files_of_at_most, small_net

from fastmask.cli import run_command
from fastmask.convert import main as convert_main
from fastmask.diffusion import Sampling, draw_samples
from fastmask.diffusion.weights import save_weights
from fastmask.evaluate import main as evaluate_main
from fastmask.grid import save_pixels, to_uint8
from fastmask.sample import main as sample_main
from fastmask.training.checkpoint import Checkpointer

SHALLOW = {"depth": 1, "decoder_depth": 0}


@pytest.fixture
def weights(tmp_path):
    save_weights(tmp_path / "weights.safetensors", small_net(**SHALLOW))
    return tmp_path / "weights.safetensors"


def sample(source, out, *flags):
    sample_main([str(source), "--out", str(out), "--sample-steps", "2", "--device", "cpu", *flags])
    if out.suffix == ".npz":
        with np.load(out) as file:
            assert file.files == ["arr_0", "labels"]
            return file["arr_0"], file["labels"]
    return None


def test_an_npz_holds_what_the_sampler_gives(weights, tmp_path):
    samples, labels = sample(weights, tmp_path / "out.npz", "--num-samples", "7", "--seed", "3", "--cfg-scale", "2")
    assert (samples.dtype, samples.shape, labels.dtype) == (np.uint8, (7, 8, 8, 3), np.int64)
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert samples.std() > 10
    exact = draw_samples(
        small_net(**SHALLOW), torch.from_numpy(labels), Sampling(sample_steps=2, cfg_scale=2.0), seed=3
    )
    assert np.array_equal(samples, to_uint8(exact))


def test_a_png_is_a_grid_of_the_same(weights, tmp_path):
    samples, _ = sample(weights, tmp_path / "out.npz", "--num-samples", "10")
    sample(weights, tmp_path / "deep" / "out.png", "--num-samples", "10")
    expected = save_pixels(tmp_path / "expected.png", torch.from_numpy(samples), 5)  # a column per class
    with Image.open(tmp_path / "deep" / "out.png") as image:
        assert np.array_equal(np.asarray(image), expected)


def test_the_seed_decides(weights, tmp_path):
    first, _ = sample(weights, tmp_path / "a.npz", "--num-samples", "3")
    same, _ = sample(weights, tmp_path / "b.npz", "--num-samples", "3", "--seed", "0")
    other, _ = sample(weights, tmp_path / "c.npz", "--num-samples", "3", "--seed", "1")
    assert np.array_equal(first, same)
    assert (first != other).any(axis=(1, 2, 3)).all()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_samples_do_not_depend_on_the_batch_size(weights, tmp_path):
    whole, labels = sample(weights, tmp_path / "a.npz", "--num-samples", "7")
    parts, same = sample(weights, tmp_path / "b.npz", "--num-samples", "7", "--batch-size", "3")
    assert np.array_equal(labels, same)
    # The rounding of matmuls of another size moves a value to the next level, rarely.
    assert np.abs(parts.astype(int) - whole).max() <= 1
    assert (parts != whole).mean() < 0.01


def test_chosen_classes_come_in_turn(weights, tmp_path):
    _, labels = sample(weights, tmp_path / "a.npz", "--num-samples", "5", "--classes", "4", "1")
    assert labels.tolist() == [4, 1, 4, 1, 4]
    samples, _ = sample(weights, tmp_path / "b.npz", "--num-samples", "1", "--classes", "4")
    others, _ = sample(weights, tmp_path / "c.npz", "--num-samples", "1", "--classes", "1")
    assert not np.array_equal(samples, others)


def test_a_network_without_classes(tmp_path):
    save_weights(tmp_path / "weights.safetensors", small_net(num_classes=0, **SHALLOW))
    samples, labels = sample(tmp_path / "weights.safetensors", tmp_path / "a.npz", "--num-samples", "3")
    assert samples.shape == (3, 8, 8, 3)
    assert labels.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="was trained without labels: leave --classes out"):
        sample(tmp_path / "weights.safetensors", tmp_path / "b.npz", "--classes", "0")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of two checkpoints; not to be changed by a test."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    net, ema = small_net(**SHALLOW), small_net(seed=1, **SHALLOW)
    optimizer = torch.optim.AdamW(net.parameters())
    with Checkpointer(run_dir, 9) as checkpointer:
        for step in (1, 2):
            averaged = dict((net if step == 1 else ema).named_parameters())
            checkpointer.save(step, net, averaged, optimizer, {"config": {"ema_decay": 0.9999}, "ema_warmup": True})
    return run_dir


@pytest.fixture
def run_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def of(net, count=2):
    labels = torch.arange(count)
    return to_uint8(draw_samples(net, labels, Sampling(sample_steps=2), seed=0)).numpy()


def assert_drawn(source, out, net, *flags):
    samples, _ = sample(source, out, "--num-samples", "2", *flags)
    assert np.array_equal(samples, of(net))


@pytest.mark.parametrize("source", ["", "checkpoints", "checkpoints/step-00000002"])
def test_a_run_or_its_checkpoint_gives_averaged_or_raw_weights(run_dir, tmp_path, source):
    ema, raw = small_net(seed=1, **SHALLOW), small_net(**SHALLOW)
    assert_drawn(run_dir / source, tmp_path / "a.npz", ema)
    assert_drawn(run_dir / source, tmp_path / "b.npz", ema, "--weights", "ema")
    assert_drawn(run_dir / source, tmp_path / "c.npz", raw, "--weights", "raw")
    assert not np.array_equal(of(ema), of(raw))


def test_a_damaged_newest_checkpoint_is_passed_over(run_dir, tmp_path, capsys):
    before, folder = (run_dir / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    content = bytearray((folder / "ema.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "ema.safetensors").write_bytes(content)
    assert_drawn(run_dir, tmp_path / "a.npz", small_net(**SHALLOW))
    damage = "ema.safetensors differs from its checksum in SHA256SUMS"
    assert capsys.readouterr().out.splitlines()[0] == f"{folder} is damaged ({damage}): taking {before}"
    with pytest.raises(ValueError, match=r"is damaged .*: name .* for the newest that is whole"):
        sample(folder, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()


def test_an_average_of_a_short_run_is_said(tmp_path, capsys):
    net = small_net(**SHALLOW)
    with Checkpointer(tmp_path / "run", 9) as checkpointer:
        state = {"config": {"ema_decay": 0.9999}}
        checkpointer.save(40, net, {}, torch.optim.AdamW(net.parameters()), state)
    sample(tmp_path / "run", tmp_path / "a.npz", "--num-samples", "1")
    said = "ema.safetensors still holds 100% of the weights that the run began with: the raw ones"
    assert said in capsys.readouterr().out
    sample(tmp_path / "run", tmp_path / "a.npz", "--num-samples", "1", "--weights", "raw")
    assert said not in capsys.readouterr().out


def test_without_labels(weights, tmp_path):
    samples, labels = sample(weights, tmp_path / "a.npz", "--num-samples", "3", "--unconditional")
    assert labels.tolist() == [5, 5, 5]
    exact = draw_samples(small_net(**SHALLOW), torch.full((3,), 5), Sampling(sample_steps=2, cfg_scale=1), seed=0)
    assert np.array_equal(samples, to_uint8(exact))
    with pytest.raises(ValueError, match="guidance goes by labels, and these samples have none: leave --cfg-scale"):
        sample(weights, tmp_path / "b.npz", "--unconditional", "--cfg-scale", "2")


def test_solver_and_guidance_of_the_command_line(weights, tmp_path):
    flags = ["--solver", "dpmpp-2m", "--guidance-interval", "0.1", "2", "--cfg-scale", "3"]
    samples, _ = sample(weights, tmp_path / "a.npz", "--num-samples", "3", *flags)
    chosen = Sampling(sample_steps=2, solver="dpmpp-2m", cfg_scale=3, guidance_interval=(0.1, 2))
    assert np.array_equal(
        samples, to_uint8(draw_samples(small_net(**SHALLOW), torch.tensor([0, 1, 2]), chosen, seed=0))
    )
    churned, _ = sample(weights, tmp_path / "b.npz", "--num-samples", "3", "--churn", "2")
    plain, _ = sample(weights, tmp_path / "c.npz", "--num-samples", "3")
    assert (churned != plain).any()


def test_another_model_guides(weights, tmp_path):
    save_weights(tmp_path / "weak.safetensors", small_net(seed=1, **SHALLOW))
    guide = ["--guide", str(tmp_path / "weak.safetensors"), "--num-samples", "2"]
    nets = [small_net(seed=seed, **SHALLOW) for seed in (0, 1)]
    for flags, label in (([], [0, 1]), (["--unconditional"], [5, 5])):
        samples, _ = sample(weights, tmp_path / "a.npz", "--cfg-scale", "2", *guide, *flags)
        chosen = Sampling(sample_steps=2, cfg_scale=2)
        exact = draw_samples(nets[0], torch.tensor(label), chosen, seed=0, guide=nets[1])
        assert np.array_equal(samples, to_uint8(exact))
    with pytest.raises(ValueError, match="a guide needs guidance: give a --cfg-scale other than 1, or leave --guide"):
        sample(weights, tmp_path / "b.npz", "--cfg-scale", "1", *guide)
    save_weights(tmp_path / "weak.safetensors", small_net(num_classes=4, **SHALLOW))
    with pytest.raises(ValueError, match="the guide knows 4 classes, and the network 5"):
        sample(weights, tmp_path / "b.npz", *guide)


def test_heads_of_a_file_that_does_not_state_them(tmp_path):
    torch.save(small_net(**SHALLOW).state_dict(), tmp_path / "weights.pt")
    exact, _ = sample(tmp_path / "weights.pt", tmp_path / "a.npz", "--num-samples", "2", "--num-heads", "2")
    other, _ = sample(tmp_path / "weights.pt", tmp_path / "b.npz", "--num-samples", "2", "--num-heads", "4")
    assert not np.array_equal(exact, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "6"], r"--classes 6: the classes are 0 \.\. 4, and --unconditional draws without any"),
        (["--classes", "5"], r"--classes 5: the classes are 0 \.\. 4, and --unconditional"),  # which means none
        (["--classes", "7", "0", "-1", "7"], r"--classes -1 7: the classes are 0 \.\. 4"),
        (["--classes", "1", "--unconditional"], "--unconditional draws without labels: leave --classes out"),
        (["--cfg-scale", "nan"], "--cfg-scale must be a number of at least 0, not nan"),
        (["--cfg-scale", "-3"], "--cfg-scale must be a number of at least 0, not -3.0"),
        (["--cfg-scale", "inf"], "--cfg-scale must be a number of at least 0, not inf"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--weights", "average"], "--weights"),
        (["--num-samples", "0"], "--num-samples and --batch-size must be at least 1"),
        (["--batch-size", "0"], "--num-samples and --batch-size must be at least 1"),
        (["--sample-steps", "1"], "--sample-steps must be at least 2, not 1"),
        (["--num-steps", "9"], "--num-steps is called --sample-steps now"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--out", "samples.gif"], r"--out samples\.gif: samples are written as \.png, \.npz, or into a folder"),
        (["--out", "docs"], r"--out docs exists already: name another folder, or delete it"),
        (["--latents"], r"--latents: latents are written as \.npz, and --out is "),
        (["--strip", "a.gif"], r"--strip a\.gif: the denoising is drawn as \.png"),
        (
            ["--classes", "gold fish"],
            r"--classes gold fish: .*weights\.safetensors records no names of classes: give num",
        ),
        (["--guidance-interval", "2", "1"], "--guidance-interval must be two noise levels"),
        (["--guide", "no/run"], "no/run does not exist"),
        (["--precision", "fp8"], "--precision"),
        (["--cfgscale", "2"], "did you mean --cfg-scale"),
    ],
    ids=" ".join,
)
def test_mistakes(weights, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        sample(weights, tmp_path / "out.png", *flags)
    assert sorted(tmp_path.iterdir()) == [weights]


def test_sources_that_hold_no_network(tmp_path):
    (tmp_path / "file.npy").write_bytes(b"x")
    for source, message in [
        (tmp_path, r"holds no weights but file\.npy: name a run folder, one of its checkpoints/step-N, or a"),
        (tmp_path / "absent", rf"absent does not exist, and {tmp_path} holds file\.npy: name a run folder"),
        (tmp_path / "file.npy", r"weights are read from \.safetensors, \.pt, "),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_main([str(source)])


def test_what_it_says(weights, tmp_path, capsys):
    sample(weights, tmp_path / "a.png", "--num-samples", "2")
    assert capsys.readouterr() == (f"2 samples: {tmp_path / 'a.png'}\n", "")


@pytest.mark.parametrize("command", [evaluate_main, convert_main])
def test_several_processes_are_refused(monkeypatch, tmp_path, command):
    """Each would do all of the work, and write the same file."""
    for rank in "01":
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        flags = ["--posthoc-ema", "0.05"] if command is convert_main else []
        with pytest.raises(ValueError, match=r"fastmask\.\w+ works in one process, and 2 were started: start it"):
            command([str(tmp_path), *flags])


def test_what_drawing_needs_is_looked_for_before_the_work(monkeypatch, weights, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("fastmask.sample.load", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"a\.png: drawing images needs pillow: pip install pillow, or name an \.npz"):
        sample(weights, tmp_path / "a.png")


def test_where_nothing_can_be_written_is_refused_before_the_work(monkeypatch, weights, tmp_path):
    monkeypatch.setattr("fastmask.sample.load", lambda *args, **kwargs: pytest.fail("loaded"))
    for out, flags in ((weights / "a.png", ()), (tmp_path / "a.npz", ("--strip", str(weights / "a.png")))):
        with pytest.raises(ValueError, match=rf"--(out|strip) .*: {weights} is a file: name a file in a folder"):
            sample(weights, out, *flags)


@pytest.mark.parametrize("name", ["a.png", "a.npz", "folder"])
def test_a_full_disk_is_one_line(weights, tmp_path, name, monkeypatch, capfd):
    flags = ["--out", str(tmp_path / name), "--num-samples", "16", "--sample-steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sample", str(weights), *flags])
    with pytest.raises(SystemExit) as stop, files_of_at_most(300):  # room for the line
        run_command("fastmask.sample", sample_main)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fastmask.sample: error: [Errno 27] File too large: '{tmp_path / name}.parts/")
    assert sorted(tmp_path.iterdir()) == [tmp_path / f"{name}.parts", weights]
    sample_main([str(weights), *flags])  # with room, the same command ends
    assert sorted(tmp_path.iterdir()) == [tmp_path / name, weights]


def test_a_mistake_is_code_2():
    command = [sys.executable, "-m", "fastmask.sample", "x", "--out", "a.gif"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastmask.sample: error: --out a.gif: samples are written as .png, .npz, or into a folder")
