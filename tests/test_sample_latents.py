"""From images to a VAE's latents, a run on them, and back to images, as users do it."""

import csv
import json
import os
import signal
import zipfile

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from util import small_net
from vaes import small_vae

from fastmask.data.vae import Autoencoder
from fastmask.diffusion import LatentSpace, Origin, Sampling, draw_samples
from fastmask.diffusion.weights import load_maskdit, save_weights
from fastmask.generation.decoding import Pictures
from fastmask.generation.outputs import Output
from fastmask.grid import save_pixels, to_uint8
from fastmask.prepare import main as prepare
from fastmask.sample import main
from fastmask.train import main as train
from fastmask.training.checkpoint import checkpoints

CPU = torch.device("cpu")
SMALL = ["--width", "16", "--depth", "1", "--num-heads", "2", "--decoder-width", "16", "--decoder-depth", "1"]
SMALL += ["--decoder-num-heads", "2", "--batch-size", "4", "--device", "cpu", "--max-steps", "2", "--lr", "1e-2"]
SMALL += ["--unmask-steps", "0", "--sample-every", "2", "--sample-steps", "2", "--image-size", "32"]
CHANNELS = 16  # other than those of pixels, and than those that are usual


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on latents of a VAE, with classes of two names, and the VAE; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("latents")
    means, deviations = [0.1] * CHANNELS, [1.0, 2.0] * (CHANNELS // 2)
    vae = small_vae(latent_channels=CHANNELS, latents_mean=means, latents_std=deviations)
    vae.save_pretrained(folder / "vae")
    for i in range(6):
        path = folder / "images" / ("black cat", "dog, hound")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    flags = ["--image-size", "32", "--num-workers", "0", "--device", "cpu", "--vae", str(folder / "vae")]
    prepare([str(folder / "images"), str(folder / "store"), *flags])
    train(["--run-dir", str(folder / "run"), "--data", str(folder / "store"), *SMALL])
    return folder


def draw(trained, out, *flags, count=7):
    main([str(trained / "run"), "--out", str(out), "--sample-steps", "2", "--num-samples", str(count), *flags])


def decoded(trained, count=7, labels=None):
    """Return the images that must be drawn, of one batch."""
    net, vae = load_maskdit(trained / "run"), Autoencoder(str(trained / "vae"), CPU)
    labels = torch.arange(count) % 2 if labels is None else labels
    latents = draw_samples(net.eval(), labels, Sampling(sample_steps=2), seed=0)
    return to_uint8(vae.decode(vae.scaling.undo(latents)))


def arrays(path, *names):
    with np.load(path) as file:
        assert file.files == [*names]
        return [file[name] for name in names]


def test_a_run_records_its_vae_and_the_names_of_its_classes(trained):
    said = json.loads((trained / "run" / "run.json").read_text())["origin"]
    assert said["class_names"] == ["black cat", "dog, hound"]
    assert said["latents"]["vae"] == str(trained / "vae")
    assert said["latents"]["sha256"] == Autoencoder(str(trained / "vae"), CPU).sha256
    assert said["latents"]["shift"] == pytest.approx([0.1] * CHANNELS)
    for name in ("model", "ema"):
        with safe_open(checkpoints(trained / "run")[-1] / f"{name}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["origin"]) == said


def test_grids_of_the_run_are_decoded(trained):
    (path,) = (trained / "run" / "samples").iterdir()
    assert path.name == "step-00000002.png"
    with Image.open(path) as image:
        assert image.size == (2 * 32, 8 * 32)


def test_an_npz_of_images(trained, tmp_path):
    draw(trained, tmp_path / "a.npz")
    images, labels = arrays(tmp_path / "a.npz", "arr_0", "labels")
    assert (images.dtype, images.shape, labels.dtype, labels.tolist()) == (
        *(np.uint8, (7, 32, 32, 3), np.int64),
        [0, 1, 0, 1, 0, 1, 0],
    )
    assert np.array_equal(images, decoded(trained))
    assert images.std() > 2
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # ADM's evaluator takes the first array, and streams it
        assert archive.namelist()[0] == "arr_0.npy"
        assert archive.infolist()[0].compress_type == zipfile.ZIP_STORED


def test_a_grid(trained, tmp_path):
    draw(trained, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), save_pixels(tmp_path / "b.png", decoded(trained), 2))


def test_a_folder(trained, tmp_path):
    draw(trained, tmp_path / "drawn", "--classes", "hound", "0")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        *(f"{i:06d}.png" for i in range(7)),
        "labels.csv",
    ]
    expected = decoded(trained, labels=torch.tensor([1, 0, 1, 0, 1, 0, 1]))
    for i, image in enumerate(expected):
        with Image.open(tmp_path / "drawn" / f"{i:06d}.png") as file:
            assert np.array_equal(np.asarray(file), image)
    with (tmp_path / "drawn" / "labels.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[:3] == [["index", "class id", "class name"], ["0", "1", "dog, hound"], ["1", "0", "black cat"]]
    assert len(table) == 8
    with pytest.raises(ValueError, match="drawn exists already: name another folder, or delete it"):
        draw(trained, tmp_path / "drawn")
    (tmp_path / "dotted.name").mkdir()
    draw(trained, tmp_path / "dotted.name", count=2)  # an empty folder is filled, whatever its name
    assert len(list((tmp_path / "dotted.name").iterdir())) == 3


def test_raw_latents(trained, tmp_path):
    draw(trained, tmp_path / "a.npz", "--latents")
    latents, labels = arrays(tmp_path / "a.npz", "latents", "labels")
    net = load_maskdit(trained / "run").eval()
    assert latents.dtype == np.float32
    assert np.array_equal(latents, draw_samples(net, torch.from_numpy(labels), Sampling(sample_steps=2), seed=0))


def test_a_strip_ends_in_the_samples(trained, tmp_path):
    draw(trained, tmp_path / "a.png", "--strip", str(tmp_path / "strip.png"), count=3)
    with Image.open(tmp_path / "strip.png") as image:
        strip = np.asarray(image)
    assert strip.shape == (3 * 32, 3 * 32, 3)  # three evaluations of two steps
    expected = np.concatenate(list(decoded(trained, count=3).numpy()))
    # The state is fp64 and the last D is its end, but for rounding.
    assert np.abs(strip[:, -32:].astype(int) - expected).max() <= 1
    assert (strip[:, :32] != expected).mean() > 0.5


def test_images_do_not_depend_on_the_batch_size(trained, tmp_path):
    draw(trained, tmp_path / "a.npz")
    for size in ("1", "2", "5"):
        draw(trained, tmp_path / "b.npz", "--batch-size", size)
        whole, parts = (arrays(tmp_path / f"{name}.npz", "arr_0", "labels") for name in "ab")
        assert np.array_equal(whole[1], parts[1])
        # Matmuls of another size round otherwise, which moves a value to the next level, rarely.
        assert np.abs(whole[0].astype(int) - parts[0]).max() <= 1
        assert (whole[0] != parts[0]).mean() < 0.01


def kill_after_a_batch(arguments):
    write = Output.write

    def written_once(self, folder, batch, values):
        write(self, folder, batch, values)
        if batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Output.write = written_once
    main(arguments)


def test_a_killed_command_resumes(trained, tmp_path, capsys, monkeypatch):
    name = "a.npz"
    flags = ["--sample-steps", "2", "--num-samples", "7", "--batch-size", "2"]
    arguments = [str(trained / "run"), "--out", str(tmp_path / name), *flags]
    process = forked.FORKED.Process(target=kill_after_a_batch, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / name).exists()
    parts = tmp_path / f"{name}.parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert before.keys() == {"part-000000.npy", "part-000001.npy"}
    for other, named in [
        (["--seed", "1"], "seed"),
        (["--sample-steps", "3"], "sample_steps"),
        (["--classes", "1"], "classes"),
    ]:
        with pytest.raises(ValueError, match=rf"parts that were drawn with other settings \({named}\): give the same"):
            main([*arguments, *other])
    wrote, write = [], Output.write
    monkeypatch.setattr(Output, "write", lambda self, *values: wrote.append(values[1]) or write(self, *values))
    main(arguments)
    assert wrote == [2, 3]
    assert f"{parts}: 2 of 4 batches are drawn already" in capsys.readouterr().out
    assert not parts.exists()
    main([*arguments[:2], str(tmp_path / f"whole-{name}"), *flags])
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole-{name}").read_bytes()


def test_another_vae(trained, tmp_path):
    """Its weights decode, by the scale and shift that the run was trained with."""
    small_vae(latent_channels=CHANNELS, scaling_factor=9.0).save_pretrained(tmp_path / "vae")
    draw(trained, tmp_path / "a.npz", "--vae", str(tmp_path / "vae"))
    assert np.array_equal(arrays(tmp_path / "a.npz", "arr_0", "labels")[0], decoded(trained))


def test_vaes_that_do_not_serve(trained, tmp_path, capsys):
    net, out = load_maskdit(trained / "run"), tmp_path / "a.npz"
    small_vae().save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match=r"four decodes latents of 4 channels, and .*run draws 16: give --vae with"):
        draw(trained, out, "--vae", str(tmp_path / "four"))
    weights = tmp_path / "weights.safetensors"
    for space, message in [
        (LatentSpace(), r"draws latents, and does not record their VAE: give --vae with the name or folder of one"),
        (
            LatentSpace(vae=str(tmp_path / "gone")),
            r"draws latents of a VAE, and --vae .*gone cannot be loaded: .*; give",
        ),
        (LatentSpace(vae=str(trained / "vae"), shift=[0.0, 1.0]), "records 2 scales for 16 channels of latents"),
    ]:
        net.origin = Origin(latents=space)
        save_weights(weights, net)
        with pytest.raises(ValueError, match=message):
            main([str(weights), "--out", str(out)])
        main([str(weights), "--out", str(out), "--latents", "--num-samples", "1", "--sample-steps", "2"])
        out.unlink()
    net.origin = Origin(latents=LatentSpace(vae=str(trained / "vae"), sha256="0" * 64))
    save_weights(weights, net)
    main([str(weights), "--out", str(out), "--num-samples", "1", "--sample-steps", "2"])
    assert "vae has other weights than the VAE that" in capsys.readouterr().out
    net.origin = Origin()
    save_weights(weights, net)
    for flag, message in (
        (["--vae", str(trained / "vae")], "was trained on pixels, which need no VAE: leave --vae out"),
        (["--latents"], "draws pixels, not latents: leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(weights), "--out", str(out), *flag])


@pytest.mark.parametrize(("blocks", "channels"), [(4, 4), (5, 16), (6, 32)], ids=["f8c4", "f16c16", "f32c32"])
def test_latents_of_any_number_of_channels(tmp_path, blocks, channels):
    sizes = {"block_out_channels": (4,) * blocks, "latent_channels": channels}
    kinds = {
        f"{way}_block_types": (f"{kind}Block2D",) * blocks
        for way, kind in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    small_vae(**sizes, **kinds).save_pretrained(tmp_path / "vae")
    net = small_net(depth=1, in_channels=channels, input_size=4)
    net.origin = Origin(latents=LatentSpace(vae=str(tmp_path / "vae")))
    save_weights(tmp_path / "weights.safetensors", net)
    out, side = tmp_path / "a.png", 4 * 2 ** (blocks - 1)
    main([str(tmp_path / "weights.safetensors"), "--out", str(out), "--num-samples", "5", "--sample-steps", "2"])
    with Image.open(out) as image:
        assert image.size == (5 * side, side)
        assert np.asarray(image).std() > 1
    images, kind = Pictures(net, "runs/a")(torch.randn(2, channels, 4, 4), CPU)
    assert (images.shape, kind) == ((2, 3, side, side), "")


def test_weights_without_a_record(trained, tmp_path):
    """The VAE that is given decodes, by its own scale and shift."""
    net = load_maskdit(trained / "run")
    net.origin = None
    save_weights(tmp_path / "weights.safetensors", net)
    flags = ["--num-samples", "7", "--sample-steps", "2", "--out", str(tmp_path / "a.npz")]
    with pytest.raises(ValueError, match="draws latents, and does not record their VAE"):
        main([str(tmp_path / "weights.safetensors"), *flags])
    main([str(tmp_path / "weights.safetensors"), *flags, "--vae", str(trained / "vae")])
    assert np.array_equal(arrays(tmp_path / "a.npz", "arr_0", "labels")[0], decoded(trained))


def test_names_of_classes_that_are_not_known(trained, tmp_path):
    with pytest.raises(ValueError, match=r"--classes cat: .*run knows no such class: did you mean black cat"):
        draw(trained, tmp_path / "a.png", "--classes", "cat")
