"""Sampling as its users run it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from util import small_net

from fastmask.checkpoint import Checkpointer
from fastmask.diffusion import draw_samples
from fastmask.report import save_grid
from fastmask.sample import load_net, main
from fastmask.weights import save_weights

SHALLOW = {"depth": 1, "decoder_depth": 0}


@pytest.fixture
def weights(tmp_path):
    save_weights(tmp_path / "weights.safetensors", small_net(**SHALLOW))
    return tmp_path / "weights.safetensors"


def sample(source, out, *flags):
    main([str(source), "--out", str(out), "--num-steps", "2", "--device", "cpu", *flags])
    if out.suffix == ".npz":
        with np.load(out) as file:
            assert file.files == ["samples", "labels"]
            return file["samples"], file["labels"]
    return None


def test_an_npz_holds_what_the_sampler_gives(weights, tmp_path):
    samples, labels = sample(weights, tmp_path / "out.npz", "--num-samples", "7", "--seed", "3", "--cfg-scale", "2")
    assert samples.dtype == np.float32
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    exact = draw_samples(small_net(**SHALLOW), torch.from_numpy(labels), seed=3, num_steps=2, cfg_scale=2.0)
    np.testing.assert_allclose(samples, exact.numpy(), rtol=1e-4, atol=1e-4)


def test_a_png_is_a_grid_of_the_same(weights, tmp_path):
    samples, _ = sample(weights, tmp_path / "out.npz", "--num-samples", "10")
    sample(weights, tmp_path / "deep" / "out.png", "--num-samples", "10")
    expected = save_grid(tmp_path / "expected.png", torch.from_numpy(samples), 5)  # a column per class
    with Image.open(tmp_path / "deep" / "out.png") as image:
        assert np.array_equal(np.asarray(image), expected)


def test_the_seed_decides(weights, tmp_path):
    first, _ = sample(weights, tmp_path / "a.npz", "--num-samples", "3")
    same, _ = sample(weights, tmp_path / "b.npz", "--num-samples", "3", "--seed", "0")
    other, _ = sample(weights, tmp_path / "c.npz", "--num-samples", "3", "--seed", "1")
    assert np.array_equal(first, same)
    assert not np.isclose(first, other).any(axis=(1, 2, 3)).all()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_samples_do_not_depend_on_the_batch_size(weights, tmp_path):
    whole, labels = sample(weights, tmp_path / "a.npz", "--num-samples", "7")
    parts, same = sample(weights, tmp_path / "b.npz", "--num-samples", "7", "--batch-size", "3")
    assert np.array_equal(labels, same)
    np.testing.assert_allclose(parts, whole, rtol=1e-3, atol=1e-3)


def test_chosen_classes_come_in_turn(weights, tmp_path):
    _, labels = sample(weights, tmp_path / "a.npz", "--num-samples", "5", "--classes", "4", "1")
    assert labels.tolist() == [4, 1, 4, 1, 4]
    samples, _ = sample(weights, tmp_path / "b.npz", "--num-samples", "1", "--classes", "4")
    others, _ = sample(weights, tmp_path / "c.npz", "--num-samples", "1", "--classes", "1")
    assert not np.array_equal(samples, others)


def test_a_network_without_classes(tmp_path):
    save_weights(tmp_path / "weights.safetensors", small_net(num_classes=0, **SHALLOW))
    samples, labels = sample(tmp_path / "weights.safetensors", tmp_path / "a.npz", "--num-samples", "3")
    assert samples.shape == (3, 3, 8, 8)
    assert np.isfinite(samples).all()
    assert labels.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="was trained without labels: leave --classes out"):
        sample(tmp_path / "weights.safetensors", tmp_path / "b.npz", "--classes", "0")


def test_a_run_gives_its_newest_average(tmp_path):
    net, ema = small_net(), small_net(seed=1)
    optimizer = torch.optim.AdamW(net.parameters())
    with Checkpointer(tmp_path, 9) as checkpointer:
        checkpointer.save(1, net, dict(net.named_parameters()), optimizer, {})
        checkpointer.save(2, net, dict(ema.named_parameters()), optimizer, {})
    loaded = load_net(str(tmp_path))
    assert not loaded.training
    for name, tensor in ema.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_heads_of_a_file_that_does_not_state_them(tmp_path):
    torch.save(small_net(**SHALLOW).state_dict(), tmp_path / "weights.pt")
    exact, _ = sample(tmp_path / "weights.pt", tmp_path / "a.npz", "--num-samples", "2", "--num-heads", "2")
    other, _ = sample(tmp_path / "weights.pt", tmp_path / "b.npz", "--num-samples", "2", "--num-heads", "4")
    assert not np.array_equal(exact, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "6"], r"label 6 is outside 0 \.\. 4"),
        (["--classes", "0", "-1"], r"label -1 is outside 0 \.\. 4"),
        (["--num-samples", "0"], "--num-samples and --batch-size must be at least 1"),
        (["--batch-size", "0"], "--num-samples and --batch-size must be at least 1"),
        (["--num-steps", "1"], "num_steps must be at least 2, not 1"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--out", "samples.gif"], r"--out samples\.gif: samples are written as \.png or \.npz"),
        (["--out", "samples"], r"--out samples: samples are written as \.png or \.npz"),
        (["--cfgscale", "2"], "did you mean --cfg-scale"),
    ],
    ids=" ".join,
)
def test_mistakes(weights, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        sample(weights, tmp_path / "out.png", *flags)
    assert sorted(tmp_path.iterdir()) == [weights]


def test_sources_that_hold_no_network(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"x")
    for source, message in [
        (tmp_path, "holds no checkpoint of a run"),
        (tmp_path / "absent", "absent does not exist: name a run folder, or a .pt or .safetensors file of weights"),
        (tmp_path / "file.bin", r"weights are read from \.pt and \.safetensors files"),
    ]:
        with pytest.raises(ValueError, match=message):
            main([str(source)])


def test_two_channels_are_not_drawn(tmp_path):
    save_weights(tmp_path / "weights.safetensors", small_net(in_channels=2, **SHALLOW))
    with pytest.raises(ValueError, match="images of 2 channels cannot be drawn"):
        sample(tmp_path / "weights.safetensors", tmp_path / "out.png", "--num-samples", "1")


def test_what_it_says(weights, tmp_path, capsys):
    sample(weights, tmp_path / "a.png", "--num-samples", "2")
    assert capsys.readouterr() == (f"2 samples: {tmp_path / 'a.png'}\n", "")


def test_a_mistake_is_code_2():
    command = [sys.executable, "-m", "fastmask.sample", "x", "--out", "a.gif"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastmask.sample: error: --out a.gif: samples are written as .png or .npz\n"
