"""What a network says of its condition, for class ids, and what is done to a condition without looking inside."""

import pytest
import torch
from util import small_net

from fastmask.models.condition import count_of, is_readable, joined, moved, part_of

NESTED = {"a": (torch.arange(4), torch.ones(4, 2)), "b": torch.zeros(4, 3, 2)}


def test_labels_are_dropped_for_the_chosen_samples():
    model, labels = small_net().model, torch.tensor([0, 4, 1, 5])
    assert model.conditional
    assert model.drop(labels, torch.tensor([True, False, False, True])).tolist() == [5, 4, 1, 5]
    assert labels.tolist() == [0, 4, 1, 5]
    assert model.no_condition(3).tolist() == [5, 5, 5]


def test_an_unconditional_network_takes_any_condition():
    model = small_net(num_classes=0).model
    assert not model.conditional
    assert model.drop(NESTED, torch.ones(4, dtype=torch.bool)) is NESTED
    model.check_condition(NESTED, 7)
    assert model.no_condition(2).shape == (2,)


def test_labels_are_checked():
    model = small_net().model
    for fine in (torch.tensor([0, 5]), torch.tensor([4, 1], dtype=torch.int32)):
        model.check_condition(fine, 2)
    for wrong in (torch.tensor([0]), torch.tensor([[0], [0]]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\), not "):
            model.check_condition(wrong, 2, values=False)
    for label in (-1, 6):
        labels = torch.tensor([0, label])
        model.check_condition(labels, 2, values=False)
        with pytest.raises(ValueError, match=rf"label {label} is outside 0 .. 4 \(or 5 for no label\)"):
            model.check_condition(labels, 2)


def test_a_network_reads_the_values_of_labels_on_the_cpu_only():
    model = small_net().model
    with pytest.raises(ValueError, match="label 6 is outside"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([6]))
    on_meta = small_net().model.to("meta")
    assert on_meta(
        torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(1, device="meta"), torch.tensor([6]).to("meta")
    ).is_meta


def test_values_are_readable_on_the_cpu():
    assert is_readable(NESTED)
    assert not is_readable({**NESTED, "b": torch.zeros(4, device="meta")})
    assert not is_readable((torch.nn.Parameter(torch.zeros(4)),))  # a subclass


def test_parts_joined_are_the_whole():
    assert count_of(NESTED) == 4
    parts = [part_of(NESTED, first, first + 3) for first in (0, 3)]
    assert [count_of(part) for part in parts] == [3, 1]
    whole = joined(*parts)
    assert whole.keys() == NESTED.keys()
    assert type(whole["a"]) is tuple
    for ours, theirs in zip((*whole["a"], whole["b"]), (*NESTED["a"], NESTED["b"]), strict=True):
        assert torch.equal(ours, theirs)


def test_all_tensors_are_moved():
    there = moved(NESTED, torch.device("meta"))
    assert [t.device.type for t in (*there["a"], there["b"])] == ["meta"] * 3
