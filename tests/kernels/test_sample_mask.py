import contextlib
import importlib
import math
from itertools import combinations

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels import Mask, backends, gather_tokens, restore_tokens, sample_mask
from fastmask.kernels._triton.sample_mask import keep_smallest
from fastmask.kernels.philox import philox_words

# The package has the function under the module's name.
contract = importlib.import_module("fastmask.kernels.sample_mask")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "fused"]
NATIVE = any(row.op == "sample_mask" and row.device == DEVICE and row.kernel == "native" for row in backends())


def draw(batch, length, keep, **kw):
    """A mask on the CPU, of the reference unless `impl` says otherwise."""
    mask = sample_mask(batch, length, keep, **{"seed": 0, "device": DEVICE, "impl": "reference", **kw})
    return Mask(*(None if ids is None else ids.cpu() for ids in mask))


def assert_same(mask, other):
    assert mask.ids_keep.dtype == other.ids_keep.dtype == torch.int32
    assert mask.ids_restore.dtype == other.ids_restore.dtype == torch.int32
    assert torch.equal(mask.ids_keep, other.ids_keep)
    assert torch.equal(mask.ids_restore, other.ids_restore)
    assert (mask.cu_seqlens is None) == (other.cu_seqlens is None)
    if mask.cu_seqlens is not None:
        assert mask.cu_seqlens.dtype == other.cu_seqlens.dtype == torch.int32
        assert torch.equal(mask.cu_seqlens, other.cu_seqlens)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_counts_and_index_lists(length):
    for keep in range(1, length + 1):
        mask = draw(7, length, keep)
        assert mask.ids_keep.dtype == mask.ids_restore.dtype == torch.int32
        assert mask.ids_keep.shape == (7, keep)
        assert mask.ids_restore.shape == (7, length)
        assert torch.equal(mask.dropped.sum(1), torch.full((7,), length - keep))
        for kept, restore in zip(mask.ids_keep.tolist(), mask.ids_restore.tolist(), strict=True):
            assert kept == sorted(set(kept))
            assert sorted(restore) == list(range(length))
            assert [restore[position] for position in kept] == list(range(keep))
            dropped = [position for position in range(length) if position not in kept]
            assert [restore[position] for position in dropped] == list(range(keep, length))


@pytest.mark.parametrize(("length", "keep"), [(255, 127), (16, 1), (16, 16)])
def test_restore_undoes_gather(length, keep):
    mask = draw(5, length, keep)
    x = torch.randn(5, length, 3)
    restored = restore_tokens(
        gather_tokens(x, mask.ids_keep), torch.full((3,), 9.0), torch.zeros(length, 3), mask.ids_restore
    )
    assert torch.equal(restored, x.masked_fill(mask.dropped[..., None], 9.0))


def test_keeping_all_keeps_the_order():
    mask = draw(3, 6, 6)
    in_order = torch.arange(6, dtype=torch.int32).expand(3, 6)
    assert torch.equal(mask.ids_keep, in_order)
    assert torch.equal(mask.ids_restore, in_order)


# The interpreter needs a tenth of a second for each sample of the fused form.
@pytest.mark.parametrize(("impl", "batch", "length", "keep"), [("reference", 20_000, 6, 3), ("fused", 48, 4, 2)])
def test_every_subset_is_equally_likely(impl, batch, length, keep):
    stats = pytest.importorskip("scipy.stats")
    mask = draw(batch, length, keep, seed=1, impl=impl)
    subsets = dict.fromkeys(combinations(range(length), keep), 0)
    for kept in mask.ids_keep.tolist():
        subsets[tuple(kept)] += 1
    assert stats.chisquare(list(subsets.values())).pvalue > 0.01


def test_every_pair_is_kept_equally_often():
    batch, length, keep = 6_000, 256, 128
    mask = draw(batch, length, keep, seed=2)
    kept = (~mask.dropped).double()
    share = kept.T @ kept / batch
    single, pair = keep / length, keep * (keep - 1) / (length * (length - 1))
    expected = torch.full((length, length), pair, dtype=torch.float64).fill_diagonal_(single)
    z = (share - expected) / (expected * (1 - expected) / batch).sqrt()
    # Of 32896 standard normal numbers one in 800 draws exceeds 5.5.
    assert z.abs().max() < 5.5
    # Neighbouring samples are independent: their masks share keep^2 / length positions on average.
    overlap = (kept[1:] * kept[:-1]).sum(1)
    assert abs(overlap.mean() - keep**2 / length) < 5 * overlap.std() / math.sqrt(batch - 1)
    fused = draw(3, length, keep, seed=2, offset=4321, impl="fused")
    assert torch.equal(fused.ids_keep, mask.ids_keep[4321:4324])
    assert torch.equal(fused.ids_restore, mask.ids_restore[4321:4324])


def test_a_samples_mask_depends_on_its_global_index_alone():
    whole = draw(9, 32, 11, seed=5, offset=2**33 - 4)
    parts = [
        draw(4, 32, 11, seed=5, offset=2**33 - 4),
        draw(5, 32, 11, seed=5, offset=torch.tensor(2**33, device=DEVICE)),
    ]
    assert torch.equal(torch.cat([part.ids_keep for part in parts]), whole.ids_keep)
    assert torch.equal(torch.cat([part.ids_restore for part in parts]), whole.ids_restore)
    assert len({tuple(kept) for kept in whole.ids_keep.tolist()}) == 9


def test_the_seed_decides():
    assert torch.equal(draw(4, 64, 32, seed=3).ids_keep, draw(4, 64, 32, seed=torch.tensor(3, device=DEVICE)).ids_keep)
    assert not torch.equal(draw(4, 64, 32, seed=3).ids_keep, draw(4, 64, 32, seed=4).ids_keep)


def test_masks_of_one_sample_are_nested():
    # The keys belong to positions, so a schedule that keeps more adds positions and takes none away.
    fewer, more = draw(6, 50, 20), draw(6, 50, 30)
    assert not (more.dropped & ~fewer.dropped).any()


@pytest.mark.parametrize("keep", [0, -1, 7])
def test_impossible_counts(keep):
    with pytest.raises(ValueError, match=f"between 1 and the 6 positions, not {keep}"):
        draw(2, 6, keep)


def test_dropped_is_read_from_any_order_of_rows():
    mask = Mask(torch.tensor([[3, 1]]), torch.tensor([[2, 1, 3, 0]]))
    assert mask.dropped.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("batch", "length", "keep", "seed", "offset"),
    [
        (2, 1, 1, 0, 0),
        (2, 255, 100, 2**40 + 5, 2**32 - 1),
        (1, 256, 1, -5, 2**40),
        (1, 256, 256, 2**64 - 1, 0),
        (2, 1000, 500, 2**63, 2**62),
        (1, 1000, 1, 1, 0),
        (1, 1000, 1000, 1, 0),
        (1, 16384, 4099, 2, 0),
    ],
)
def test_fused_gives_the_references_bits(batch, length, keep, seed, offset):
    kw = {"seed": seed, "offset": offset}
    assert_same(draw(batch, length, keep, **kw, impl="fused"), draw(batch, length, keep, **kw))


def test_fused_takes_seed_and_offset_as_tensors():
    expected = draw(2, 15, 7, seed=2**40 + 5, offset=2**33)
    on_device = {"seed": torch.tensor(2**40 + 5, device=DEVICE), "offset": torch.tensor(2**33, device=DEVICE)}
    first, second = (draw(2, 15, 7, **on_device, impl="fused") for _ in range(2))
    assert_same(first, expected)
    assert_same(second, expected)


@pytest.mark.parametrize("seed", [2**64 - 1, 2**64 + 3, -(2**63) - 1])
def test_64_bits_of_a_seed_count(seed):
    same = (seed + 2**63) % 2**64 - 2**63
    assert_same(draw(1, 9, 4, seed=seed), draw(1, 9, 4, seed=same))
    assert_same(draw(1, 9, 4, seed=seed, impl="fused"), draw(1, 9, 4, seed=same))


COUNTS = {
    "one of each": ([1, 2, 3, 4, 5], 5),
    "wide": ([255, 1, 100], 255),
    "one sample": ([3], 4),
    "all one": ([1], 1),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("counts", "length"), COUNTS.values(), ids=COUNTS.keys())
def test_a_count_per_sample(counts, length, impl):
    keep = torch.tensor(counts, device=DEVICE)
    mask = draw(len(counts), length, keep, total=sum(counts), seed=9, offset=50, impl=impl)
    alone = [draw(1, length, count, seed=9, offset=50 + b) for b, count in enumerate(counts)]
    ends = torch.tensor([0, *counts]).cumsum(0).int()
    assert_same(mask, Mask(torch.cat([m.ids_keep[0] for m in alone]), torch.cat([m.ids_restore for m in alone]), ends))
    assert mask.num_kept.tolist() == counts
    assert torch.equal(mask.dropped, torch.cat([m.dropped for m in alone]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_counts_in_any_integer_dtype_and_stride(dtype, impl):
    keep = torch.tensor([2, 9, 4, 9], dtype=dtype, device=DEVICE)[::2]
    assert_same(
        draw(2, 6, keep, total=6, impl=impl), draw(2, 6, torch.tensor([2, 4], device=DEVICE), total=6, impl=impl)
    )


def test_fused_writes_every_index_and_none_behind_the_lists(monkeypatch):
    buffers = []

    def poisoned(*shape, dtype, device):
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        buffers.append(torch.full((size.numel() + 32,), -77, dtype=dtype, device=device))
        return buffers[-1][: size.numel()].view(size)

    counts = torch.tensor([2, 6, 5], device=DEVICE)
    expected = [draw(3, 7, 4), draw(3, 7, counts, total=13)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        masks = [draw(3, 7, 4, impl="fused"), draw(3, 7, counts, total=13, impl="fused")]
        # An op that is called by itself with counts that sum to more than its total; a native one raises.
        ends = torch.tensor([0, 2, 8, 13], dtype=torch.int32, device=DEVICE)
        with pytest.raises(RuntimeError, match="cu_seqlens must end with 10") if NATIVE else contextlib.nullcontext():
            scalar = torch.tensor(0, device=DEVICE)
            contract.sample_mask_fwd(scalar, scalar, ends, 3, 7, 10, 0)
    assert len(buffers) == (0 if NATIVE else 6)  # a native kernel allocates for itself: `make sanitize` looks there
    for mask, right in zip(masks, expected, strict=True):
        assert_same(mask, right)
    for buffer in buffers:
        assert (buffer[-32:] == -77).all()


def test_equal_keys_are_kept_in_the_order_of_positions(monkeypatch):
    keys = torch.tensor([[5, 3, 5, 2**32 - 1, 5, 0, 5]], device=DEVICE)
    monkeypatch.setattr(contract, "philox_words", lambda *_: keys)
    assert draw(1, 7, 4).ids_keep.tolist() == [[0, 1, 2, 5]]
    assert draw(1, 7, 5).ids_keep.tolist() == [[0, 1, 2, 4, 5]]


# Of seed 0 and 16384 positions the first sample that has two equal keys.
TIED = 34


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sample_with_two_equal_keys(impl):
    keys = philox_words(0, torch.tensor([TIED]), 16384, 0)[0]
    order = keys.argsort(stable=True)
    (rank,) = (keys[order].diff() == 0).nonzero()[:, 0].tolist()
    before, behind = order[rank].item(), order[rank + 1].item()
    assert before < behind
    one, both = (draw(1, 16384, rank + more, seed=0, offset=TIED, impl=impl).dropped[0] for more in (1, 2))
    assert (one[before], one[behind]) == (False, True)
    assert (both[before], both[behind]) == (False, False)


@triton.jit
def _keep_smallest_kernel(key_ptr, kept_ptr, num_kept, BLOCK: tl.constexpr):
    o_l = tl.arange(0, BLOCK)
    m_kept = keep_smallest(tl.load(key_ptr + o_l).to(tl.uint32), num_kept)
    tl.store(kept_ptr + o_l, m_kept.to(tl.int32))


MAX = 2**32 - 1
TIES = [
    [5, 3, 5, MAX, 5, 0, 5, 2**31],
    [MAX] * 8,
    [0] * 8,
    [0, MAX, 0, MAX, 2**31, 2**31 - 1, 2**31, 1],
    # Lanes behind L = 5 hold the largest key, which a position may have too.
    [7, MAX, 7, MAX, MAX, MAX, MAX, MAX],
]


@pytest.mark.skipif(NATIVE, reason="a part of the Triton kernel, which is not interpreted here")
@pytest.mark.parametrize("keys", TIES)
@pytest.mark.parametrize("num_kept", [1, 3, 4, 5, 8])
def test_fused_keeps_equal_keys_in_the_order_of_positions(keys, num_kept):
    kept = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    _keep_smallest_kernel[(1,)](torch.tensor(keys, device=DEVICE), kept, num_kept, BLOCK=8)
    smallest = sorted(range(8), key=lambda position: (keys[position], position))[:num_kept]
    assert kept.nonzero()[:, 0].tolist() == sorted(smallest)


BAD = {
    "shape": ({"keep": torch.ones(3, dtype=torch.int64)}, r"keep must be .* shape \(2,\), not .* shape \(3,\)"),
    "rank": ({"keep": torch.ones(2, 1, dtype=torch.int64)}, r"keep must be .* not torch.int64 of shape \(2, 1\)"),
    "float": ({"keep": torch.ones(2), "total": 2}, "keep must be .* not torch.float32"),
    "bool": ({"keep": torch.ones(2, dtype=torch.bool), "total": 2}, "keep must be .* not torch.bool"),
    "no total": ({"keep": torch.tensor([1, 2])}, "total must be the sum of keep, between 2 and 12 .* not None"),
    "small total": ({"keep": torch.tensor([1, 2]), "total": 1}, "total must be the sum .* not 1"),
    "large total": ({"keep": torch.tensor([1, 2]), "total": 13}, "total must be the sum .* not 13"),
    "total of one count": ({"keep": 3, "total": 6}, r"total goes with a keep per sample, of shape \(2,\)"),
    "seed shape": ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed must be an int, .* of shape \(1,\)"),
    "seed dtype": ({"seed": torch.tensor(1.0)}, "seed must be an int, .* not torch.float32"),
    "offset dtype": ({"offset": torch.tensor(1, dtype=torch.int32)}, "offset must be an int, .* not torch.int32"),
    "impl": ({"impl": "fast"}, "impl must be"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("kw", "message"), BAD.values(), ids=BAD.keys())
def test_arguments_that_do_not_fit(kw, message, impl):
    with pytest.raises(ValueError, match=message):
        draw(2, 6, **{"keep": 3, "impl": impl, **kw})


@pytest.mark.parametrize("impl", ["reference", "fused", None])
@pytest.mark.parametrize("counts", [[0, 4], [7, 1], [-1, 6]])
def test_counts_are_checked_on_the_cpu(counts, impl):
    with pytest.raises(ValueError, match=r"keep must be between 1 and the 6 positions for each sample, not \["):
        draw(2, 6, torch.tensor(counts), total=sum(counts), device="cpu", impl=impl)
    with pytest.raises(ValueError, match="total must be the sum of keep, 5, not 6"):
        draw(2, 6, torch.tensor([2, 3]), total=6, device="cpu", impl=impl)


def test_what_the_fused_form_does_not_take():
    with pytest.raises(ValueError, match="a length up to 16384, not 16385"):
        draw(1, 16385, 3, impl="fused")
    assert draw(1, 16385, 3).ids_keep.shape == (1, 3)
    with pytest.raises(ValueError, match=f"seed must be on {DEVICE}, not on meta"):
        draw(1, 5, 3, seed=torch.empty((), dtype=torch.int64, device="meta"), impl="fused")
    with pytest.raises(ValueError, match=f"keep must be on {DEVICE}, not on meta"):
        draw(1, 5, torch.ones(1, dtype=torch.int64, device="meta"), total=1, impl="fused")


@pytest.mark.skipif(not NATIVE, reason="no native kernel here")
def test_a_native_kernel_is_the_default_and_counts_are_checked(monkeypatch):
    calls = []
    monkeypatch.setattr(contract, "sample_mask_fwd", lambda *args: calls.append(args) or fused(*args))
    fused = torch.ops.fastmask.sample_mask_fwd
    counts = torch.tensor([2, 3])
    assert_same(draw(2, 6, 3, impl=None), draw(2, 6, 3))
    assert_same(draw(2, 6, counts, total=5, impl=None), draw(2, 6, counts, total=5))
    assert len(calls) == 2
    for bad, total in (([0, 5], 5), ([7, 1], 8), ([2, 3], 6)):
        with pytest.raises(ValueError, match=r"keep must be between 1 and the 6 |total must be the sum of keep, 5"):
            draw(2, 6, torch.tensor(bad), total=total, impl=None)
    assert draw(1, 16385, 3, impl=None).ids_keep.shape == (1, 3)
    assert len(calls) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    scalar = torch.tensor(3, device=DEVICE)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE) if packed else None
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        contract.sample_mask_fwd, (scalar, scalar, cu_seqlens, 2, 5, 5 if packed else 3, 0), test_utils=tests
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("impl", "packed"), [("reference", True), ("fused", False), ("fused", True)])
def test_compiled_without_graph_breaks(impl, packed, dynamic):
    def masks(batch, length, keep, total, offset):
        return sample_mask(batch, length, keep, total=total, seed=3, offset=offset, device=DEVICE, impl=impl)

    def arguments(batch, length, keep, offset):
        if packed:
            return batch, length, torch.arange(1, batch + 1, device=DEVICE), batch * (batch + 1) // 2, offset
        return batch, length, keep, None, offset

    if dynamic:
        calls = [arguments(2, 9, 4, 5), arguments(3, 6, 2, 2**33)]
    else:
        calls = [arguments(2, 9, 4, torch.tensor(offset, device=DEVICE)) for offset in (5, 2**33)]
    compiled = torch.compile(masks, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled(*calls[0]), masks(*calls[0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(compiled(*calls[1]), masks(*calls[1]))


def test_shapes_without_values():
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            mask = sample_mask(3, 8, 5, seed=1, device=device, impl="fused")
            keep = torch.empty(3, dtype=torch.int64, device=device)
            packed = sample_mask(3, 8, keep, total=11, seed=1, device=device, impl="fused")
            assert mask.ids_keep.shape == (3, 5)
            assert packed.ids_keep.shape == (11,)
            assert packed.cu_seqlens.shape == (4,)
            for ids in (mask.ids_keep, mask.ids_restore, packed.ids_keep, packed.ids_restore, packed.cu_seqlens):
                assert ids.device.type == device
                assert ids.dtype == torch.int32
            assert mask.ids_restore.shape == packed.ids_restore.shape == (3, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
def test_a_gpu_draws_the_same_mask(impl):
    on_gpu = draw(33, 255, 100, seed=8, device="cuda", impl=impl)
    assert_same(on_gpu, draw(33, 255, 100, seed=8, device="cpu"))
    counts = torch.arange(1, 256)
    on_gpu = draw(255, 255, counts.cuda(), total=255 * 128, seed=8, device="cuda", impl=impl)
    assert_same(on_gpu, draw(255, 255, counts, total=255 * 128, seed=8, device="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_cuda_graph_draws_new_masks(packed):
    batch, length = 4, 256
    keep = torch.tensor([1, 100, 256, 43], device="cuda") if packed else 100
    total = 400 if packed else None
    offset = torch.zeros((), dtype=torch.int64, device="cuda")

    def fused(at):
        return sample_mask(batch, length, keep, total=total, seed=7, offset=at, device="cuda", impl="fused")

    fused(offset)  # compiles the kernel, which cannot be done while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = fused(offset)
    for step in range(3):
        graph.replay()
        assert_same(mask, fused(batch * step))
        offset.add_(batch)
