import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vaes import small_vae

from fastmask.data import StoreDataset, open_data
from fastmask.data.images.dataset import ImageDataset
from fastmask.data.sources.open import open_source
from fastmask.data.store.manifest import read_manifest
from fastmask.grid import save_grid
from fastmask.prepare import main

SMALL = ("--space", "pixel", "--image-size", "16", "--num-workers", "0", "--shard-size", "5", "--batch-size", "2")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def prepare(source, store, *flags):
    main([str(source), str(store), *SMALL, *flags])
    return read_manifest(store)


def content(store):
    skipped = (".lock", "manifest.json")
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name not in skipped}


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes."""
    for i in range(12):
        path = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(20 + i, 30, 3, seed=i)).save(path)
    return tmp_path / "images"


def test_a_store_holds_what_the_folder_does(folder, tmp_path, capsys):
    manifest = prepare(folder, tmp_path / "store")
    assert (manifest.count, manifest.class_names, manifest.class_counts) == (12, ["cat", "dog"], [6, 6])
    assert [shard.count for shard in manifest.shards] == [5, 5, 2]
    store, images = (
        StoreDataset(tmp_path / "store", 16, None, False),
        ImageDataset(open_source(folder), 16, None, False),
    )
    for ours, theirs in zip(store.read(np.arange(12)), images.read(np.arange(12)), strict=True):
        assert torch.equal(ours, theirs)
    said = capsys.readouterr().out
    assert "folder, 12 images, 2 classes" in said
    assert "12/12 images" in said
    assert said.endswith("store: 12 records, 2 classes, 0 images left out\n")


def test_arrays_keep_their_side_and_files_are_enlarged_aloud(folder, tmp_path, capsys):
    np.savez(tmp_path / "grey.npz", images=noise(6, 28, 28), labels=np.arange(6))
    bare = ("--space", "pixel", "--num-workers", "0")
    main([str(tmp_path / "grey.npz"), str(tmp_path / "a"), *bare])
    assert read_manifest(tmp_path / "a").shape == (1, 1, 28, 28)
    assert "resized" not in capsys.readouterr().out
    main([str(tmp_path / "grey.npz"), str(tmp_path / "b"), *bare, "--image-size", "64"])
    assert f"{tmp_path}/grey.npz: images are resized from a side of 28 to 64" in capsys.readouterr().out
    main([str(folder), str(tmp_path / "c"), *bare])
    assert read_manifest(tmp_path / "c").image_size == 256
    assert "12 of 12 images looked at are enlarged more than twice, from a side of 20 to 256" in capsys.readouterr().out


def labelled_tar(path, *labels):
    image = io.BytesIO()
    Image.fromarray(noise(16, 16, 3)).save(image, "PNG")
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            for name, data in ((f"{i}.png", image.getvalue()), (f"{i}.json", json.dumps(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_labels_are_left_out_where_they_are_not_wanted(folder, tmp_path, capsys):
    """Of a test split, of captions, of classes; and they are said to be."""
    hidden = labelled_tar(tmp_path / "test.tar", {"label": -1}, {"label": -1})
    captions = labelled_tar(tmp_path / "captions.tar", {"caption": "a cat"}, {"caption": "a dog"})
    with pytest.raises(
        ValueError, match=r"test\.tar: label -1 is below 0, .* --num-classes 0 takes the images without"
    ):
        prepare(hidden, tmp_path / "store")
    for number, source in enumerate((hidden, captions, folder)):
        manifest = prepare(source, tmp_path / str(number), "--num-classes", "0")
        assert (manifest.num_classes, manifest.class_names) == (0, [])
        assert "images, no classes (--num-classes 0)" in capsys.readouterr().out
    assert prepare(captions, tmp_path / "3").num_classes == 0
    assert "left out, beside an image of a sample: 2 (0.json, 1.json)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="have no labels, but num_classes is 2"):
        prepare(captions, tmp_path / "4", "--num-classes", "2")


def test_more_classes_than_the_images_have(folder, tmp_path):
    assert prepare(folder, tmp_path / "store", "--num-classes", "4").class_names == ["cat", "dog", "2", "3"]
    with pytest.raises(ValueError, match="the images have 2 classes, more than num_classes 1"):
        prepare(folder, tmp_path / "other", "--num-classes", "1")


def test_names_become_labels_in_order(tmp_path):
    source = labelled_tar(tmp_path / "names.tar", {"label": "dog"}, {"label": "cat"}, {"label": "dog"})
    manifest = prepare(source, tmp_path / "store")
    assert (manifest.class_names, manifest.class_counts) == (["cat", "dog"], [1, 2])
    data = StoreDataset(tmp_path / "store", 16, None, False)
    assert data.read(np.arange(3))[1].tolist() == [1, 0, 1]


def test_other_labels_are_not_gone_on_with(folder, tmp_path):
    """The images are the same, and the store is not finished."""
    (folder / "dog" / "11.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"11\.png"):
        prepare(folder, tmp_path / "store")
    (folder / "labels.json").write_text(json.dumps({"cat": 1, "dog": 0}))
    with pytest.raises(ValueError, match=r"holds an unfinished store of something else \(source .*labels_sha256"):
        prepare(folder, tmp_path / "store", "--on-bad", "skip")


@pytest.mark.once
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_not_utf8_stop_nothing(tmp_path, encoding):
    """As of a zip made on Windows: of the source, of a class, of a damaged image, and of the store."""
    source, store = os.fsencode(tmp_path) + b"/caf\xe9", os.fsencode(tmp_path) + b"/st\xf6re"
    os.makedirs(source + b"/\xe9t\xe9")
    for name in (b"good.png", b"caf\xe9.png"):
        Image.fromarray(noise(16, 16, 3)).save(source + b"/\xe9t\xe9/" + name)
    with open(source + b"/\xe9t\xe9/b\xe4d.png", "wb") as file:
        file.write(b"nothing")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    program = "import sys; from fastmask.prepare import main; main(sys.argv[1:]); main(['--check', sys.argv[2]])"
    command = [sys.executable, "-c", program, source, store, *SMALL, "--on-bad", "skip"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    manifest = read_manifest(Path(os.fsdecode(store)))
    assert manifest.class_names == [r"\udce9t\udce9"]
    (skipped,) = manifest.shards[0].skipped
    assert skipped.endswith(r"/b\udce4d.png")
    json.dumps(dataclasses.asdict(manifest), ensure_ascii=False).encode()


def test_workers_and_batches_change_nothing(folder, tmp_path):
    prepare(folder, tmp_path / "a")
    prepare(folder, tmp_path / "b", "--num-workers", "2", "--batch-size", "7")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_other_sources(folder, tmp_path):
    prepare(folder, tmp_path / "a")
    files = sorted(folder.rglob("*.png"))
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for i, file in enumerate(files):
            for name, data in (
                (f"{i:03}.png", file.read_bytes()),
                (f"{i:03}.cls", b"%d" % (file.parent.name == "dog")),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    np.savez(tmp_path / "grey.npz", images=noise(6, 16, 16), labels=np.arange(6))
    prepare(tmp_path / "data.tar", tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert prepare(tmp_path / "grey.npz", tmp_path / "c").shape == (1, 1, 16, 16)
    data = open_data(str(tmp_path / "c"), image_size=16, num_classes=None, flip=False)
    assert np.array_equal(data.read(np.arange(6))[0][:, 0].numpy(), noise(6, 16, 16))


def broken(folder):
    """Add images that cannot be read, and return their names with what is said of them."""
    photo = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(photo, "JPEG")
    (folder / "cat" / "cut.jpg").write_bytes(photo.getvalue()[:900])
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "cat" / "page.jpg").write_bytes(b"<html>")
    (folder / "dog" / "loop.png").symlink_to("loop.png")
    Image.new("L", (2000, 1)).save(folder / "dog" / "strip.png")
    frames = [Image.fromarray(noise(16, 16, seed=i)) for i in range(3)]
    frames[0].save(folder / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    return {
        "cat/cut.jpg": "cannot be read as an image: image file is truncated",
        "cat/empty.png": "cannot be read as an image: it is empty, damaged or of another format",
        "cat/page.jpg": "cannot be read as an image: it is empty, damaged or of another format",
        "dog/loop.png": "Too many levels of symbolic links",
        "dog/moving.gif": "cannot be read as an image: it has 3 frames: keep one of them as an image of its own",
        "dog/strip.png": "cannot be read as an image: it has 2000 x 1 pixels: one side is more than 20 times the other",
    }


def test_damaged_images_are_left_out_and_told(folder, tmp_path, capsys):
    prepare(folder, tmp_path / "good", "--shard-size", "99")
    faults = broken(folder)
    manifest = prepare(folder, tmp_path / "store", "--on-bad", "skip", "--shard-size", "99")
    assert manifest.shards[0].skipped == [str(folder / name) for name in faults]
    assert content(tmp_path / "store") == content(tmp_path / "good")
    said = capsys.readouterr().out
    for name, fault in faults.items():
        (line,) = [line for line in said.splitlines() if name in line]
        assert line.startswith("left out: ")
        assert fault in line
    assert "12 records, 2 classes, 6 images left out" in said


def test_a_damaged_image_stops_and_the_same_command_goes_on(folder, tmp_path):
    prepare(folder, tmp_path / "good")
    whole = (folder / "dog" / "05.png").read_bytes()
    (folder / "dog" / "05.png").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"dog/05\.png cannot be read as an image: .* \(--on-bad skip leaves such"):
        prepare(folder, tmp_path / "store")
    with pytest.raises(ValueError, match="is a store that is not finished"):
        open_data(str(tmp_path / "store"), image_size=16, num_classes=None, flip=False)
    (folder / "dog" / "05.png").write_bytes(whole)
    prepare(folder, tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "good")


def test_odd_images_are_read_as_they_are_meant(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    Image.new("CMYK", (16, 16), (0, 255, 0, 0)).save(path / "a.jpg", quality=100)
    deep = np.linspace(0, 65535, 256).round().reshape(16, 16).astype(np.uint16)
    Image.fromarray(deep).save(path / "b.png")
    Image.fromarray(noise(16, 16, 3)).save(path / "c.jpg", "PNG")  # a wrong name, told by its content
    prepare(path, tmp_path / "store")
    pixels = StoreDataset(tmp_path / "store", 16, None, False).read(np.arange(3))[0].permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels[0].astype(int) - [255, 0, 255]).max() <= 2
    assert np.array_equal(pixels[1, ..., 1], np.arange(256).reshape(16, 16))
    assert np.array_equal(pixels[2], noise(16, 16, 3))


@pytest.mark.once
def test_killed_at_any_moment(folder, tmp_path):
    command = [sys.executable, "-m", "fastmask.prepare", str(folder), *SMALL, "--shard-size", "1", "--batch-size", "1"]
    prepare(folder, tmp_path / "good", "--shard-size", "1")
    for i in range(3):
        store = tmp_path / str(i)
        process = subprocess.Popen([*command[:4], str(store), *command[4:]], stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(store.glob("0*.json"))) < 3 * i:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (store / "manifest.json").exists():
            prepare(folder, store, "--shard-size", "1")
        assert content(store) == content(tmp_path / "good")


def has_ended(pid):
    """Return whether a process is gone, or waits for somebody to ask after it."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.once
def test_killed_with_workers_that_have_more_to_say_than_a_pipe_takes(tmp_path):
    """They end with it, and hold no lock, so that the command resumes at once."""
    for i in range(120):
        path = tmp_path / "images" / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(16, 16, 3, seed=i)).save(path)
    flags = ("--space", "pixel", "--image-size", "256", "--shard-size", "4", "--batch-size", "4")
    command = [sys.executable, "-m", "fastmask.prepare", str(tmp_path / "images"), str(tmp_path / "store"), *flags]
    main([str(tmp_path / "images"), str(tmp_path / "good"), *flags, "--num-workers", "0"])
    process = subprocess.Popen([*command, "--num-workers", "2"], stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list((tmp_path / "store").glob("0*.json")):
        assert process.poll() is None
        time.sleep(0.001)
    workers = children.read_text().split()
    process.kill()
    process.wait()
    assert not (tmp_path / "store" / "manifest.json").exists()
    main([*command[3:], "--num-workers", "0"])
    assert content(tmp_path / "store") == content(tmp_path / "good")
    assert len(workers) == 2
    alive = [worker for worker in workers if not has_ended(worker)]
    for worker in alive:
        os.kill(int(worker), signal.SIGKILL)
    assert not alive


def test_another_source_is_not_gone_on_with(folder, tmp_path):
    (folder / "dog" / "11.png").rename(folder / "dog" / "gone.txt")
    (folder / "dog" / "99.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"99\.png"):
        prepare(folder, tmp_path / "store")
    (folder / "dog" / "gone.txt").rename(folder / "dog" / "98.png")
    (folder / "dog" / "99.png").unlink()
    with pytest.raises(ValueError, match=r"holds an unfinished store of something else \(source .*sha256"):
        prepare(folder, tmp_path / "store")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
@pytest.mark.parametrize("size", ["16", "64"])  # what a buffer holds until the shard is finished, and what it does not
def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch, size):
    """The records go to /dev/full, which takes nothing."""
    (tmp_path / "store").mkdir()
    real = Path.open

    def opened(path, mode="r", *rest, **options):
        return real(Path("/dev/full") if path.name == ".partial-00001.npy" else path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(ValueError, match=r"00001\.npy cannot be written: No space left on device; finished shards are"):
        prepare(folder, tmp_path / "store", "--image-size", size)
    monkeypatch.undo()
    assert prepare(folder, tmp_path / "store", "--image-size", size).count == 12


def test_check(folder, tmp_path, capsys):
    prepare(folder, tmp_path / "store")
    capsys.readouterr()
    main(["--check", str(tmp_path / "store")])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "12 records of pixels, uint8 (1, 3, 16, 16), image_size 16, 3 shards"
    assert said[-2:] == [f"{tmp_path / 'store'} is intact", f"12 images: {tmp_path / 'store' / 'sheet.png'}"]
    with Image.open(tmp_path / "store" / "sheet.png") as sheet:
        assert sheet.size == (8 * 32, 2 * 32)
    path = tmp_path / "store" / "00001.npy"
    values = bytearray(path.read_bytes())
    values[500] ^= 1
    path.write_bytes(values)
    with pytest.raises(ValueError, match="store is damaged: 1 of its files; delete them and copy or fetch"):
        main(["--check", str(tmp_path / "store")])
    assert "00001.npy is damaged: its SHA-256 is not that of the manifest" in capsys.readouterr().out
    values[500] ^= 1
    path.write_bytes(values)
    (tmp_path / "store" / "sheet.png").unlink()
    (tmp_path / "store" / ".partial-sheet.png").mkdir()  # nothing can be written there, as on a shared disk
    main(["--check", str(tmp_path / "store")])
    assert "is intact" in (said := capsys.readouterr().out)
    assert "warning: " in said.splitlines()[-1]
    assert "sheet.png cannot be drawn: " in said.splitlines()[-1]


def test_latents(folder, tmp_path, capsys):
    small_vae().save_pretrained(tmp_path / "vae")
    flags = ("--space", "latent", "--vae", str(tmp_path / "vae"), "--device", "cpu")
    manifest = prepare(folder, tmp_path / "store", *flags)
    assert (manifest.kind, manifest.shape, manifest.scale) == ("moments", (2, 8, 2, 2), 0.18215)
    said = capsys.readouterr().out
    assert "vae: latents of 4 channels, a downsampling of 8, scale 0.18215, shift 0 (its configuration)" in said
    data = open_data(str(tmp_path / "store"), image_size=16, num_classes=None, flip=True)
    assert (len(data), data.shape) == (24, (4, 2, 2))
    pixels, _ = ImageDataset(open_source(folder), 16, None, False).read(np.arange(12))
    images = pixels.float() / 127.5 - 1
    with torch.no_grad():
        exact = small_vae().eval().encode(torch.cat([images, images.flip(3)])).latent_dist.parameters
    torch.testing.assert_close(data.read(np.arange(24))[0].float(), exact, rtol=2e-3, atol=2e-3)
    assert prepare(folder, tmp_path / "one", *flags, "--no-flip").shape == (1, 8, 2, 2)
    with pytest.raises(ValueError, match="image_size must be a multiple of 8 for this VAE, not 20"):
        prepare(folder, tmp_path / "other", *flags, "--image-size", "20")


def test_the_sheet_of_latents_is_decoded(folder, tmp_path, capsys):
    means, deviations = [0.5, -0.5, 0.25, 0.0], [2.0, 1.0, 0.5, 1.0]
    vae = small_vae(latents_mean=means, latents_std=deviations)
    vae.save_pretrained(tmp_path / "vae")
    manifest = prepare(
        folder, tmp_path / "store", "--space", "latent", "--vae", str(tmp_path / "vae"), "--device", "cpu"
    )
    assert (manifest.shift, manifest.encoder) == (means, "float32 on cpu")

    def sheet(*flags):
        capsys.readouterr()
        main(["--check", str(tmp_path / "store"), "--device", "cpu", *flags])
        with Image.open(tmp_path / "store" / "sheet.png") as image:
            return np.asarray(image), capsys.readouterr().out

    decoded, said = sheet()
    assert "decoding 12 latents on cpu" in said
    assert "warning" not in said.replace("warning: the scale", "")  # random weights have latents of any size
    latents = StoreDataset(tmp_path / "store", 16, None, False)
    drawn = latents.to_images(latents.read(np.arange(12))[0], 0, torch.arange(12))
    drawn = drawn * torch.tensor(deviations).view(4, 1, 1) / 0.18215 + torch.tensor(means).view(4, 1, 1)
    with torch.no_grad():
        images = vae.eval().decode(drawn).sample.clamp(-1, 1)
    save_grid(tmp_path / "expected.png", images, columns=8)
    with Image.open(tmp_path / "expected.png") as image:
        assert np.abs(np.asarray(image).astype(int) - decoded).max() <= 1
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "other")
    assert f"warning: {tmp_path / 'other'} has other weights than the VAE" in sheet("--vae", str(tmp_path / "other"))[1]
    small_vae(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="decodes latents of 16 channels, not 4"):
        sheet("--vae", str(tmp_path / "wide"))
    with pytest.raises(ValueError, match=r"--vae .*nowhere cannot be loaded"):
        sheet("--vae", str(tmp_path / "nowhere"))
    small_vae(scaling_factor=0.5).save_pretrained(tmp_path / "rescaled")
    said = sheet("--vae", str(tmp_path / "rescaled"))[1]
    assert (
        f"warning: {tmp_path / 'rescaled'} has scale 0.5, shift 0 (its configuration), and the store scale 0.091"
        in said
    )
    prepare(folder, tmp_path / "16", "--space", "latent", "--vae", str(tmp_path / "wide"), "--device", "cpu")
    (tmp_path / "wide").rename(tmp_path / "not here")
    main(["--check", str(tmp_path / "16")])
    assert f"12 images: {tmp_path / '16' / 'sheet.png'}" in capsys.readouterr().out
    (tmp_path / "vae").rename(tmp_path / "gone")
    shown, said = sheet()
    assert "the sheet shows latents as they are: --vae" in said
    assert shown.shape != decoded.shape or not np.array_equal(shown, decoded)


def test_flags_of_imported_latents_are_not_for_images(folder, tmp_path):
    with pytest.raises(ValueError, match=r"--latent-scale and --latent-shift are of imported latents: .* holds none"):
        prepare(folder, tmp_path / "store", "--latent-scale", "1", "--latent-shift", "0")
    with pytest.raises(ValueError, match="--latents edm2 decides between projects with EDM2's layout"):
        prepare(folder, tmp_path / "store", "--latents", "edm2")


def test_a_label_outside_the_classes_names_the_image(folder, tmp_path, monkeypatch):
    source = open_source(folder)
    source.labels[7] = 2  # of two classes
    monkeypatch.setattr("fastmask.prepare.open_source", lambda *arguments, **options: source)
    (folder / "cat" / "04.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"{source.name(7)} has label 2, which is outside 0 \.\. 1, the classes of the"
    ):
        prepare(folder, tmp_path / "store", "--on-bad", "skip")


def test_the_manifest_names_the_source(folder, tmp_path):
    about = prepare(folder, tmp_path / "store").source
    names = "".join(f"/{file.relative_to(folder)}\n" for file in sorted(folder.rglob("*.png")))
    digest = hashlib.sha256(names.encode()).hexdigest()
    labels = hashlib.sha256(b"cat\ndog" + np.array([0] * 6 + [1] * 6, np.int32).tobytes()).hexdigest()
    assert about == {"kind": "folder", "path": str(folder), "items": 12, "sha256": digest, "labels_sha256": labels}
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["crop"] == "adm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a source and the store to make of it, or --check STORE"),
        (["x"], "name a source and the store to make of it, or --check STORE"),
        (["x", "--check", "y"], r"--check y takes no source \(x\)"),
        (["--check", "y"], r"y is not a store: it holds no manifest\.json"),
        (["x", "y", "--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["x", "y", "--num-workers", "-1"], "num_workers must be at least 0, not -1"),
        (["x", "y"], "x does not exist: name a folder"),
        (["x", "y", "--onbad", "skip"], "did you mean --on-bad"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(arguments)
    assert not list(tmp_path.iterdir())
