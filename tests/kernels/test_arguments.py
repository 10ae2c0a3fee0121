"""Arguments as models have them: other shapes of modulations, None, affine norms, and mistakes that are named."""

import functools

import checks
import pytest
import torch
import torch.nn.functional as F
from calls import CALLS
from torch import nn

import fastmask.kernels
from fastmask.kernels import add_gated_linear, add_gated_norm, modulate_norm, modulated_linear
from fastmask.testing import assert_near

BF16 = torch.bfloat16
B, L, D, E = 3, 4, 16, 24
OPS = {modulate_norm: 1, add_gated_norm: 2, modulated_linear: 1, add_gated_linear: 2}  # their tensors of tokens
ALL_OPS = pytest.mark.parametrize("op", OPS)
FORMS = {"(B, 1, D)": (B, 1, D), "(1, D)": (1, D), "(1, 1, D)": (1, 1, D), "(D,)": (D,)}
CU_SEQLENS = torch.tensor([0, 4, 4, 9])


def tokens_of(op, packed=False):
    return [torch.randn((9, D) if packed else (B, L, D)) for _ in range(OPS[op])]


def linear_of(op):
    return [torch.randn(E, D), torch.randn(E)] if op in (modulated_linear, add_gated_linear) else []


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


@ALL_OPS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_modulation(op, form, packed):
    options = {"cu_seqlens": CU_SEQLENS} if packed else {}
    modulations = [torch.randn(FORMS[form]) for _ in range(OPS[op] + 1)]
    arguments = [*tokens_of(op, packed), *modulations, *linear_of(op)]
    checks.check_accuracy(op, arguments, **options)
    spread = [m.reshape(-1, D).expand(B, D).contiguous() for m in modulations]
    expected = op(*arguments[: OPS[op]], *spread, *arguments[2 * OPS[op] + 1 :], **options)
    assert all(map(torch.equal, as_tuple(op(*arguments, **options)), as_tuple(expected)))


@ALL_OPS
def test_one_modulation_of_all_samples_beside_others(op):
    """(D,) beside one per sample and one per token; 16-bit ones are summed over samples in fp32."""
    forms = [(D,), (B, L, D), (B, D)][: OPS[op] + 1]
    modulations = [torch.randn(form).to(BF16) for form in forms]
    checks.check_accuracy(op, [*tokens_of(op), *modulations, *linear_of(op)])


@ALL_OPS
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_none_is_a_modulation_that_changes_nothing(op, packed, impl):
    options = {"cu_seqlens": CU_SEQLENS} if packed else {}
    neutral = ([torch.ones(B, D)] if OPS[op] == 2 else []) + [torch.zeros(B, D)] * 2
    given, tokens, linear = [torch.randn(B, D) for _ in neutral], tokens_of(op, packed), linear_of(op)

    def run(modulations):
        leaves = [t.clone().requires_grad_() for t in (*tokens, *linear)]
        out = as_tuple(op(*leaves[: OPS[op]], *modulations, *leaves[OPS[op] :], **options, impl=impl))
        sum(t.sin().sum() for t in out).backward()
        return [*out, *(t.grad for t in leaves)]

    for absent in [{i} for i in range(len(neutral))] + [set(range(len(neutral)))]:
        with_none = [None if i in absent else t for i, t in enumerate(given)]
        spelled = [neutral[i] if i in absent else t for i, t in enumerate(given)]
        assert all(map(torch.equal, run(with_none), run(spelled)))


def affine(op, bias):
    """Return an op of its tensors and the weight, and with ``bias`` the bias, of an affine norm."""

    @functools.wraps(op)
    def call(*tensors, **options):
        *tensors, weight, last = tensors
        norm = {"norm_weight": weight, "norm_bias": last} if bias else {"norm_weight": last}
        return op(*tensors, *([] if bias else [weight]), **norm, **options)

    return call


@ALL_OPS
@pytest.mark.parametrize(("norm", "bias"), [("layer", True), ("layer", False), ("rms", False)])
@pytest.mark.parametrize("per_token", [False, True])
def test_affine_norms(op, norm, bias, per_token):
    """As accurate as an affine norm that is modulated afterwards, with gradients of its weight and bias."""
    modulation = (B, L, D) if per_token else (B, D)
    arguments = [*tokens_of(op), *(torch.randn(modulation) for _ in range(OPS[op] + 1)), *linear_of(op)]
    of_norm = [1 + torch.randn(D) / 4, *([torch.randn(D)] if bias else [])]
    checks.check_accuracy(affine(op, bias), [*arguments, *of_norm], norm=norm)


@ALL_OPS
def test_an_affine_norm_of_packed_tokens_and_mixed_modulations(op):
    tokens = tokens_of(op, packed=True)
    modulations = [torch.randn(B, D) for _ in range(OPS[op])] + [torch.randn(9, D)]  # scale alone is per token
    of_norm = [1 + torch.randn(D) / 4, torch.randn(D)]
    checks.check_accuracy(affine(op, True), [*tokens, *modulations, *linear_of(op), *of_norm], cu_seqlens=CU_SEQLENS)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_it_is_the_module_s_norm(impl):
    x, shift, scale = torch.randn(B, L, D), torch.randn(B, D), torch.randn(B, D)
    layer, rms = nn.LayerNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-6)
    for param in (*layer.parameters(), *rms.parameters()):
        nn.init.normal_(param)
    found = modulate_norm(x, shift, scale, eps=1e-5, norm_weight=layer.weight, norm_bias=layer.bias, impl=impl)
    assert_near(found, (layer(x) * (1 + scale[:, None]) + shift[:, None]).double(), steps=6)
    found = modulate_norm(x, None, None, norm="rms", norm_weight=rms.weight, impl=impl)
    assert_near(found, rms(x).double(), steps=6)


@ALL_OPS
def test_one_graph(op):
    def call(*tensors, impl):
        *tensors, weight = tensors
        absent = [None] * OPS[op]
        tokens, (scale, *linear) = tensors[: OPS[op]], tensors[OPS[op] :]
        return op(*tokens, *absent, scale, *linear, norm_weight=weight, impl=impl)

    for dynamic in (False, True):
        arguments = [*tokens_of(op), torch.randn(B, 1, D), *linear_of(op), torch.randn(D)]
        checks.check_compiles(call, arguments, dynamic=dynamic)


@ALL_OPS
def test_a_frozen_affine_norm_has_no_gradient(op):
    tensors = [t.requires_grad_() for t in tokens_of(op)]
    weight, bias = torch.randn(D), torch.randn(D, requires_grad=True)
    out = op(*tensors, *[None] * (OPS[op] + 1), *linear_of(op), norm_weight=weight, norm_bias=bias, impl="fused")
    as_tuple(out)[-1].sum().backward()
    assert weight.grad is None
    assert bias.grad.shape == (D,)


@ALL_OPS
@pytest.mark.parametrize("impl", [None, "fused", "reference"])
def test_an_affine_norm_of_another_width(op, impl):
    arguments = [*tokens_of(op), *[None] * (OPS[op] + 1), *linear_of(op)]
    for name in ("norm_weight", "norm_bias"):
        with pytest.raises(ValueError, match=rf"{name} must have shape \({D},\), not \(2, {D}\)"):
            op(*arguments, **{name: torch.ones(2, D)}, impl=impl)
    with pytest.raises(ValueError, match=r"norm_weight is torch\.float64"):
        op(*arguments, norm_weight=torch.ones(D).double(), impl="fused")


@pytest.mark.parametrize("eps", [None, -1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("op", ["add_gated_linear", "add_gated_norm", "embed_kept_patches", "modulate_norm",
                                "modulated_linear", "restore_tokens"])  # fmt: skip
def test_eps(op, eps):
    with pytest.raises(ValueError, match=f"eps must be a finite number of at least 0, not {eps}"):
        getattr(fastmask.kernels, op)(**CALLS[op](False), eps=eps)


TENSORS = [
    (op, name)
    for op, make in CALLS.items()
    if op not in ("adamw_ema", "patchify", "unpatchify", "random_normal", "random_uniform", "sample_mask")
    for packed in (False, True)
    for name, given in make(packed).items()
    if isinstance(given, torch.Tensor) and (packed is False or name == "cu_seqlens")
]


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_arrays_and_lists_are_named(op, name):
    given = CALLS[op](name == "cu_seqlens")
    for wrong, kind in ((given[name].numpy(), r"numpy\.ndarray"), (given[name].tolist(), r"builtins\.list")):
        with pytest.raises(ValueError, match=f"^{name} must be a torch.Tensor, not {kind}"):
            getattr(fastmask.kernels, op)(**given | {name: wrong})


@pytest.mark.parametrize("op", [modulate_norm, add_gated_norm])
def test_a_result_in_float64_is_the_references(op):
    arguments = [*tokens_of(op), *(torch.randn(B, D) for _ in range(OPS[op] + 1))]
    out = as_tuple(op(*arguments, out_dtype=torch.float64))
    assert out[-1].dtype == torch.float64
    expected = as_tuple(op(*arguments, out_dtype=torch.float64, impl="reference"))
    assert all(map(torch.equal, out, expected))
    with pytest.raises(ValueError, match=r"out_dtype must be a floating dtype, not torch\.int32"):
        op(*arguments, out_dtype=torch.int32)


def test_the_gradient_of_one_modulation_of_all_samples():
    """The sum over samples, tokens included, in its own shape and dtype."""
    x, scale = torch.randn(B, L, D), torch.randn(D, requires_grad=True)
    modulate_norm(x, None, scale, impl="fused").sum().backward()
    assert scale.grad.shape == (D,)
    assert_near(scale.grad, F.layer_norm(x.double(), (D,), eps=1e-6).sum((0, 1)), steps=16)
