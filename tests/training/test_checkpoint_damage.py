"""Checkpoints that are no longer what was written."""

import json

import pytest
from test_checkpoint import FILES, Trained, assert_same, names

from fastmask.training.checkpoint import newest_good


@pytest.fixture(scope="module")
def trained():
    """Not to be changed by a test."""
    return Trained()


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def newest(run_dir):
    """Return the newest good checkpoint, and what was said of newer ones."""
    said = []
    return newest_good(run_dir, said.append), said


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "cut off", "overwritten", "a bit flipped"])
def test_a_damaged_checkpoint_is_one_line_and_the_one_before_is_taken(tmp_path, trained, name, damage):
    before, folder = (trained.save(tmp_path, step) for step in (1, 2))
    assert newest(tmp_path) == (folder, [])
    content = (folder / name).read_bytes()
    changed = {
        "cut off": content[:-1],
        "overwritten": b"\0" * len(content),
        "a bit flipped": flipped(content, 4 * len(content)),
    }
    (folder / name).write_bytes(changed.get(damage, b""))
    if damage == "gone":
        (folder / name).unlink()
    found, (line,) = newest(tmp_path)
    assert found == before
    assert line.startswith(f"{folder} is damaged (")
    assert line.endswith(f"): resuming from {before}")
    assert name in line.removeprefix(str(folder))
    assert "\n" not in line
    assert line.count(str(tmp_path)) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, trained, name):
    folder = trained.save(tmp_path)
    content = (folder / name).read_bytes()
    # In the tensors some of the bytes, in the text every one.
    for byte in range(0, len(content), max(1, len(content) // 400)):
        (folder / name).write_bytes(flipped(content, 8 * byte + byte % 8))
        with pytest.raises(ValueError, match="is whole: step-00000001"):
            newest(tmp_path)
    (folder / name).write_bytes(content)
    assert newest(tmp_path) == (folder, [])


def test_a_checksum_left_out_is_found(tmp_path, trained):
    sums = trained.save(tmp_path) / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    for k in range(5):
        sums.write_text("".join(lines[:k] + lines[k + 1 :]))
        with pytest.raises(ValueError, match="differs from its checksum"):
            newest(tmp_path)


def test_all_damaged(tmp_path, trained):
    for step in (1, 2):
        (trained.save(tmp_path, step) / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint in ") as error:
        newest(tmp_path)
    faults = "step-00000002 (ema.safetensors is missing), step-00000001 (ema.safetensors is missing)"
    assert f"no checkpoint in {tmp_path / 'checkpoints'} is whole: {faults}; bring one back" in str(error.value)


def test_no_checkpoint_is_nothing_to_say(tmp_path):
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "absent") == (None, [])


def test_a_run_that_went_on_from_before_drops_what_was_damaged(tmp_path, trained):
    for step in (1, 2, 3):
        trained.save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "SHA256SUMS").unlink()
    found, said = newest(tmp_path)
    assert [found.name, len(said)] == ["step-00000001", 2]
    trained.save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002"]
    assert newest(tmp_path)[1] == []


def as_first_format(folder):
    """Make of a checkpoint what the first version wrote: no checksums, nor word of them."""
    (folder / "SHA256SUMS").unlink()
    state = json.loads((folder / "state.json").read_text())
    del state["format"]
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_checkpoint_of_the_first_format_loads(tmp_path, trained):
    folder, other = as_first_format(trained.save(tmp_path, 3)), Trained(steps=0, seed=1)
    assert newest(tmp_path) == (folder, [])
    assert other.load(folder) == {"step": 3}
    assert_same(other.tensors(), trained.tensors())


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut off", "overwritten"])
def test_damage_to_the_first_format(tmp_path, trained, name, damage):
    before, folder = (as_first_format(trained.save(tmp_path, step)) for step in (1, 2))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes({"cut off": content[:-1], "overwritten": b"\0" * len(content)}.get(damage, b""))
    if damage == "gone":
        (folder / name).unlink()
    found, (line,) = newest(tmp_path)
    assert found == before
    assert line.startswith(f"{folder} is damaged ({name} ")


@pytest.mark.parametrize("content", [None, "", '{"step": 1', "[3]"])
def test_a_state_of_the_first_format_that_cannot_be_read(tmp_path, trained, content):
    folder = as_first_format(trained.save(tmp_path))
    (folder / "state.json").unlink()
    if content is not None:
        (folder / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"is whole: step-00000001 \(state\.json .*\); bring one") as error:
        newest(tmp_path)
    assert "\n" not in str(error.value)
