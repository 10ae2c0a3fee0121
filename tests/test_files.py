import pytest

from fastmask.files import whole_file, write_durably


def test_a_whole_file(tmp_path):
    path = tmp_path / "deep" / "er" / "out.txt"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as partial:
        partial.write_text("ne\udcff", "ascii")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_never_began(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "out.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_durable_file(tmp_path):
    path = tmp_path / "new" / "out.txt"
    for content in (b"first", b"second"):
        write_durably(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
