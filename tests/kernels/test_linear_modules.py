"""Ops that take a Linear's module: adapters, hooks and other weights compute what they do without this library."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm

from fastmask.kernels import add_gated_linear, gelu_linear, modulated_linear, silu_linear
from fastmask.testing import assert_near, network_steps

B, L, D, E = 2, 3, 16, 24
BF16 = torch.bfloat16


def norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def plain_add_gated(x, branch, gate, shift, scale, linear):
    x = x + gate[:, None] * branch
    return x, linear(norm(x, shift, scale))


# Of each op the shapes of its inputs, and what a model computes without it.
OPS = {
    modulated_linear: ([(B, L, D)] + [(B, D)] * 2, lambda *t: t[-1](norm(*t[:-1]))),
    add_gated_linear: ([(B, L, D)] * 2 + [(B, D)] * 3, plain_add_gated),
    gelu_linear: ([(B, L, D)], lambda x, linear: linear(F.gelu(x, approximate="tanh"))),
    silu_linear: ([(B, D)], lambda x, linear: linear(F.silu(x))),
}
ALL_OPS = pytest.mark.parametrize("op", OPS)


class LoRA(nn.Linear):
    """A Linear with a trainable matmul of low rank beside its frozen weight."""

    def __init__(self, *sizes, **how):
        super().__init__(*sizes, **how)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, D)), nn.Parameter(torch.randn(E, 4))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b)


class Wrapped(nn.Module):
    """An adapter around a frozen Linear that answers `weight` and `bias` with the Linear's, as peft's layers do."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(D, E).requires_grad_(False)
        self.adapter = nn.Linear(D, E, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.adapter(x)


class Int8(nn.Linear):
    """A quantised Linear: int8 weights, scaled in forward."""

    def __init__(self):
        super().__init__(D, E)
        del self.weight
        self.register_buffer("weight", torch.randint(-127, 127, (E, D), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 100, self.bias)


class Scaled(torch.Tensor):
    """A tensor whose values are three times those in its memory, as a quantised one's are others."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return F.linear(args[0], args[1].as_subclass(torch.Tensor) * 3, *args[2:])
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(cls) if func is torch.Tensor.detach else found


def with_hook(kind):
    def make():
        linear = nn.Linear(D, E)
        adapter = nn.Linear(E, E, bias=False) if kind == "forward" else nn.Linear(D, D, bias=False)
        linear.add_module("adapter", adapter)
        if kind == "forward":
            linear.register_forward_hook(lambda module, args, out: out + module.adapter(out))
        else:
            linear.register_forward_pre_hook(lambda module, args: (args[0] + module.adapter(args[0]),))
        return linear

    return make


def with_backward_hook(register):
    def make():
        linear = nn.Linear(D, E)
        getattr(linear, register)(lambda module, grads, *others: tuple(2 * grad for grad in grads))
        return linear

    return make


def with_forward_replaced():
    linear = nn.Linear(D, E)
    linear.forward = lambda x: 3 * F.linear(x, linear.weight, linear.bias)
    return linear


def of_another_tensor():
    linear = nn.Linear(D, E).requires_grad_(False)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Scaled), requires_grad=False)
    return linear


def stored_in_fp8():
    """As diffusers' layerwise casting does: wide only while the module runs."""
    linear = nn.Linear(D, E).requires_grad_(False).to(torch.float8_e4m3fn)
    linear.register_forward_pre_hook(lambda module, args: module.float() and None)
    linear.register_forward_hook(lambda module, args, out: module.to(torch.float8_e4m3fn) and None)
    return linear


MODULES = {
    "plain": lambda: nn.Linear(D, E),
    "without bias": lambda: nn.Linear(D, E, bias=False),
    "frozen": lambda: nn.Linear(D, E).requires_grad_(False),
    "LoRA": lambda: LoRA(D, E),
    "wrapped": Wrapped,
    "forward hook": with_hook("forward"),
    "pre hook": with_hook("pre"),
    "backward hook": with_backward_hook("register_full_backward_hook"),
    "backward pre hook": with_backward_hook("register_full_backward_pre_hook"),
    "forward replaced": with_forward_replaced,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(D, E)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(D, E)),
    "spectral norm by hook": lambda: spectral_norm(nn.Linear(D, E)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(D, E), "weight", amount=0.5),
    "int8": Int8,
    "tensor subclass": of_another_tensor,
    "stored in fp8": stored_in_fp8,
    "sequence": lambda: nn.Sequential(nn.Linear(D, E), nn.Linear(E, E)),
}


def inputs(op):
    return [torch.randn(shape) for shape in OPS[op][0]]


def value_and_gradients(function, tensors, module):
    """Return the results, and the gradients of inputs and of the module's parameters."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = function(*leaves, module)
    results = results if isinstance(results, tuple) else (results,)
    sum(t.float().sin().sum() for t in results).backward()
    named = {name: param.grad for name, param in module.named_parameters() if param.requires_grad}
    missing = [name for name, grad in named.items() if grad is None]
    assert not missing, missing
    grads = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in named.values()]
    return [*results, *(t.grad for t in leaves), *grads]


def assert_same(found, expected, dtype=torch.float32):
    """Two ways of the same computation: a gated addition, a norm, a Linear and an adapter, there and back, of each."""
    for actual, right in zip(found, expected, strict=True):
        assert_near(actual, right.double(), steps=2 * network_steps(1, backward=True), dtype=dtype)


def assert_as_without(op, name, dtype=torch.float32):
    """A module that is passed to an op computes what the model without this library does, and so do its gradients."""
    tensors, found = inputs(op), []
    for function in (op, OPS[op][1]):
        torch.manual_seed(0)
        found.append(value_and_gradients(function, tensors, MODULES[name]()))
    assert_same(*found, dtype)


@ALL_OPS
@pytest.mark.parametrize("name", MODULES)
def test_module(op, name):
    assert_as_without(op, name)


@ALL_OPS
@pytest.mark.parametrize("name", ["LoRA", "wrapped", "forward hook", "plain"])
def test_under_autocast(op, name):
    with torch.autocast("cpu", dtype=BF16):
        assert_as_without(op, name, dtype=BF16)


@ALL_OPS
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_linear_is_its_weights(op, impl, bias, monkeypatch):
    linear, tensors = nn.Linear(D, E, bias=bias), inputs(op)
    expected = value_and_gradients(lambda *t: op(*t[:-1], t[-1].weight, t[-1].bias, impl=impl), tensors, linear)
    linear.zero_grad()
    monkeypatch.setattr(nn.Linear, "forward", None)  # it is not called
    found = value_and_gradients(lambda *t: op(*t, impl=impl), tensors, linear)
    assert all(map(torch.equal, found, expected))


@ALL_OPS
def test_hooks_of_all_modules_are_called(op):
    seen = []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        assert_as_without(op, "plain")
    finally:
        handle.remove()
    assert seen == [nn.Linear] * 2


@ALL_OPS
@pytest.mark.parametrize("name", ["plain", "without bias", "frozen", "LoRA", "wrapped", "forward hook", "weight norm"])
def test_one_graph(op, name):
    torch._dynamo.reset()
    module, tensors = MODULES[name](), inputs(op)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    found = value_and_gradients(compiled, tensors, module)
    module.zero_grad()
    assert_same(found, value_and_gradients(op, tensors, module))


@contextmanager
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@ALL_OPS
@pytest.mark.parametrize("how", ["fsdp2", "tensor parallel"])
def test_weights_that_are_dtensors(op, how):
    linear, tensors = nn.Linear(D, E), inputs(op)
    expected = value_and_gradients(OPS[op][1], tensors, copy.deepcopy(linear))
    with one_process() as mesh:
        if how == "fsdp2":
            fully_shard(linear, mesh=mesh)
        else:
            parallelize_module(linear, mesh, ColwiseParallel())
        assert isinstance(linear.weight, DTensor)
        assert_same(value_and_gradients(op, tensors, linear), expected)
        raw = parallelize_module(nn.Linear(D, E), mesh, ColwiseParallel())
        if op is not silu_linear:
            with pytest.raises(ValueError, match="take an ordinary tensor as weight, not DTensor: pass the module"):
                op(*tensors, raw.weight, None, impl="fused")


@ALL_OPS
def test_adapters_over_a_frozen_backbone(op):
    """Every adapter tensor has its gradient, and no frozen one has any."""
    for name in ("LoRA", "wrapped"):
        module = MODULES[name]()
        module.get_parameter("bias" if name == "LoRA" else "base_layer.bias").requires_grad_(False)
        op(*inputs(op), module)[-1].sum().backward()
        trained = {name for name, param in module.named_parameters() if param.grad is not None}
        assert trained == ({"a", "b"} if name == "LoRA" else {"adapter.weight"})


@ALL_OPS
@pytest.mark.parametrize("impl", [None, "fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_weights_of_other_dtypes_are_refused(op, impl, dtype):
    with pytest.raises(ValueError, match=f"weight must be float32, .* not {dtype}: pass the module that holds it"):
        op(*inputs(op), torch.ones(E, D).to(dtype), torch.zeros(E), impl=impl)
    with pytest.raises(ValueError, match=f"bias must be float32, .* not {dtype}"):
        op(*inputs(op), torch.ones(E, D), torch.zeros(E).to(dtype), impl=impl)


@pytest.mark.parametrize("op", [op for op in OPS if op is not silu_linear])
def test_a_tensor_subclass_is_refused_by_the_kernels(op):
    weight = torch.randn(E, D).as_subclass(Scaled)
    with pytest.raises(ValueError, match="an ordinary tensor as weight, not Scaled: pass the module"):
        op(*inputs(op), weight, None, impl="fused")


@ALL_OPS
def test_a_module_has_its_own_bias(op):
    with pytest.raises(ValueError, match="bias must be None beside a module, Linear, which has its own"):
        op(*inputs(op), nn.Linear(D, E), torch.zeros(E))


@ALL_OPS
@pytest.mark.parametrize(("x", "weight"), [(torch.float32, BF16), (BF16, torch.float32)])
def test_a_module_is_called_in_its_own_dtype(op, x, weight):
    """As a plain Linear's weight is; silu_linear leaves both as they are."""
    if op is silu_linear:
        return
    tensors = [t.to(x) for t in inputs(op)]
    for name in ("plain", "LoRA", "wrapped"):
        out = op(*tensors, MODULES[name]().to(weight))
        assert (out if isinstance(out, torch.Tensor) else out[1]).dtype == weight
