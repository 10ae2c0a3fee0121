"""The operators that run in a block, and the bytes that they read and write."""

import collections
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
_INPUTS = ("empty", "rand")  # parts of names of operators that make the inputs of what is counted


class Operators(TorchDispatchMode):
    """Counts the operators that are not views and make no inputs.

    Attributes:
        launches: the number of operators.
        moved: bytes read and written, each tensor once per operator, by whether the operator is a matmul.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.moved: collections.Counter[bool] = collections.Counter()

    @property
    def bytes(self) -> int:
        """Bytes read and written by all operators."""
        return sum(self.moved.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten.copy_.default  # copy_ does not read its target
        read = {id(t): t for t in tree_leaves((args[copies:], kwargs)) if isinstance(t, Tensor)}
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in read.values()}
        is_view = all(t.untyped_storage()._cdata in storages for t in written) and not func._schema.is_mutable
        if written and not is_view and not any(part in func.name() for part in _INPUTS):
            self.launches += 1
            self.moved[func.name() in _PRODUCTS] += sum(size(t) for t in (*read.values(), *written))
        return out


def size(t: Tensor) -> int:
    """Return the bytes of a tensor's values; expanded dimensions count once."""
    values = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        values *= length if stride else 1
    return values * t.element_size()
