import inspect
import json
import os
import socket
import sys

import pytest

from fastmask.data.sources.folders import EMPTY, HIDDEN, NO_IMAGE, SPECIAL
from fastmask.data.sources.open import open_source


def files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def everything(source):
    """Return (name, content, label) of all images."""
    return [(source.name(i), *source.read(i)) for i in range(len(source))]


def test_a_folder_per_class(tmp_path):
    files(tmp_path, "dog/b.png", "cat/z.JPG", "cat/deep/a.png", "cat/notes.txt")
    source = open_source(tmp_path)
    assert (source.kind, source.channels, source.class_names) == ("folder", 3, ["cat", "dog"])
    assert source.left_out == {NO_IMAGE: ["cat/notes.txt"]}
    assert everything(source) == [
        (str(tmp_path / name), name.encode(), label)
        for name, label in [("cat/deep/a.png", 0), ("cat/z.JPG", 0), ("dog/b.png", 1)]
    ]


def test_a_class_folder_without_files_is_told(tmp_path):
    files(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "cow" / "calf").mkdir(parents=True)
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert source.left_out == {EMPTY: ["cow/calf/"]}


def test_a_folder_without_classes(tmp_path):
    files(tmp_path, "b.png", "a.png")
    source = open_source(tmp_path)
    assert source.class_names == []
    assert [label for _, _, label in everything(source)] == [0, 0]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("labels", "names"), [((2, 0), ["0", "1", "2"]), (("dog", "cat"), ["cat", "dog"])])
def test_labels_of_a_file(tmp_path, listed, labels, names):
    files(tmp_path, "x/a.png", "b.png")
    given = {"x/a.png": labels[0], "b.png": labels[1], "gone.png": labels[0]}
    (tmp_path / "labels.json").write_text(json.dumps({"labels": list(given.items())} if listed else given))
    source = open_source(tmp_path)
    assert source.class_names == names
    assert source.left_out == {}
    assert source.notes == [f"{tmp_path / 'labels.json'} names 1 files that are no images here: gone.png"]
    found = {name: names[label] for name, _, label in everything(source)}
    assert found == {str(tmp_path / "x" / "a.png"): str(labels[0]), str(tmp_path / "b.png"): str(labels[1])}


def test_names_of_class_folders(tmp_path):
    files(tmp_path, "n1/a.png", "n2/b.png")
    (tmp_path / "labels.json").write_text('{"n1": "tench", "n2": "goldfish"}')
    assert open_source(tmp_path).class_names == ["tench", "goldfish"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"a.png": 1.5}', r"the label of a\.png must be a number or a name, not 1\.5"),
        ('{"a.png": 1}', r"has no label for b\.png, and for 1 of 2 images"),
        ('{"a.png": 1, "b.png": "x"}', r"mixes labels that are names \(x\) with labels that are numbers \(1\)"),
        ('{"a.png": 1, "b.png": -1}', "label -1 is below 0"),
        ('{"a.png": 1, "b.png": 1099511627776}', "label 1099511627776 is above 999999"),
        ('{"a.png": 1, "b.png": 3000000}', "label 3000000 is above 999999"),
        ('{"labels": [["a.png", 1], ["../b.png", 1]]}', r"names \.\./b\.png, which leads out of the folder"),
        ('{"labels": [["a.png", 1], ["a.png", 2]]}', "names a.png twice"),
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
        (" " * (2**20 + 4096) + "{}", "has 1,052,674 bytes, which is above the limit of 1,050,624"),
    ],
)
def test_labels_that_cannot_be(tmp_path, text, message):
    files(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=rf"labels\.json.*{message}") as error:
        open_source(tmp_path)
    assert "\n" not in str(error.value)
    assert len(open_source(tmp_path, labelled=False)) == 2


def test_many_files_have_a_long_list(tmp_path):
    names = [f"{'x' * 250}/{'y' * 250}/{'z' * 250}/{number}.png" for number in range(1500)]
    files(tmp_path, *names)
    content = json.dumps(dict.fromkeys(names, 1))
    assert len(content) > 2**20
    (tmp_path / "labels.json").write_text(content)
    assert open_source(tmp_path).labels.tolist() == [1] * 1500


def test_folders_that_cannot_be(tmp_path):
    files(tmp_path, "a/b.txt")
    with pytest.raises(ValueError, match=r"holds no images: expected .*/CLASS/IMAGE\.png"):
        open_source(tmp_path)
    files(tmp_path, "a/b.png", "c.png")
    with pytest.raises(ValueError, match=r"images beside its class folders \(c\.png\): move them into one.*classes 0"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, labelled=False)) == 2


def test_symbolic_links_are_followed_and_a_loop_is_found(tmp_path):
    files(tmp_path, "elsewhere/a.png", "data/x/b.png")
    (tmp_path / "data" / "y").symlink_to(tmp_path / "elsewhere")
    source = open_source(tmp_path / "data")
    assert source.class_names == ["x", "y"]
    (tmp_path / "data" / "x" / "up").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match=r"x/up is a symbolic link to a folder that holds it: remove the link"):
        open_source(tmp_path / "data")


def test_a_link_to_itself_is_an_image_that_cannot_be_read(tmp_path):
    files(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    source = open_source(tmp_path)
    with pytest.raises(OSError, match=r"b\.png"):
        source.read(1)


def test_what_systems_leave_behind_is_neither_a_class_nor_an_image(tmp_path):
    """Of Jupyter, macOS, Windows and Synology's disks."""
    files(tmp_path, "cat/0.jpg", "dog/0.jpg")
    hidden = [".ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/cat/._0.jpg", "cat/._0.jpg", "@eaDir/0.jpg"]
    hidden += [".DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "cat/.ipynb_checkpoints/0-checkpoint.jpg"]
    files(tmp_path, *hidden)
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert everything(source) == [
        (str(tmp_path / "cat/0.jpg"), b"cat/0.jpg", 0),
        (str(tmp_path / "dog/0.jpg"), b"dog/0.jpg", 1),
    ]
    told = [".DS_Store", ".ipynb_checkpoints/", "@eaDir/", "__MACOSX/", "cat/._0.jpg", "cat/.ipynb_checkpoints/"]
    assert source.left_out == {HIDDEN: [*told, "cat/Thumbs.db", "dog/desktop.ini"]}
    assert source.lines() == [
        "folder, 2 images, 2 classes by folder: cat, dog",
        "left out, hidden, or left behind by a system: 8 (.DS_Store, .ipynb_checkpoints/, @eaDir/, ...)",
    ]


def test_a_folder_of_nothing_else(tmp_path):
    files(tmp_path, "cat/._0.jpg", "notes.txt")
    with pytest.raises(ValueError, match=r"holds no images: expected .*; found cat/\._0\.jpg, notes\.txt$"):
        open_source(tmp_path)


def test_folders_that_are_numbers_are_in_their_order(tmp_path):
    files(tmp_path, *(f"{number}/a.png" for number in range(12)))
    source = open_source(tmp_path)
    assert source.class_names == [str(number) for number in range(12)]
    assert {name: label for name, _, label in everything(source)} == {
        str(tmp_path / str(number) / "a.png"): number for number in range(12)
    }
    assert source.lines() == ["folder, 12 images, 12 classes by folder: 0, 1, 2, ..., 11"]


def edm(folder, labels):
    """Write images as EDM's dataset_tools does, and their labels."""
    files(folder, "00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_labels_of_dataset_tools(tmp_path):
    edm(tmp_path, [["00000/img00000001.png", 2], ["00000/img00000000.png", 6], ["00001/img00001000.png", 9]])
    source = open_source(tmp_path)
    assert [label for _, _, label in everything(source)] == [6, 2, 9]
    assert source.left_out == {}
    assert source.lines() == [
        "folder, 3 images, 10 classes by dataset.json: 0, 1, 2, ..., 9",
        "7 of the classes have no image",
    ]


def test_dataset_tools_without_labels(tmp_path):
    edm(tmp_path, None)
    source = open_source(tmp_path)
    assert [label for _, _, label in everything(source)] == [0, 0, 0]
    assert source.lines() == ["folder, 3 images, no classes", "dataset.json says that there are no labels"]
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"img00000000\.png\), whose folders are no classes, but has no dataset\.json"):
        open_source(tmp_path)
    assert open_source(tmp_path, labelled=False).class_names == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["00000/img00000000.png", 6]], r"no label for 00000/img00000001\.png, and for 2 of 3 images"),
        ([["../img00000000.png", 6]], r"names \.\./img00000000\.png, which leads out of the folder"),
        ([["00000/img00000000.png", [0.1, 0.2]]], r"must be a number or a name, not \[0\.1, 0\.2\]"),
    ],
)
def test_labels_of_dataset_tools_that_cannot_be(tmp_path, labels, message):
    edm(tmp_path, labels)
    with pytest.raises(ValueError, match=rf"dataset\.json.*{message}"):
        open_source(tmp_path)


def test_a_dataset_json_of_something_else_is_told(tmp_path):
    files(tmp_path, "cat/a.png")
    (tmp_path / "dataset.json").write_text('{"title": "my photos"}')
    source = open_source(tmp_path)
    assert source.lines() == [
        "folder, 1 images, 1 class by folder: cat",
        "dataset.json holds no labels, and is left out",
    ]


def test_two_lists_of_labels(tmp_path):
    edm(tmp_path, None)
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds labels\.json and dataset\.json: remove the one .*--num-classes 0"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, labelled=False)) == 3


def test_numbers_of_class_folders(tmp_path):
    files(tmp_path, "n1/a.png", "n2/b.png")
    (tmp_path / "labels.json").write_text('{"n1": 4, "n2": 1}')
    source = open_source(tmp_path)
    assert [label for _, _, label in everything(source)] == [4, 1]
    (tmp_path / "labels.json").write_text('{"n1": 4}')
    with pytest.raises(ValueError, match=r"has no label for n2/b\.png"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "names", [("train/cat/a.png", "val/cat/b.png"), ("train/a.png", "test/b.png"), ("Test/a.png",)]
)
def test_splits_are_no_classes(tmp_path, names):
    files(tmp_path, *names)
    first = tmp_path / names[0].split("/")[0]
    with pytest.raises(
        ValueError, match=rf"holds splits, not classes \(.*\): name one of them, {first}, or --num-clas"
    ):
        open_source(tmp_path)
    assert len(open_source(tmp_path, labelled=False)) == len(names)


def test_classes_below_one_folder(tmp_path):
    files(tmp_path, "images/cat/a.png", "images/dog/b.png")
    with pytest.raises(ValueError, match=rf"in the folders of one folder: name that, {tmp_path}/images, or --num-clas"):
        open_source(tmp_path)
    assert open_source(tmp_path / "images").class_names == ["cat", "dog"]
    (tmp_path / "images" / "labels.json").write_text('{"cat": 1, "dog": 0}')
    with pytest.raises(ValueError, match=rf"name that, {tmp_path}/images, or --num-classes 0"):
        open_source(tmp_path)


def test_latents_are_sent_to_prepare(tmp_path):
    files(tmp_path, "00000/img-mean-std-00000000.npy")
    with pytest.raises(ValueError, match=r"latents are made a store by python -m fastmask\.prepare$"):
        open_source(tmp_path)


def test_pipes_sockets_and_endless_devices_are_left_out(tmp_path):
    files(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "labels.json")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "d.png"))
        source = open_source(tmp_path)
    assert everything(source) == [(str(tmp_path / "a.png"), b"a.png", 0)]
    assert source.left_out == {SPECIAL: ["b.png", "c.png", "d.png", "labels.json"]}


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path):
    files(tmp_path, "a.png")
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is not a regular file"):
        source.read(0)


def test_a_file_of_any_length_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"a\.png has 1,099,511,627,776 bytes, which is above the limit"):
        open_source(tmp_path).read(0)


def test_names_that_are_not_utf8(tmp_path):
    """As of a zip made on Windows: read by their bytes, told with these escaped."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xe9\n.png", "wb") as file:
        file.write(b"it")
    source = open_source(tmp_path)
    assert source.class_names == [r"caf\udce9"]
    assert everything(source) == [(str(tmp_path / r"caf\udce9" / r"\udce9\n.png"), b"it", 0)]
    "".join([*source.lines(), source.name(0)]).encode()


def test_folders_in_folders_in_folders(tmp_path):
    """Deeper than Python may call itself."""
    folder = tmp_path.joinpath(*["d"] * 300)
    files(folder, "a.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        assert len(open_source(tmp_path, labelled=False)) == 1
    finally:
        sys.setrecursionlimit(limit)
