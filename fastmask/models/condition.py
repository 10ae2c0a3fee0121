"""The condition: what a network is told besides the noise, such as class ids.

A condition is a tensor, or nested dicts and tuples of tensors, with the batch as first dimension of each. The dataset
makes it and the network reads it. Everything between passes it on as one value: it moves, slices and joins the tensors,
and asks the network to drop, check or omit the condition, by the members that `ClassConditional` has.
"""

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Condition: TypeAlias = Any


class ClassConditional:
    """The members by which a network says what its condition is, for class ids: labels, int64, shape (B,).

    A network with another condition has the same members; a subclass of `MaskDiT` overrides them, and
    `MaskDiT.embed_condition`.

    Attributes:
        num_classes: labels are 0 .. num_classes - 1, and num_classes means no label; 0 is an unconditional network.
    """

    num_classes: int

    @property
    def conditional(self) -> bool:
        """Whether the network reads its condition; otherwise any condition is ignored."""
        return self.num_classes > 0

    def drop(self, condition: Condition, chosen: Tensor) -> Condition:
        """Return the condition, dropped for the chosen samples; no host sync.

        Args:
            condition: the condition of B samples.
            chosen: bool, shape (B,), on the same device.
        """
        return condition.masked_fill(chosen, self.num_classes) if self.num_classes else condition

    def no_condition(self, batch: int) -> Condition:
        """Return the condition of ``batch`` samples without one, on the CPU."""
        return torch.full((batch,), self.num_classes)

    def check_condition(self, condition: Condition, batch: int, *, values: bool = True) -> None:
        """Raise a ValueError unless this is a condition of ``batch`` samples.

        Args:
            condition: the condition.
            batch: B.
            values: whether to read the values, a host sync on a GPU, and not only shapes and dtypes.
        """
        if not self.num_classes:
            return
        labels = cast(Tensor, condition)
        if labels.shape != (batch,) or labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"labels must be int64 of shape ({batch},), not {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if not values:
            return
        bad = labels[(labels < 0) | (labels > self.num_classes)]
        if bad.numel():
            raise ValueError(
                f"label {int(bad[0])} is outside 0 .. {self.num_classes - 1} (or {self.num_classes} for no label)"
            )


def is_readable(condition: Condition) -> bool:
    """Return whether values can be read without a host sync: on the CPU only, and not those of fake or traced tensors.

    Fake tensors are a subclass.
    """
    if torch.compiler.is_compiling():
        return False
    return all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tree_leaves(condition))


def count_of(condition: Condition) -> int:
    """Return the number of samples of a condition."""
    return len(tree_leaves(condition)[0])


def moved(condition: Condition, device: torch.device) -> Condition:
    """Return a condition on a device."""
    return tree_map(lambda tensor: tensor.to(device), condition)


def part_of(condition: Condition, first: int, stop: int) -> Condition:
    """Return the condition of samples ``first`` .. ``stop - 1``, or of as many as there are."""
    return tree_map(lambda tensor: tensor[first:stop], condition)


def joined(*conditions: Condition) -> Condition:
    """Return the condition of the samples of several conditions, in their order."""
    return tree_map(lambda *tensors: torch.cat(tensors), *conditions)
