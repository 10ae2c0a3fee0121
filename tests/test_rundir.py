"""What a path names of a run, and whether it is as it was written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import Trained

from fastmask.diffusion.weights import load_maskdit
from fastmask.rundir import find_checkpoint, find_weights, is_source, locate, share_of_start, snapshots
from fastmask.training.checkpoint import Checkpointer

SOURCES = "name a run folder, one of its checkpoints/step-N, or a .safetensors or .pt file of weights"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of two checkpoints and snapshots; not to be changed by a test."""
    run_dir, trained = tmp_path_factory.mktemp("runs") / "run", Trained()
    with Checkpointer(run_dir, 9) as checkpointer:
        for step in (1, 2):
            trained.begin(checkpointer, step, snapshot=True)
            trained.step()
    (run_dir / "run.json").write_text("{}")
    return run_dir


@pytest.fixture
def run_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def flip(path, at=-3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def refused(source, average=True):
    with pytest.raises(ValueError, match=r".") as error:
        find_weights(source, average, pytest.fail)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("average", [True, False], ids=["ema", "raw"])
def test_whatever_names_a_run_or_a_part_of_it_names_its_weights(run_dir, average):
    name = f"{'ema' if average else 'model'}.safetensors"
    first, last = (run_dir / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    for source, file in [
        (run_dir, last / name),
        (f"{run_dir}/", last / name),
        (run_dir / "checkpoints", last / name),
        (first, first / name),
        (str(first) + os.sep, first / name),
        (first / "ema.safetensors", first / "ema.safetensors"),
        (snapshots(run_dir)[0].path, snapshots(run_dir)[0].path),
    ]:
        assert find_weights(source, average, pytest.fail) == file, source


def test_load_maskdit_takes_them_all(run_dir):
    for source in (run_dir, run_dir / "checkpoints", *(run_dir / "checkpoints").iterdir(), snapshots(run_dir)[0].path):
        assert len(load_maskdit(source).model.blocks) == 1
    stored = load_file(run_dir / "checkpoints" / "step-00000002" / "model.safetensors")
    for name, tensor in load_maskdit(str(run_dir), weights="raw").state_dict().items():
        assert torch.equal(tensor, stored[name])


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.bin"])
def test_a_folder_of_diffusers_is_its_weights(tmp_path, name):
    (tmp_path / "config.json").touch()
    assert not is_source(tmp_path)
    with pytest.raises(ValueError, match=r"holds no weights but config\.json"):
        locate(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert locate(tmp_path) == (None, None, tmp_path / name)
    assert is_source(tmp_path)


@pytest.mark.parametrize(
    ("inside", "source", "run"),
    [
        ("..", "run", "run"),
        (".", ".", "."),
        ("checkpoints", ".", ".."),
        ("checkpoints/step-00000001", ".", "../.."),
        ("checkpoints/step-00000001", "..", "../.."),
        ("checkpoints/step-00000001", "ema.safetensors", "../.."),
        ("snapshots", "step-00000001-0.05.safetensors", ".."),
        ("checkpoints", "step-00000001", ".."),
    ],
)
def test_relative_paths(run_dir, monkeypatch, inside, source, run):
    monkeypatch.chdir(run_dir / inside)
    place = locate(source)
    assert str(place.run) == run
    assert (place.run / "run.json").exists()
    assert place.checkpoint is None or place.checkpoint.resolve().name == "step-00000001"


def test_a_checkpoint_that_was_copied_out_of_its_run(run_dir, tmp_path):
    copy = shutil.copytree(run_dir / "checkpoints" / "step-00000001", tmp_path / "mine")
    aside = shutil.copytree(copy, run_dir / "checkpoints" / "step-00000001-aside")
    for folder in (copy, aside):
        assert locate(folder) == (None, folder, None)
        assert find_weights(folder, True, pytest.fail) == folder / "ema.safetensors"
    flip(copy / "ema.safetensors")
    assert refused(copy) == f"{copy} is damaged (ema.safetensors differs from its checksum in SHA256SUMS)"


def test_what_is_there_is_said_where_nothing_is_found(run_dir, tmp_path):
    gone = run_dir / "checkpoints" / "step-00000003"
    above = run_dir / "checkpoints"
    assert refused(gone) == f"{gone} does not exist, and {above} holds step-00000001, step-00000002: {SOURCES}"
    far = run_dir / "a" / "b.pt"
    assert refused(far) == f"{far} does not exist, and {run_dir} holds checkpoints, run.json, snapshots: {SOURCES}"
    other = tmp_path / "other"
    other.mkdir()
    assert refused(other) == f"{other} holds nothing: {SOURCES}"
    for name in "hgfedcba":
        (other / name).touch()
    assert refused(other) == f"{other} holds no weights but a, b, c, d, e, f and 2 more: {SOURCES}"
    shutil.rmtree(run_dir / "checkpoints")
    wait = "wait for its first one (--checkpoint-every), or"
    assert refused(run_dir) == f"{run_dir} holds no checkpoint of a run, but run.json, snapshots: {wait} {SOURCES}"


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(run_dir):
    first, last = (run_dir / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    flip(last / "ema.safetensors")
    said = []
    assert find_weights(run_dir, True, said.append) == first / "ema.safetensors"
    damage = "ema.safetensors differs from its checksum in SHA256SUMS"
    assert said == [f"{last} is damaged ({damage}): taking {first}"]
    assert find_weights(run_dir, False, pytest.fail) == last / "model.safetensors"  # which is not damaged
    assert refused(last) == f"{last} is damaged ({damage}): name {run_dir} for the newest that is whole"
    assert refused(last / "ema.safetensors") == refused(last)
    flip(first / "ema.safetensors")
    both = f"step-00000002 ({damage}), step-00000001 ({damage})"
    assert refused(run_dir) == f"no checkpoint in {run_dir / 'checkpoints'} is whole: {both}"


@pytest.mark.parametrize("name", ["ema.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["gone", "gone with its checksum", "empty", "a bit flipped", "no checksum"])
def test_every_file_that_is_used_is_checked(run_dir, name, damage):
    folder = run_dir / "checkpoints" / "step-00000002"
    if damage.startswith("gone"):
        (folder / name).unlink()
    elif damage == "empty":
        (folder / name).write_bytes(b"")
    elif damage == "a bit flipped":
        flip(folder / name)
    if damage.endswith("checksum"):
        lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
        (folder / "SHA256SUMS").write_text("".join(line for line in lines if name not in line))
    assert f"{folder} is damaged ({name} " in refused(folder)


def test_a_file_that_is_not_used_is_not_asked_for(run_dir):
    """An optimizer's state is larger than the weights, and may have been deleted to save space."""
    for folder in (run_dir / "checkpoints").iterdir():
        (folder / "optimizer.safetensors").unlink()
        (folder / "profiles.safetensors").write_bytes(b"")
    assert find_weights(run_dir, True, pytest.fail).parent.name == "step-00000002"
    names = ("model.safetensors", "ema.safetensors")
    assert find_checkpoint(locate(run_dir), names, pytest.fail).name == "step-00000002"


def test_a_checkpoint_of_the_first_format(run_dir):
    folder = run_dir / "checkpoints" / "step-00000002"
    (folder / "SHA256SUMS").unlink()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 1}))
    assert refused(folder).startswith(f"{folder} is damaged (state.json is of format 1, and this version reads 2")
    (folder / "state.json").write_text(json.dumps({key: state[key] for key in state if key != "format"}))
    assert find_weights(folder, True, pytest.fail) == folder / "ema.safetensors"
    (folder / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[:-9])
    assert refused(folder).startswith(f"{folder} is damaged (ema.safetensors cannot be read as weights")


@pytest.mark.parametrize(
    ("state", "share"),
    [
        ({"step": 40, "config": {"ema_decay": 0.9999}}, 0.9999**40),
        ({"step": 40_000, "config": {"ema_decay": 0.9999}}, 0.9999**40_000),
        ({"step": 40, "config": {"ema_decay": 0.9999}, "ema_warmup": True}, 0.0),
        ({"step": 40, "config": {"ema_decay": 0.9999}, "ema_warmup": False}, 0.9999**40),
        ({"step": 40, "config": {"ema_decay": 1.0}}, 1.0),
        ({"step": 40, "config": {"ema_decay": 0.0}}, 0.0),
        ({"step": 0, "config": {"ema_decay": 0.9999}}, 1.0),
        ({"step": 3}, 0.0),
        (
            {
                "step": 1100,
                "config": {"ema_decay": 0.99},
                "changes": [
                    {"step": 500, "field": "lr", "from": 1, "to": 2},
                    {"step": 1000, "field": "ema_decay", "from": 0.9999, "to": 0.99},
                ],
            },
            0.9999**1000 * 0.99**100,
        ),
    ],
    ids=str,
)
def test_share_of_the_first_weights_in_an_average(state, share):
    assert share_of_start(state) == pytest.approx(share)


def test_an_average_that_has_not_warmed_up_is_said(tmp_path):
    short = Trained().save(tmp_path / "short", 40, config={"ema_decay": 0.9999})
    for source in (tmp_path / "short", short, short / "ema.safetensors"):
        said = []
        find_weights(source, True, said.append)
        assert said == [
            f"{short / 'ema.safetensors'} still holds 100% of the weights that the run began with: the raw ones, of "
            f"model.safetensors, may be better (fastmask.sample --weights raw)"
        ]
        if source != short / "ema.safetensors":
            find_weights(source, False, pytest.fail)
    for name, state in [
        ("long", {"config": {"ema_decay": 0.9}}),
        ("warm", {"config": {"ema_decay": 0.9999}, "ema_warmup": True}),
    ]:
        Trained().save(tmp_path / name, 40, **state)
        find_weights(tmp_path / name, True, pytest.fail)


def test_names_of_snapshots(run_dir):
    folder = run_dir / "snapshots"
    found = snapshots(run_dir)
    assert [(s.step, s.width) for s in found] == [(1, 0.05), (1, 0.1), (2, 0.05), (2, 0.1)]
    for name in ("step-00000001-0.05 (copy)", "step-00000001-0.05.1", "step-1-0.05"):
        shutil.copy(found[0].path, folder / f"{name}.safetensors")
    assert snapshots(run_dir) == found
    shutil.copy(found[0].path, folder / "step-00000003-1e-05.safetensors")
    assert snapshots(run_dir)[-1].width == 1e-5
