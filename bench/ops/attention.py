"""attention of the encoder, with q, k and v as views of one matmul result, as in the network.

"dense" is SDPA, also for ours. "packed" has samples with unequal numbers of tokens, 0.5 K to 1.5 K: the reference loops
over the samples, ours is `torch.nn.attention.varlen` on a GPU.
"""

from collections.abc import Callable
from typing import Any

from bench.ops._description import Description, Op, Shapes
from fastmask.kernels import attention
from fastmask.kernels._attention_backends import refusal
from fastmask.kernels.attention import attention_reference


def dense(shapes: Shapes) -> Op:
    return _op(shapes, [shapes.keep] * shapes.batch, (shapes.batch, shapes.keep), {})


def packed(shapes: Shapes) -> Op:
    batch, keep = shapes.batch, shapes.keep
    counts = [keep + round((2 * b + 1 - batch) / batch * keep / 2) for b in range(batch)]
    return _op(shapes, counts, (sum(counts),), {"cu_seqlens": shapes.cu_seqlens(counts), "max_seqlen": max(counts)})


def _op(shapes: Shapes, counts: list[int], tokens: tuple[int, ...], options: dict[str, Any]) -> Op:
    qkv = shapes.normal(*tokens, 3, shapes.heads, shapes.width // shapes.heads)
    q = qkv.select(-3, 0)
    reasons = {name: refusal(name, q, packed=bool(options)) for name in ("torch", "flash-attn", "xformers")}
    # Only the backends that are chosen automatically; the network's own packed tokens are in 16 bits.
    refused = reasons["torch"] if reasons["torch"] and reasons["flash-attn"] else ""

    def taken(function: Callable[..., Any], **chosen: Any) -> Callable[..., Any]:
        return lambda qkv, **options: function(*qkv.unbind(-3), **options, **chosen)

    others = {name: reasons[name] or taken(attention, backend=name) for name in ("flash-attn", "xformers")}
    if options:
        others["compiled"] = "the reference reads cu_seqlens on the host, which cannot be traced"
    kind = f"packed N={sum(counts)}" if options else f"K={shapes.keep}"
    flops = 4 * sum(count * count for count in counts) * shapes.width
    return Op(
        name="attention",
        shape=f"B={shapes.batch} {kind} D={shapes.width} H={shapes.heads}",
        inputs={"qkv": qkv},
        leaves=("qkv",),
        again=("qkv",),
        reference=taken(attention_reference),
        fused=refused or taken(attention),
        kernel="",
        options=options,
        others=others,
        flops=flops,
        backward_flops=2 * flops,
        host=("reference", "xformers") if options else (),
    )


DESCRIPTION = Description(forms={"dense": dense, "packed": packed})
