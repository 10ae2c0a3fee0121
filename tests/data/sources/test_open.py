import os
import socket
import tarfile

import pytest

from fastmask.data.sources.folders import SPECIAL
from fastmask.data.sources.open import open_source


def files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_nothing_that_is_known(tmp_path):
    files(tmp_path, "a.rar")
    with pytest.raises(ValueError, match=r"gone does not exist: name a folder, or a \.tar, \.zip, \.parquet"):
        open_source(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"a\.rar is no folder, and no \.tar, \.zip, "):
        open_source(tmp_path / "a.rar")


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.parquet", "a.npz", "a-idx", "a"])
def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is a pipe, a socket or a device: name a folder, or a \.tar"):
        open_source(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{name} is a pipe, a socket or a device"):
        open_source(tmp_path / name)
    (tmp_path / name).unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"{name} is a pipe, a socket or a device"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "images-idx", "state.json", "dataset_dict.json"])
def test_a_pipe_in_a_folder_does_not_say_what_it_is(tmp_path, name):
    files(tmp_path, "cat/a.png")
    os.mkfifo(tmp_path / name)
    source = open_source(tmp_path)
    assert source.class_names == ["cat"]
    assert source.left_out == {SPECIAL: [name]}


def test_splits_of_a_data_set_are_all_named(tmp_path):
    files(tmp_path, "dataset_dict.json", "validation/x", "test/x", "train/x")
    with pytest.raises(ValueError, match=r"holds several splits: name one of them, .*") as error:
        open_source(tmp_path)
    assert str(error.value).endswith(" or ".join(f"{tmp_path}/{name}" for name in ("train", "test", "validation")))


def test_parquet_files_of_several_splits(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001-b42a775f407cee45"):
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(ValueError, match=r"holds several splits \(train, test\): put the files of one, or links to"):
        open_source(tmp_path)


def tar(path, *names):
    with tarfile.open(path, "w") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(name))


@pytest.mark.parametrize("other", ["a.png", "cat/a.png", "b.parquet", "train-images-idx3-ubyte"])
def test_several_kinds_of_images_in_a_folder(tmp_path, other):
    tar(tmp_path / "0.tar", "a.jpg")
    files(tmp_path, other)
    with pytest.raises(
        ValueError, match=rf"holds tars \(0\.tar\) beside other images \(.*{other}\): name those that are"
    ):
        open_source(tmp_path)


def test_class_tars_beside_another(tmp_path):
    tar(tmp_path / "n00000001.tar", "a.jpg")
    tar(tmp_path / "more.tar", "a.jpg")
    with pytest.raises(ValueError, match=r"holds tars of classes \(n00000001\.tar\) and another, .*more\.tar: move"):
        open_source(tmp_path)


def test_what_lies_beside_tars_is_told(tmp_path):
    tar(tmp_path / "0.tar", "a.jpg")
    files(tmp_path, "README.md", "logs/x.txt", ".cache/a.png", "._0.tar")
    os.mkfifo(tmp_path / "pipe")
    source = open_source(tmp_path)
    assert len(source) == 1
    assert source.left_out == {"beside them": ["README.md", "logs"], SPECIAL: ["pipe"]}
