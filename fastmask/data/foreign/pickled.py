"""A safe reader for the pickle of one plain numpy array.

The opcodes are interpreted here, not by `pickle`: neither it nor numpy is called with anything from the pickle, since
both trust their input (a dtype accepts a state that reads and writes the process's memory, an array a buffer with a
negative offset, and a memo its size). Only the values that `numpy.ndarray.__reduce__` and `__reduce_ex__` write are
accepted.
"""

import dataclasses
import math
import pickletools
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_OPCODES = 500  # an array's pickle has about 40
_DTYPE = re.compile(r"f[248]")
_ORDERS = {"<", ">", "|", "="}

_INTEGERS = frozenset({"INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1"})
_TEXTS = frozenset({"UNICODE", "BINUNICODE", "SHORT_BINUNICODE"})
_BYTES = frozenset({"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NUMPYS = frozenset({"_reconstruct", "_frombuffer", "ndarray", "dtype"})
_MARK = object()


class _Name(str):
    """Placeholder for a function or class, by name."""


@dataclasses.dataclass
class _Dtype:
    """Placeholder for a dtype: "f4", and its byte order."""

    kind: str
    order: str = "="


@dataclasses.dataclass
class _Array:
    """Placeholder for an array; `_build` fills in its values."""

    shape: tuple[int, ...] = ()
    dtype: _Dtype | None = None
    fortran: bool = False
    values: bytes = b""


def unpickle_array(content: bytes) -> NDArray[Any]:
    """Return the float array in a pickle.

    Raises:
        ValueError: the pickle is damaged, or holds anything else.
    """
    try:
        found = _interpret(content)
    # The errors of the opcode parser, the stack and the memo on damaged input.
    except (IndexError, KeyError, struct.error, OverflowError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__})") from error
    if not isinstance(found, _Array) or found.dtype is None:
        raise ValueError(f"it holds {_shown(found)}")
    order = found.dtype.order if found.dtype.order in "<>" else "="
    dtype = np.dtype(order + found.dtype.kind)
    length = math.prod(found.shape) * dtype.itemsize
    if length != len(found.values):
        raise ValueError(f"it holds {len(found.values):,} bytes for {dtype} of shape {found.shape}")
    values = np.frombuffer(found.values, dtype)
    return values.reshape(found.shape, order="F" if found.fortran else "C")


def _interpret(content: bytes) -> Any:
    """Run a pickle's opcodes on the placeholders above and return the result."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    parts: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(content)
    for count, (opcode, argument, _) in enumerate(parts):
        name = opcode.name
        if count >= _MAX_OPCODES:
            raise ValueError("it has more parts than an array has")
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        # Constants and names.
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _INTEGERS or name in _TEXTS or name in _BYTES:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(_Name(_checked_name(str(argument).replace(" ", ".", 1))))
        elif name == "STACK_GLOBAL":
            module, attribute = _popped(stack, 2)
            stack.append(_Name(_checked_name(f"{module}.{attribute}")))
        # Tuples.
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            place = len(stack) - 1 - stack[::-1].index(_MARK)
            stack[place:] = [tuple(stack[place + 1 :])]
        elif name in _TUPLES:
            stack.append(_popped(stack, _TUPLES[name]))
        # Calls and states.
        elif name == "REDUCE":
            function, arguments = _popped(stack, 2)
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            (state,) = _popped(stack, 1)
            _build(stack[-1], state)
        # The memo.
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        else:
            raise ValueError(f"it has a {name}, which an array's pickle has not")
    raise ValueError("it is cut off")


def _popped(stack: list[Any], count: int) -> tuple[Any, ...]:
    if len(stack) < count:
        raise IndexError
    found = tuple(stack[len(stack) - count :])
    del stack[len(stack) - count :]
    return found


def _checked_name(name: str) -> str:
    """Return the name of a function or class without numpy's module path, which differs between versions."""
    if name == "_codecs.encode":
        return name
    module, _, attribute = name.rpartition(".")
    if attribute in _NUMPYS and re.fullmatch(r"numpy(\._?core\.(multiarray|numeric))?", module):
        return attribute
    raise ValueError(f"it holds {name[:80]}")


def _call(function: Any, arguments: Any) -> Any:
    """Return the placeholder for a call that numpy writes; a ValueError for any other call."""
    match (str(function) if isinstance(function, _Name) else None), arguments:
        case "_codecs.encode", (str(text), "latin1"):
            return text.encode("latin-1")
        case "_reconstruct", (_Name("ndarray"), (0,), b"b"):
            return _Array()
        case "dtype", (str(kind), int(), int()) if _DTYPE.fullmatch(kind):
            return _Dtype(kind)
        case "_frombuffer", (bytes() | bytearray() as values, _Dtype() as dtype, tuple(shape), "C" | "F" as order):
            return _Array(_checked_shape(shape), dtype, order == "F", bytes(values))
    raise ValueError(f"it calls {_shown(function)} with other arguments than an array's pickle does")


def _build(built: Any, state: Any) -> None:
    """Set the state of a placeholder as numpy writes it; a ValueError for any other state."""
    match built, state:
        case _Array(dtype=None), (1, tuple(shape), _Dtype() as dtype, bool(fortran), bytes(values)):
            built.shape, built.dtype, built.fortran, built.values = _checked_shape(shape), dtype, fortran, values
            return
        case _Dtype(), (3, str(order), None, None, None, -1, -1, 0) if order in _ORDERS:
            built.order = order
            return
    raise ValueError(f"it gives {_shown(built)} a state that an array's pickle has not")


def _checked_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    if len(shape) > 8 or any(type(side) is not int or not 0 <= side < 2**40 for side in shape):
        raise ValueError("its shape is none of an array")
    return tuple(shape)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, _Name) else type(value).__name__.strip("_").lower()
