import io

import numpy as np
import pytest

from fastmask.data.foreign.npy import parse_header, parse_npy


def saved(values, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(values), **options)
    return file.getvalue()


def with_header(text, values=b"", version=1):
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + values


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8", "|u1", "|i1", "<i8", ">u2"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0, 4), (2, 3, 4)])
def test_what_numpy_writes(dtype, shape):
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for content in (saved(values), saved(values.copy(order="F")), saved(values, version=(2, 0))):
        found = parse_npy(content, "a.npy")
        assert np.array_equal(found, values)
        assert (found.shape, found.dtype) == (shape, np.dtype(dtype))
    header = parse_header(saved(values)[:128], "a.npy")
    assert (header.dtype, header.shape, header.offset, header.bytes) == (values.dtype, shape, 128, values.nbytes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin as one"),
        (b"PK\x03\x04" * 40, "does not begin as one"),
        (saved(np.zeros(3))[:60], "its header is"),
        (saved(np.zeros(3))[:-1], r"it has 23 bytes of values, and its header says float64 of shape \(3,\)"),
        (saved(np.zeros(3)) + b"x", "it has 25 bytes of values"),
        (saved(np.array(["a"])), "cannot be read as an .npy of numbers: its header is"),
        (saved(np.array([{}], object), allow_pickle=True), "cannot be read as an .npy of numbers"),
        (saved(np.zeros(3, [("a", "f4")])), "cannot be read as an .npy of numbers"),
        (saved(np.zeros(3, complex)), "cannot be read as an .npy of numbers"),
        (saved(np.zeros(3, bool)), "cannot be read as an .npy of numbers"),
        (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }"), "its shape is"),
        (
            with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (50000000000, 1000), }", b"1234"),
            r"it has 4 bytes of values, and its header says float32 of shape \(50000000000, 1000\)",
        ),
        (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", b"1234"), "its header is"),
        (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1 2,), }", b"1234"), "its shape is"),
        (with_header(b"{'descr': '<f1', 'fortran_order': False, 'shape': (1,), }", b"1"), "its header is"),
        (with_header(b"(" * 60_000), "its header is"),
        (with_header(b"[" * 10_000_000, version=2), "its header is"),
        (with_header(b"__import__('os').system('true')"), "its header is"),
    ],
)
def test_what_is_not_an_npy_of_numbers(content, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_npy(content, "some/a.npy")
    assert str(error.value).startswith("some/a.npy cannot be read as an .npy")
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


def test_any_damage_is_one_line():
    whole = saved(np.arange(12, dtype=np.float32).reshape(3, 4))
    random = np.random.default_rng(0)
    refused = []
    for _ in range(500):
        content = bytearray(whole[: random.integers(len(whole))] if random.random() < 0.2 else whole)
        for place in random.integers(0, max(1, min(len(content), 128)), 2):
            content[place : place + 1] = random.bytes(1)
        try:
            parse_npy(bytes(content), "a.npy")
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 400
    assert not any("\n" in message for message in refused)
