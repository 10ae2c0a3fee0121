"""`fastmask.evaluate` on runs of the digits and of other data, and on images."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from util import small_net

from fastmask.diffusion.weights import load_maskdit
from fastmask.evaluate import main
from fastmask.evaluation import classifier
from fastmask.sample import main as sample
from fastmask.train import main as train
from fastmask.training.checkpoint import Checkpointer, checkpoints, step_of

SMALL = ["--width", "16", "--depth", "1", "--num-heads", "2", "--decoder-width", "16", "--decoder-depth", "1"]
SMALL += ["--decoder-num-heads", "2", "--batch-size", "8", "--sample-every", "0", "--device", "cpu", "--max-steps", "3"]
SMALL += ["--unmask-steps", "1", "--report-every", "1", "--checkpoint-every", "1"]
QUICK = ["--sample-steps", "2", "--seed", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps and what its evaluation leaves; not to be changed by a test."""
    run_dir = tmp_path_factory.mktemp("run")
    train(["--run-dir", str(run_dir), *SMALL])
    main([str(run_dir), *QUICK])
    return run_dir


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Colour images, 12 x 12, of three classes: a bright square at the left, in the middle or at the right."""
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    images = generator.integers(0, 120, (300, 12, 12, 3)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:4, label * 4 : label * 4 + 4] += 130
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "_STEPS", 60)
    monkeypatch.chdir(tmp_path)


def results(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_a_run_gets_its_evaluation(trained):
    found = results(trained)
    protocol = found.pop("protocol")
    assert found.keys() == {
        *("agreement", "classifier_accuracy", "distance_ratio", "frechet", "frechet_bias", "frechet_held_out"),
        *("kernel_distance", "precision", "recall", "density", "coverage", "images_per_s", "train_s", "step"),
    }
    assert found["step"] == 3
    assert 0 <= found["agreement"] < 0.5  # three steps teach little
    assert found["frechet"] > found["frechet_held_out"]
    assert found["images_per_s"] > 0
    expected = {"samples": 359, "sample_steps": 2, "seed": 1, "cfg_scale": 1.5, "solver": "heun", "weights": "ema"}
    assert expected.items() <= protocol.items()
    assert protocol["source"].endswith("checkpoints/step-00000003")
    assert re.fullmatch(r"[0-9a-f]{64}", protocol["extractor_sha256"])
    assert protocol["reference"] == "digits (held out)"
    for name in ("comparison.png", "loss.png"):
        with Image.open(trained / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] > 500
        assert pixels.std() > 10
    assert not list(trained.glob(".partial*"))


def test_evaluating_again_gives_the_same(trained, capsys):
    before = (trained / "evaluation.json").read_text()
    main([str(trained), *QUICK])
    assert (trained / "evaluation.json").read_text() == before
    out = capsys.readouterr().out
    assert re.search(r"agreement \d+\.\d% .* \(the classifier reads 9\d\.\d% of real ones\)", out)
    assert "with fewer than 10,000 images this distance is too large, here by about" in out
    written = [line.split("/")[-1] for line in out.splitlines()[-3:]]
    assert written == ["evaluation.json", "comparison.png", "loss.png"]


def test_batches_do_not_matter(trained, tmp_path):
    main([str(trained), *QUICK, "--out", "a.json", "--batch-size", "100"])
    ours, theirs = json.loads((tmp_path / "a.json").read_text()), results(trained)
    for name in ("frechet", "agreement", "distance_ratio"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_a_run_on_other_data(squares, tmp_path, capsys):
    """A classifier is trained on the run's own images; another evaluation finds it in the cache."""
    run_dir = tmp_path / "run"
    train(["--run-dir", str(run_dir), *SMALL, "--data", str(squares)])
    main([str(run_dir), *QUICK])
    out = capsys.readouterr().out
    assert "training a classifier on 240 images of" in out
    found = results(run_dir)
    assert found["classifier_accuracy"] > 0.9
    assert found["agreement"] < 0.7
    assert found["protocol"]["samples"] == found["protocol"]["reference_images"] == 60
    assert (run_dir / "comparison.png").exists()
    main([str(run_dir), *QUICK])
    assert "training a classifier" not in capsys.readouterr().out
    assert results(run_dir) == found
    # Other real images: the classifier learns from the run's, all of which are training images now.
    main([str(run_dir), *QUICK, "--reference", str(squares), "--num-samples", "30"])
    assert results(run_dir)["protocol"]["reference_images"] == 300
    assert results(run_dir)["protocol"]["samples"] == 30


def test_a_folder_of_images(squares, tmp_path, capsys):
    """The real images themselves, as files: no distance."""
    with np.load(squares) as arrays:
        for i, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
            folder = tmp_path / "images" / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:06d}.png")
    main(["images", "--reference", str(squares)])
    found = results(tmp_path)
    assert found["frechet"] < 0.1
    assert found["agreement"] > 0.95
    assert found["precision"] > 0.99
    assert "distance_ratio" not in found  # a folder names no training images
    assert not (tmp_path / "loss.png").exists()
    # The same in a file of ADM's evaluator; other images are far away.
    with np.load(squares) as arrays:
        np.savez("adm.npz", arrays["images"], arrays["labels"])
        np.savez("noise.npz", np.random.default_rng(0).integers(0, 256, (200, 12, 12, 3)).astype(np.uint8))
    main(["adm.npz", "--reference", str(squares), "--extrapolate"])
    assert results(tmp_path)["frechet"] < 0.1
    assert "frechet_infinity" in results(tmp_path)
    main(["noise.npz", "--reference", str(squares)])
    assert results(tmp_path)["frechet"] > 1
    assert "agreement" not in results(tmp_path)  # no labels


def test_images_that_the_sampler_wrote(trained, tmp_path):
    """The same metrics by way of a folder, with its table of classes, and of an .npz; both have three channels."""
    for out in ("drawn", "drawn.npz"):
        sample([str(trained), "--out", out, "--num-samples", "359", *QUICK])
        main([out, "--reference", "digits", "--out", f"{out}.json"])
    ours, arrays = (json.loads((tmp_path / f"{out}.json").read_text()) for out in ("drawn", "drawn.npz"))
    main([str(trained), *QUICK, "--num-samples", "359", "--reference", "digits", "--out", "direct.json"])
    direct = json.loads((tmp_path / "direct.json").read_text())
    for name in ("frechet", "agreement", "precision", "kernel_distance"):
        assert ours[name] == arrays[name] == pytest.approx(direct[name], rel=1e-5)
    (tmp_path / "drawn" / "000000.png").unlink()
    with pytest.raises(ValueError, match=r"labels.csv has 359 rows, and 358 images lie beside it"):
        main(["drawn", "--reference", "digits"])


def test_bad_input(trained, squares, tmp_path):
    np.savez("small.npz", images=np.arange(30 * 192).reshape(30, 8, 8, 3).astype(np.uint8))
    np.savez("few.npz", images=np.zeros((4, 12, 12, 3), np.uint8))
    np.savez("one.npz", images=np.zeros((1, 12, 12, 3), np.uint8))
    np.savez("foreign.npz", images=np.zeros((9, 12, 12, 3), np.uint8), labels=np.arange(9) % 8)
    np.savez("stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez("others.npz", samples=np.zeros(4))
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ([str(squares)], "holds images, which are compared with real ones: name these by --reference"),
        (["small.npz", "--reference", "digits"], "small.npz holds images in colour, and those of digits are grey"),
        (["few.npz", "--reference", str(squares)], "few.npz holds 4 images, and a comparison needs at least 6"),
        ([str(squares), "--reference", "few.npz"], "few.npz holds 4 images, and a comparison needs at least 6"),
        (["one.npz", "--reference", str(squares)], "one.npz holds 1 image, and"),
        ([str(trained), "--num-samples", "5"], "--num-samples 5: a comparison needs at least 6 images"),
        (["empty", "--reference", str(squares)], "empty"),
        (["absent.npz", "--reference", str(squares)], "absent.npz does not exist"),
        (
            [str(squares), "--reference", "absent"],
            "^absent does not exist: images are a dataset, a folder, or an .npz$",
        ),
        (
            [str(squares), "--reference", "stats.npz"],
            "stats.npz holds statistics of Inception's features, where images",
        ),
        (
            ["stats.npz", "--reference", str(squares)],
            "stats.npz holds statistics of Inception's features, where images",
        ),
        ([str(squares), "--reference", "others.npz"], "others.npz holds no `arr_0` or `images`, where images"),
        (["foreign.npz", "--reference", str(squares)], "foreign.npz names class 7, and .* has the classes 0 .. 2"),
        (
            [str(trained), "--extractor", "inception", "--extractor-weights", "none"],
            "none does not exist|torch-fidelity",
        ),
        ([str(trained), "--extractor-weights", "x"], "--extractor-weights are those of inception or dinov2"),
        ([str(trained), "--out", "empty"], "--out empty: empty is a folder: name a file"),
        ([str(trained), "--num-samples", "-1"], "--num-samples must be at least 0"),
        ([str(trained), "--sample-steps", "1"], "--sample-steps must be at least 2"),
        ([str(trained), "--num-steps", "9"], "--num-steps is called --sample-steps now"),
    ]:
        with pytest.raises(ValueError, match=message):
            main(arguments)


@pytest.mark.parametrize(
    "flags", [["--num-samples", "9"], ["--seed", "1"], ["--weights", "raw"], ["--vae", "x"], ["--cfg-scale", "2"]]
)
def test_flags_of_sampling_do_not_go_with_images(squares, flags):
    with pytest.raises(ValueError, match=f"^{flags[0]} decides how samples are drawn, and .* holds images: leave it"):
        main([str(squares), "--reference", str(squares), *flags])


def test_images_that_were_drawn_without_labels_agree_with_no_class(trained, tmp_path):
    sample([str(trained), "--out", "drawn.npz", "--num-samples", "30", *QUICK, "--unconditional"])
    main(["drawn.npz", "--reference", "digits"])
    assert "agreement" not in results(tmp_path)
    assert results(tmp_path)["frechet"] > 0


def test_grey_images_with_one_channel_and_with_three_are_compared(trained, squares, tmp_path):
    """A network of grey images, or an .npz of theirs, against PNG files, which are read in three channels."""
    sample([str(trained), "--out", "drawn", "--num-samples", "30", *QUICK])
    main([str(trained), *QUICK, "--num-samples", "30", "--reference", "drawn", "--out", "evaluation.json"])
    assert results(tmp_path)["frechet"] < 1e-3
    assert "agreement" in results(tmp_path)
    assert "classifier_accuracy" not in results(tmp_path)  # a folder names no classes
    with np.load(squares) as arrays:
        np.savez("grey.npz", images=arrays["images"][..., :1], labels=arrays["labels"])
        np.savez("thrice.npz", images=arrays["images"][..., [0, 0, 0]], labels=arrays["labels"])
    for first, second in (("grey.npz", "thrice.npz"), ("thrice.npz", "grey.npz")):
        main([first, "--reference", second])
        assert results(tmp_path)["frechet"] < 1e-3
    with pytest.raises(ValueError, match=r"holds images in colour, and those of grey.npz are grey"):
        main(["grey.npz", "--reference", str(squares)])


def test_a_run_whose_dataset_has_changed_or_is_gone(squares, tmp_path, capsys):
    moved = shutil.copy(squares, tmp_path / "data.npz")
    train(["--run-dir", "run", *SMALL, "--data", "data.npz", "--image-size", "12", "--patch-size", "4"])
    main(["run", *QUICK, "--num-samples", "30"])
    assert "has changed" not in capsys.readouterr().out
    with np.load(squares) as arrays:
        np.savez("data.npz", images=255 - arrays["images"], labels=arrays["labels"])
    main(["run", *QUICK, "--num-samples", "30"])
    assert (
        "data.npz has changed since run was trained on it: it is compared with other images" in capsys.readouterr().out
    )
    Path(moved).rename(tmp_path / "moved.npz")
    with pytest.raises(ValueError, match=r"^the dataset of run, data.npz, is not there any more: name the real images"):
        main(["run", *QUICK])
    main(["run", *QUICK, "--num-samples", "30", "--reference", "moved.npz"])
    assert "data.npz, is not there any more: its samples are compared with moved.npz alone" in capsys.readouterr().out
    assert results(tmp_path / "run")["frechet"] > 0


def test_a_damaged_checkpoint_is_passed_over_and_one_that_is_named_is_judged(trained, tmp_path, capsys):
    """The figures are those of the checkpoint that was judged."""
    run_dir = shutil.copytree(trained, tmp_path / "run")
    first, last = checkpoints(run_dir)
    main([str(first), "--sample-steps", "2"])
    assert json.loads((run_dir / "evaluation.json").read_text())["step"] == step_of(first) == 2
    content = bytearray((last / "ema.safetensors").read_bytes())
    content[-3] ^= 1
    (last / "ema.safetensors").write_bytes(content)
    (run_dir / "evaluation.json").unlink()
    main([str(run_dir), "--sample-steps", "2"])
    assert f"{last} is damaged (ema.safetensors differs from its checksum in SHA256SUMS): taking {first}" in (
        capsys.readouterr().out
    )
    assert json.loads((run_dir / "evaluation.json").read_text())["step"] == 2


def test_figures_after_the_checkpoint_do_not_count(trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    line = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])
    with (run_dir / "stats.jsonl").open("a") as file:
        file.write(json.dumps({**line, "step": 4, "train_s": 1e6}) + "\n" + '{"step": 5, "lo')
    main([str(run_dir), "--sample-steps", "2"])
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert found["step"] == 3
    assert found["train_s"] < 1e6
    # A run that reported nothing has no loss to draw.
    (run_dir / "stats.jsonl").write_text("")
    (run_dir / "loss.png").unlink()
    main([str(run_dir), "--sample-steps", "2"])
    assert "train_s" not in results(run_dir)
    assert not (run_dir / "loss.png").exists()


def test_weights_alone_need_a_reference(trained, squares, tmp_path):
    """A checkpoint knows its dataset, wherever it was copied to; a file of weights does not."""
    copied = shutil.copytree(checkpoints(trained)[-1], tmp_path / "copied")
    main([str(copied), *QUICK])
    assert results(tmp_path)["frechet"] == results(trained)["frechet"]
    file = shutil.copy(copied / "ema.safetensors", tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights.safetensors names no dataset .*: name one by --reference"):
        main([str(file)])
    with pytest.raises(ValueError, match=r"squares.npz holds images in colour, and those of .*weights.safetensors are"):
        main([str(file), "--reference", str(squares)])
    np.savez("large.npz", images=np.zeros((9, 12, 12, 1), np.uint8))
    with pytest.raises(ValueError, match=r"the generated images are 1 x 8 x 8, and large.npz holds 1 x 12 x 12"):
        main([str(file), "--reference", "large.npz"])
    main([str(file), *QUICK, "--reference", "digits"])  # the training scans
    assert results(tmp_path)["frechet"] == pytest.approx(results(trained)["frechet"], rel=0.2)
    assert "distance_ratio" not in results(tmp_path)


def test_a_run_without_labels(tmp_path, capsys):
    run_dir = tmp_path / "run"
    train(["--run-dir", str(run_dir), *SMALL, "--num-classes", "0"])
    main([str(run_dir), *QUICK, "--reference", "digits"])
    assert "has changed" not in capsys.readouterr().out  # the run's dataset has labels, which it did not use
    assert results(run_dir)["frechet"] > 1
    assert "agreement" not in results(run_dir)


def test_a_checkpoint_without_configuration(tmp_path):
    net = small_net(in_channels=1, num_classes=10)
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(1, net, {}, torch.optim.AdamW(net.parameters()), {})
    with pytest.raises(ValueError, match="names no dataset to compare its samples with: name one by --reference"):
        main([str(tmp_path)])
    assert not (tmp_path / "evaluation.json").exists()


def test_what_is_no_run(trained, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for source, message in [
        (tmp_path / "empty", "empty holds no checkpoint of a run, but checkpoints: name a run folder"),
        (tmp_path / "absent", "absent does not exist, and .* holds .*empty.*: name a run folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            main([str(source)])
    with pytest.raises(ValueError, match="did you mean --sample-steps"):
        main([str(trained), "--sample-step", "2"])


def test_training_evaluates_as_this_command_does(tmp_path, capsys):
    """At the steps asked for and at the last; a killed run resumes with the same numbers and the same best."""
    flags = [*SMALL, "--evaluate-every", "2", "--evaluate-samples", "40", "--keep-best", "--sample-steps", "2"]
    flags += ["--lr", "1e-2", "--keep-checkpoints", "9"]
    train(["--run-dir", "whole", *flags, "--max-steps", "5"])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "stats.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval/frechet"] for line in lines if "eval/frechet" in line}
    assert evaluated.keys() == {2, 4, 5}
    assert "Frechet distance" in capsys.readouterr().out
    # The command finds the same.
    main(["whole/checkpoints/step-00000004", "--num-samples", "40", "--sample-steps", "2", "--out", "a.json"])
    assert json.loads((tmp_path / "a.json").read_text())["frechet"] == pytest.approx(evaluated[4], rel=1e-9)
    # The best is the one with the smallest distance.
    with safe_open("whole/best.safetensors", "pt") as file:
        stated = file.metadata()
    assert float(stated["frechet"]) == min(evaluated.values())
    step = int(stated["step"])
    best, ema = load_maskdit("whole/best.safetensors"), load_maskdit(f"whole/checkpoints/step-{step:08d}")
    for name, tensor in ema.state_dict().items():
        assert torch.equal(best.state_dict()[name], tensor)
    # Stopped after step 3 and resumed.
    train(["--run-dir", "parts", *flags, "--max-steps", "5"])
    for later in checkpoints(tmp_path / "parts")[3:]:
        shutil.rmtree(later)
    train(["--run-dir", "parts", *flags, "--max-steps", "5"])
    again = [json.loads(line) for line in (tmp_path / "parts" / "stats.jsonl").read_text().splitlines()]
    assert {line["step"]: line["eval/frechet"] for line in again if "eval/frechet" in line} == evaluated
    assert (tmp_path / "parts" / "best.safetensors").read_bytes() == (
        tmp_path / "whole" / "best.safetensors"
    ).read_bytes()


def test_a_failed_evaluation_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fastmask.evaluation.evaluator.compare", fail)
    train(["--run-dir", "run", *SMALL, "--evaluate-every", "2", "--evaluate-samples", "20", "--sample-steps", "2"])
    assert "step 2 was not evaluated: out of memory" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").exists()


def test_flags_of_evaluations_in_training():
    with pytest.raises(ValueError, match="--keep-best keeps the best of the evaluations: give --evaluate-every"):
        train([*SMALL, "--keep-best"])
    with pytest.raises(ValueError, match="evaluate_samples must be at least 20, not 3"):
        train([*SMALL, "--evaluate-every", "1", "--evaluate-samples", "3"])
