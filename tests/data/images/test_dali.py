"""JPEG files by DALI's CPU operators against Pillow, and the faults of both; `make test-dali` runs them."""

import importlib
import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vaes import small_vae

from fastmask.data import batches, open_data, sample_ids
from fastmask.data.images import dali as module
from fastmask.data.images.dali import JpegDecoder, is_jpeg, pick_decoder
from fastmask.data.images.dataset import ImageDataset
from fastmask.data.images.pixels import decode
from fastmask.data.images.reader import decoded
from fastmask.data.order import following
from fastmask.data.sources.open import open_source

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
CPU = torch.device("cpu")


@pytest.fixture
def dali():
    """Skip a test without DALI."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")


def picture(height, width, seed=0):
    """Soft shapes with a little grain, as photos have."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return (soft + random.normal(0, 4, soft.shape)).clip(0, 255).astype(np.uint8)


def jpeg(height, width, seed=0, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(picture(height, width, seed)).convert(mode).save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def by_dali(files, size):
    """Return the pixels (n, 3, size, size) of files; None where DALI refuses one."""
    ((_, pixels),) = JpegDecoder(size, len(files), CPU, 1).ahead([SimpleNamespace(values=files)])
    return None if pixels is None else pixels.numpy().astype(int)


def by_pillow(content, size):
    return decode(content, size, "it").transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"quality": 30},
    ],
    ids=str,
)
def test_what_needs_no_resizing_is_equal(dali, options):
    files = [jpeg(64, 64, seed, **options) for seed in range(3)]
    assert np.array_equal(by_dali(files, 64), np.stack([by_pillow(file, 64) for file in files]))


# Pillow rounds after each of its two passes, half up, and so each time a side is halved.
@pytest.mark.parametrize(
    ("side", "most", "mean"),
    [
        ((64, 90), 0, 0),  # cropped alone
        ((100, 75), 1, 0.25),
        ((127, 127), 1, 0.25),
        ((40, 300), 1, 0.25),  # enlarged
        ((128, 128), 1, 0.55),  # halved once
        ((256, 300), 2, 1.1),
        ((300, 256), 2, 1.1),
        ((129, 191), 12, 1.9),  # sides that are odd when they are halved
        ((375, 517), 12, 1.9),
        ((1030, 1031), 12, 2.5),
    ],
)
def test_resizing_agrees(dali, side, most, mean):
    """The tolerance that is stated, in levels of 255."""
    content = jpeg(*side, seed=sum(side))
    difference = np.abs(by_dali([content], 64)[0] - by_pillow(content, 64))
    assert difference.max() <= most
    assert difference.mean() <= mean


def test_turned_images_are_the_same_by_both(dali, tmp_path):
    """Among others, and where Exif is damaged: then nothing turns them."""
    for turned in range(10):
        exif = Image.Exif()
        exif[0x0112] = turned
        (tmp_path / f"{turned}.jpg").write_bytes(jpeg(64, 80, turned, exif=exif.tobytes()))
    damaged = exif.tobytes()[:16] + b"\xff\xff" + exif.tobytes()[18:]
    (tmp_path / "damaged.jpg").write_bytes(jpeg(64, 80, exif=damaged))
    source, parts = open_source(tmp_path), [range(4), range(4, 8), range(8, 11)]
    found = list(decoded(source, 64, parts, 0, JpegDecoder(64, 4, CPU, 1)))
    expected = list(decoded(source, 64, parts, 0))
    for ours, theirs in zip(found, expected, strict=True):
        assert (len(ours.labels), ours.bad) == (len(theirs.labels), [])
        assert np.array_equal(np.asarray(ours.values), theirs.values)
    plain = by_dali([jpeg(64, 80, turned) for turned in range(10)], 64)
    turned = np.concatenate([part.values for part in found])[:10]
    assert [np.array_equal(a, b) for a, b in zip(turned, plain, strict=True)] == [True] * 2 + [False] * 7 + [True]


def test_of_a_photo_with_more_views_the_first_is_taken(dali):
    """MPO, which some cameras write under the name of .jpg."""
    several = io.BytesIO()
    frames = [Image.fromarray(picture(64, 64, i)) for i in range(2)]
    frames[0].save(several, "MPO", save_all=True, append_images=frames[1:], quality=92)
    alone = io.BytesIO()
    frames[0].save(alone, "JPEG", quality=92)
    expected = by_pillow(alone.getvalue(), 64)
    assert np.array_equal(by_pillow(several.getvalue(), 64), expected)
    assert np.array_equal(by_dali([several.getvalue()], 64)[0], expected)


def test_what_dali_takes_pillow_takes_too(dali):
    """Cut off, and with bytes that are wrong: nothing passes as whole that Pillow finds damaged."""
    content, random = jpeg(64, 64), np.random.default_rng(0)
    files = [content[:n] for n in random.integers(3, len(content), 10)]
    for place in random.integers(3, len(content), 20):
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(8))
        files.append(bytes(changed))
    taken = 0
    for file in files:
        pixels = by_dali([file], 64)
        if pixels is not None:
            assert np.array_equal(pixels[0], by_pillow(file, 64))
            taken += 1
    assert 2 < taken < 30


def test_parts_in_order_with_others_in_between(dali):
    """Parts of JPEG files, of pixels, of both, and with a damaged one; DALI continues after it."""
    files, plain = [jpeg(70, 64 + i, i) for i in range(6)], np.full((3, 64, 64), 7, np.uint8)
    parts = [
        files[:2],
        [plain],
        [plain, files[2], plain, files[3]],
        [files[0], files[1][:200]],
        [files[4]],
        [files[0][:300]],
        [plain, plain],
        [files[5]],
        [plain],
    ]
    given = [SimpleNamespace(values=part) for part in parts]
    for (part, pixels), expected in zip(JpegDecoder(64, 4, CPU, 2).ahead(given), given, strict=True):
        assert part is expected
        whole = any(isinstance(value, bytes) for value in part.values) and all(
            len(v) not in (200, 300) for v in part.values
        )
        assert (pixels is not None) == whole
        if whole:
            for value, found in zip(part.values, pixels.numpy(), strict=True):
                known = plain if value is plain else by_dali([value], 64)[0]
                assert np.array_equal(found, known)


@pytest.mark.parametrize("parts", [[], [[np.zeros((3, 8, 8), np.uint8)]]])
def test_nothing_for_dali(dali, parts):
    found = list(JpegDecoder(8, 4, CPU, 1).ahead([SimpleNamespace(values=part) for part in parts]))
    assert [pixels for _, pixels in found] == [None] * len(parts)


@pytest.mark.parametrize("images", ["plain", "jpeg"])
def test_few_parts_are_read_ahead(dali, images):
    """Neither of JPEG files nor of others, of which DALI gets none."""
    read = []

    def parts():
        for number in range(50):
            read.append(number)
            yield SimpleNamespace(values=[np.zeros((3, 16, 16), np.uint8) if images == "plain" else jpeg(16, 16)])

    ahead = JpegDecoder(16, 1, CPU, 1).ahead(parts())
    next(ahead)
    assert len(read) <= 5
    assert len(list(ahead)) == 49


def test_what_goes_wrong_in_reading_is_passed_on(dali):
    def parts():
        yield SimpleNamespace(values=[jpeg(16, 16)])
        raise ValueError("a reader died")

    with pytest.raises(ValueError, match="a reader died"):
        list(JpegDecoder(16, 1, CPU, 1).ahead(parts()))


def folder(path, count=10):
    """Write JPEG files of two classes, every fourth image a PNG."""
    for i in range(count):
        file = path / "ab"[i % 2] / f"{i:02}.{'png' if i % 4 == 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            Image.fromarray(picture(50, 40, i)).save(file)
        else:
            file.write_bytes(jpeg(50, 40 + i, i))
    return path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_images_are_told_in_order(dali, tmp_path, num_workers, capsys):
    path = folder(tmp_path)
    damaged = [path / "a" / "04.jpg", path / "b" / "03.png", path / "b" / "05.jpg"]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:400])
    source, parts = open_source(path), [range(i, min(i + 4, 10)) for i in range(0, 10, 4)]
    found = list(decoded(source, 32, parts, num_workers, JpegDecoder(32, 4, CPU, 1)))
    expected = list(decoded(source, 32, parts, num_workers))
    assert [part.bad for part in found] == [part.bad for part in expected]
    assert [name for part in found for name, _ in part.bad] == [str(file) for file in damaged]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.labels, theirs.labels)
        assert np.abs(np.asarray(ours.values).astype(int) - theirs.values).max() <= 2
    assert "refused" not in capsys.readouterr().out


def test_an_image_that_dali_alone_refuses_is_told(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(jpeg(32, 32))
    refusing = SimpleNamespace(ahead=lambda parts: ((part, None) for part in parts))
    (part,) = decoded(open_source(tmp_path), 32, [range(1)], 0, refusing)
    assert np.array_equal(np.asarray(part.values)[0], by_pillow(jpeg(32, 32), 32))
    assert part.bad == []
    assert "DALI refused an image near" in capsys.readouterr().out


def opened(path, decoder, **more):
    return open_data(str(path), image_size=32, num_classes=None, flip=True, decoder=decoder, **more)


def run_of(data, start=0, num_workers=0, batch_size=4):
    settings = {"batch_size": batch_size, "seed": 3, "start": start, "stop": 30}
    parts = batches(data, **settings, num_workers=num_workers, device=CPU)
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def test_training_reads_the_same_images_by_dali(dali, tmp_path):
    path = folder(tmp_path)
    images, labels = run_of(opened(path, "dali"))
    by_pil, same_labels = run_of(opened(path, "pil"))
    assert torch.equal(labels, same_labels)
    assert (images.int() - by_pil.int()).abs().max() <= 2
    assert not torch.equal(images, by_pil)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_anywhere_in_the_same_bits(dali, tmp_path, num_workers):
    data = opened(folder(tmp_path), "dali")
    images, labels = run_of(data)
    for start, batch_size in itertools.product((0, 3, 17), (1, 4)):
        found = run_of(data, start, num_workers, batch_size)
        assert torch.equal(found[0], images[start:])
        assert torch.equal(found[1], labels[start:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_in_training_is_one_line(dali, tmp_path, num_workers):
    path = folder(tmp_path)
    data = opened(path, "dali")
    (path / "a" / "06.jpg").write_bytes((path / "a" / "06.jpg").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"06\.jpg cannot be read as an image: ") as error:
        run_of(data, num_workers=num_workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_by_dali_the_same_images_take_the_place_of_damaged_ones(dali, tmp_path, num_workers, capsys):
    """In the same bits as where they come by themselves, whatever else is in a batch with a damaged one."""
    path = folder(tmp_path)
    whole = opened(path, "dali").read_for_dali(np.arange(10)).values
    for name, end in (
        ("a/06.jpg", 200),
        ("a/08.jpg", -60),
        ("b/01.jpg", -60),
        ("b/03.png", 200),
    ):  # -60: the header is whole
        (path / name).write_bytes((path / name).read_bytes()[:end])
    data, pil = (opened(path, decoder, skip_seed=3) for decoder in ("dali", "pil"))
    capsys.readouterr()
    images, labels = run_of(data, num_workers=num_workers)
    said = capsys.readouterr().out
    by_pil, same_labels = run_of(pil)
    assert torch.equal(labels, same_labels)
    assert (images.int() - by_pil.int()).abs().max() <= 2
    assert sorted(said.splitlines()) == sorted(capsys.readouterr().out.splitlines())
    assert said.count("another image taken in its place") == 4
    known = {i: torch.from_numpy(by_dali([value], 32)[0]) for i, value in enumerate(whole) if isinstance(value, bytes)}
    for item, image in zip(sample_ids(3, 0, 30, 10).tolist(), images, strict=True):
        while item in (3, 4, 5, 6):
            item = following(3, item, 10)
        assert item == 8 or torch.equal(image.int(), known[item].int()), "8 is a PNG"
    assert torch.equal(run_of(data, 3, num_workers, batch_size=3)[0], images[3:])


def test_prepare_says_what_decodes_and_the_manifest_too(dali, tmp_path, capsys):
    main = importlib.import_module("fastmask.prepare").main
    path, flags = folder(tmp_path / "images"), ["--space", "pixel", "--image-size", "32", "--num-workers", "0"]
    for decoder, said in (("dali", "DALI on cpu"), ("pil", "Pillow")):
        main([str(path), str(tmp_path / decoder), *flags, "--decoder", decoder])
        assert f"JPEG files are decoded by {said}, others by Pillow" in capsys.readouterr().out
    ours, theirs = (opened(tmp_path / name, "auto") for name in ("dali", "pil"))
    assert (ours.manifest.decoder, theirs.manifest.decoder) == ("dali on cpu", "pillow")
    pixels, others = (data.read(np.arange(10))[0].int() for data in (ours, theirs))
    assert 0 < (pixels - others).abs().max() <= 2
    unfinished = ["--shard-size", "4", "--batch-size", "2"]
    (path / "b" / "09.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"09\.jpg cannot be read"):
        main([str(path), str(tmp_path / "store"), *flags, *unfinished, "--decoder", "dali"])
    with pytest.raises(ValueError, match=r"of something else \(decoder dali on cpu -> pillow\)"):
        main([str(path), str(tmp_path / "store"), *flags, *unfinished, "--decoder", "pil"])


def test_a_run_that_was_stopped_ends_in_the_same_bits(dali, tmp_path, capsys):
    """Trained on JPEG files by DALI: 6 steps at once, and 3 and 3."""
    main = importlib.import_module("fastmask.train").main
    newest_good = importlib.import_module("fastmask.training.checkpoint").newest_good
    load_file = importlib.import_module("safetensors.torch").load_file
    arguments = ["--preset", "digits", "--data", str(folder(tmp_path / "images")), "--image-size", "16", "--flip"]
    arguments += ["--decoder", "dali", "--batch-size", "4", "--unmask-steps", "0", "--width", "16", "--depth", "1"]
    arguments += ["--decoder-width", "16", "--decoder-depth", "1", "--sample-every", "0", "--checkpoint-every", "3"]
    arguments += ["--device", "cpu", "--optimizer", "torch"]
    for run, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        main([*arguments, "--run-dir", str(tmp_path / run), "--max-steps", str(steps)])
        assert ": JPEG files decoded by DALI" in capsys.readouterr().out
    whole, parts = (load_file(newest_good(tmp_path / run, print) / "model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_images_are_encoded_as_they_come(dali, tmp_path):
    small_vae(scaling_factor=0.5, shift_factor=0.1).save_pretrained(tmp_path / "vae")
    data = opened(folder(tmp_path / "images"), "dali", vae=str(tmp_path / "vae"))
    assert isinstance(data, ImageDataset)
    assert data.shape == (4, 4, 4)
    pixels, _ = run_of(data)
    sample = torch.arange(len(pixels))
    latents = data.to_images(pixels, 3, sample)
    assert latents.shape == (30, 4, 4, 4)
    assert not latents.requires_grad
    images = opened(tmp_path / "images", "dali").to_images(pixels, 3, sample)  # some flipped, by seed and sample
    with torch.no_grad():
        exact = small_vae().eval().encode(images).latent_dist
    # Noise of unit variance is what is left, a function of seed and sample.
    noise = ((latents / 0.5 + 0.1) - exact.mean) / exact.std
    assert abs(noise.std() - 1) < 0.1
    torch.testing.assert_close(data.to_images(pixels[7:9], 3, sample[7:9]), latents[7:9])


def test_which_decoder(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert (pick_decoder("auto"), pick_decoder("pil")) == ("pil", "pil")
    with pytest.raises(
        ValueError, match="DALI is not installed: pip install nvidia-dali-cuda130, or give --decoder pil"
    ):
        pick_decoder("dali")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert (pick_decoder("auto"), pick_decoder("dali"), pick_decoder("pil")) == ("dali", "dali", "pil")


def test_what_a_jpeg_is():
    assert is_jpeg(jpeg(16, 16))
    assert not is_jpeg(b"")
    assert not is_jpeg(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.parametrize("side", [(64, 64), (100, 75), (256, 300), (375, 517)])
def test_the_gpu_agrees(dali, side):
    """nvJPEG may round colours otherwise than libjpeg; what follows is the same."""
    content = jpeg(*side)
    ((_, pixels),) = JpegDecoder(64, 1, torch.device("cuda"), 1).ahead([SimpleNamespace(values=[content])])
    difference = (pixels.cpu()[0].int() - torch.from_numpy(by_pillow(content, 64))).abs().float()
    assert pixels.device.type == "cuda"
    assert difference.mean() <= 3
    assert difference.quantile(0.999) <= 12


@pytest.mark.gpu
def test_parts_without_a_jpeg_leave_the_gpus_pipeline_alone(dali, monkeypatch):
    """What DALI is given instead is taken: a pipeline that refused it would be built again for every such part."""
    built, build = [], JpegDecoder._pipeline
    monkeypatch.setattr(JpegDecoder, "_pipeline", lambda self, feed: built.append(feed) or build(self, feed))
    plain = np.full((3, 64, 64), 7, np.uint8)
    given = [SimpleNamespace(values=part) for part in ([jpeg(64, 70)], [plain], [plain, jpeg(80, 64)], [plain])]
    found = list(JpegDecoder(64, 2, torch.device("cuda"), 1).ahead(given))
    assert [pixels is not None for _, pixels in found] == [True, False, True, False]
    assert torch.equal(found[2][1][0].cpu(), torch.from_numpy(plain))
    assert len(built) == 1
