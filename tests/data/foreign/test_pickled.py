import collections
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmask.data.foreign.pickled import unpickle_array

VALUES = np.random.default_rng(0).standard_normal((8, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "values",
    [VALUES, VALUES.astype(np.float16), VALUES.astype(">f8"), VALUES.T, VALUES[:, ::2], np.float32([1.0]), np.ones(())],
)
def test_an_array(values, protocol):
    found = unpickle_array(pickle.dumps(values, protocol))
    assert np.array_equal(found, values)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_an_array_of_any_numpy(module):
    content = pickle.dumps(VALUES, 2)
    assert content.count(b"numpy._core.multiarray") == 1
    assert np.array_equal(unpickle_array(content.replace(b"numpy._core.multiarray", module.encode())), VALUES)


class Harm:
    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize(
    "value",
    [
        Harm(),
        collections.OrderedDict(),
        [VALUES],
        (VALUES, VALUES),
        {"latent": VALUES},
        "text",
        b"bytes",
        None,
        3,
        np.float32(3),
        np.dtype("f4"),
        VALUES.astype(int),
        np.array(["a"]),
        np.array([{}], object),
        np.zeros(3, [("a", "f4")]),
        np.ma.masked_array(VALUES),
        np.random.default_rng(0),
    ],
    ids=range(17),
)
def test_anything_else_is_refused(value, capsys):
    for protocol in range(6):
        with pytest.raises(ValueError, match=r"^it (holds|calls|has|gives) ") as error:
            unpickle_array(pickle.dumps(value, protocol))
        assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_tensor_is_refused():
    with pytest.raises(ValueError, match=r"^it holds torch"):
        unpickle_array(pickle.dumps(torch.zeros(3)))


def test_any_damage_is_one_line():
    random = np.random.default_rng(0)
    for protocol in (2, 4, 5):
        whole = pickle.dumps(VALUES, protocol)
        for length in [0, 1, 60, len(whole) - 1]:
            with pytest.raises(ValueError):  # noqa: PT011  (what it says depends on where it was cut)
                unpickle_array(whole[:length])
        for place in random.integers(0, 250, 300):
            content = bytearray(whole)
            content[place] = random.integers(256)
            try:
                assert unpickle_array(bytes(content)).shape
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017  (whatever was damaged)


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module, attribute):
    return b"c" + f"{module}\n{attribute}\n".encode()


def number(value):
    content = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + content


FLOATS = name("numpy", "dtype") + text("f4") + b"\x89\x88\x87R"  # dtype("f4", False, True)
STATE = b"(K\x03" + text("<") + b"NNN" + number(-1) * 2 + b"K\x00t"
EMPTY = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
SHAPE = number(8) + b"\x85"

# Each is what a stranger could put into a `.latent`, and did something to the process that unpickled it.
ATTACKS = {
    "a dtype of a state by hand": FLOATS + b"(K\x03" + text("<") + b"NNN" + number(2**31 - 1) * 2 + b"K\x00tb",
    "a dtype of fields by hand": FLOATS + b"(K\x03" + text("|") + b"N(" + text("a") + b"t}" + b"K\x04K\x04K\x00tb",
    "a dtype of objects": name("numpy", "dtype") + text("O8") + b"\x89\x88\x87R",
    "a dtype with a subarray": FLOATS
    + b"(K\x03"
    + text("<")
    + FLOATS
    + SHAPE
    + b"\x86NN"
    + number(-1) * 2
    + b"K\x00tb",
    "a negative offset": name("numpy", "ndarray") + b"(" + SHAPE + FLOATS + b"C\x04abcd" + number(-4096) + b"tR",
    "memory as it is": name("numpy", "ndarray") + SHAPE + FLOATS + b"\x86R",
    "200 GB": name("numpy", "ndarray") + number(50 * 10**9) + b"\x85" + FLOATS + b"\x86R",
    "200 GB by its state": EMPTY + b"(K\x01" + number(50 * 10**9) + b"\x85" + FLOATS + b"\x89C\x04abcdtb",
    "200 GB by its buffer": name("numpy.core.numeric", "_frombuffer")
    + b"(C\x04abcd"
    + FLOATS
    + number(50 * 10**9)
    + b"\x85"
    + text("C")
    + b"tR",
    "a shape that overflows": EMPTY + b"(K\x01" + number(2**62) * 2 + number(4) + b"\x87" + FLOATS + b"\x89C\x00tb",
    "a negative shape": EMPTY + b"(K\x01" + number(-1) + b"\x85" + FLOATS + b"\x89C\x04abcdtb",
    "a shape of no numbers": EMPTY + b"(K\x01" + text("a") + b"\x85" + FLOATS + b"\x89C\x04abcdtb",
    "a state of another version": EMPTY + b"(K\x02" + SHAPE + FLOATS + b"\x89C\x04abcdtb",
    "a state that is a list": EMPTY + b"(K\x01" + SHAPE + FLOATS + b"\x89]tb",
    "an array that is built twice": EMPTY + (b"(K\x01" + number(1) + b"\x85" + FLOATS + b"\x89C\x04abcdtb") * 2,
    "BUILD on the class dtype": name("numpy", "dtype") + b"}" + text("__doc__") + b"Nsb",
    "SETITEM on a dtype": FLOATS + text("names") + number(-(2**40)) + b"s",
    "SETITEMS on an array": EMPTY + b"(K\x00K\x01u",
    "APPEND to an array": EMPTY + b"K\x00a",
    "an attribute of a module": name("numpy", "core.multiarray.scalar") + FLOATS + b"C\x04abcd\x86R",
    "a function beside": name("numpy.core.multiarray", "fromfile") + text("/etc/passwd") + b"\x85R",
    "a module beside": name("numpy.f2py.crackfortran", "_reconstruct") + b")R",
    "an object made without its call": name("numpy", "ndarray") + b")\x81",
    "INST": b"(inumpy\ndtype\n",
    "OBJ": b"(" + name("numpy", "dtype") + text("f4") + b"o",
    "EXT": b"\x82\x01",
    "PERSID": b"Pa\n",
    "a memo of 64 GB": b"Nr" + struct.pack("<I", 2**32 - 1) + b".",
    "bytes of a length that is not there": b"\x8e" + struct.pack("<Q", 2**40) + b"abc",
    "text of a length that is not there": b"X" + struct.pack("<I", 2**32 - 1) + b"abc",
    "a bytearray of a length that is not there": b"\x96" + struct.pack("<Q", 2**40) + b"abc",
    "a frame of a length that is not there": b"\x95" + struct.pack("<Q", 2**62) + b"N",
    "a number of a million digits": b"I" + b"9" * 10**6 + b"\n",
    "a million parts": b"N" * 10**6,
    "tuples of tuples": b"N" + b"2\x86" * 200,
    "tuples that hold one another": b"N" + b"q\x00h\x00\x86" * 100,
    "a mark alone": b"t",
    "nothing on the stack": b"R",
    "a memo that is not there": b"h\x07",
    "a call of a tuple": b"))R",
    "a name of no text": b"K\x01K\x02\x93",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_one_line(attack):
    with pytest.raises(ValueError, match=r".") as error:
        unpickle_array(ATTACKS[attack] + b".")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_pickled import ATTACKS, limit_memory
from fastmask.data.foreign.pickled import unpickle_array

limit_memory(300 << 20)
for attack, content in ATTACKS.items():
    try:
        unpickle_array(content + b".")
    except ValueError:
        print("refused")
"""


def limit_memory(more):
    """Let this process take so many bytes more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_attacks_take_no_memory():
    command = [sys.executable, "-c", CODE, str(Path(__file__).parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "refused\n" * len(ATTACKS)
