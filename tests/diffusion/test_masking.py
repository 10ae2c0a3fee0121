import itertools
import math

import pytest
import torch
from scipy import stats
from torch._dynamo.testing import CompileCounterWithBackend

from fastmask.diffusion import EDM, training_draws
from fastmask.diffusion.masking import (
    GROUP,
    SCHEDULES,
    Masking,
    RatioPerSample,
    check_ratio,
    kept_count,
    mask_ratio_at,
    parse_per_sample,
    ratio_stages,
    structured_mask,
)

OUTSIDE = [-0.1, -1e-9, 1.0, 1.5, math.nan, math.inf]


def test_kept_count_is_the_published_formula():
    ratios = [step / 200 for step in range(200)] + [1 / 3, 2 / 3, 0.999999, 1 - 2**-53]
    for ratio in ratios:
        for length in range(1, 301):
            assert kept_count(length, ratio) == max(1, int(length * (1 - ratio))), (length, ratio)


@pytest.mark.parametrize(
    ("length", "ratio", "kept"),
    [(256, 0.5, 128), (1024, 0.5, 512), (256, 0.75, 64), (9, 0.5, 4), (3, 0.9, 1), (7, 0, 7)],
)
def test_kept_counts_of_known_runs(length, ratio, kept):
    assert kept_count(length, ratio) == kept


@pytest.mark.parametrize("ratio", OUTSIDE)
def test_ratios_outside_the_range(ratio):
    with pytest.raises(ValueError, match="mask_ratio must be at least 0 and below 1, not "):
        kept_count(16, ratio)
    with pytest.raises(ValueError, match="final_ratio must be at least 0 and below 1, not "):
        check_ratio("final_ratio", ratio)


def test_every_schedule_starts_at_the_start():
    for schedule in SCHEDULES:
        assert mask_ratio_at(schedule, 0.0, 0.5, 0.125) == 0.5, schedule


def test_every_falling_schedule_ends_at_the_end():
    for schedule in SCHEDULES.keys() - {"constant", "exp"}:
        assert mask_ratio_at(schedule, 1.0, 0.5, 0.125) == pytest.approx(0.125, abs=1e-15), schedule
    assert mask_ratio_at("constant", 1.0, 0.5, 0.125) == 0.5
    assert mask_ratio_at("exp", 1.0, 0.5, 0.0) == pytest.approx(0.5 * math.exp(-7), rel=1e-12)


def test_schedules_never_rise():
    for schedule in SCHEDULES:
        ratios = [mask_ratio_at(schedule, u / 100, 0.75, 0.25) for u in range(101)]
        falls = [later < earlier for earlier, later in itertools.pairwise(ratios)]
        assert not any(falls) if schedule == "constant" else all(falls), schedule


@pytest.mark.parametrize(
    ("schedule", "weight"),
    [
        ("constant", 1),
        ("linear", 1 / 2),
        ("exp", math.exp(-3.5)),
        ("cosine2", 1 / 2),
        ("cosine3", math.sqrt(1 / 8)),
        ("cosine4", 1 / 4),
        ("cosine5", math.sqrt(1 / 32)),
        ("cosine6", 1 / 8),
    ],
)
def test_values_halfway(schedule, weight):
    assert mask_ratio_at(schedule, 0.5, 0.5, 0.1) == pytest.approx(0.4 * weight + 0.1, rel=1e-12)


def test_the_published_schedules_are_there():
    assert set(SCHEDULES) == {"constant", "linear", "exp", *(f"cosine{power}" for power in range(2, 7))}


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="unknown mask schedule 'cosine': choose from constant, linear, "):
        mask_ratio_at("cosine", 0.5, 0.5, 0.0)


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan])
def test_a_share_outside_the_run(share):
    with pytest.raises(ValueError, match=r"the share of training done must be in \[0, 1\], not "):
        mask_ratio_at("linear", share, 0.5, 0.0)


# A schedule as a staircase

FALLING = [schedule for schedule in SCHEDULES if schedule != "constant"]


def by_step(stages, steps):
    """The kept count of each step."""
    ends = [*(stage.first_step for stage in stages[1:]), steps]
    return [stage.keep for stage, end in zip(stages, ends, strict=True) for _ in range(stage.first_step, end)]


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.0), (0.75, 0.25), (0.9, 0.1), (0.3, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("length", [16, 64, 256, 1024])
def test_a_staircase_keeps_what_its_schedule_does(length, start, end):
    for schedule, steps in itertools.product(FALLING, [50, 97, 1000, 5000]):
        stages = ratio_stages(schedule, steps, start, end, length, 8)
        kept = by_step(stages, steps)
        exact = [length * (1 - mask_ratio_at(schedule, step / steps, start, end)) for step in range(steps)]
        what = f"{schedule}, {steps} steps: {stages}"
        assert len(kept) == steps, what
        assert sum(kept) == pytest.approx(sum(exact), rel=0.01), what
        assert 1 < len(stages) <= 8, what
        assert len({stage.keep for stage in stages}) == len(stages), what
        assert all((later > earlier) == (end < start) for (_, earlier), (_, later) in itertools.pairwise(stages)), what
        assert all(1 <= keep <= length for keep in kept), what
        # Even parts of the range, an eighth each, with two roundings: the staircase is never far from the schedule.
        stair = length * abs(start - end) / 8 + 1
        assert max(abs(a - b) for a, b in zip(kept, exact, strict=True)) <= 1.5 * stair, what


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_a_staircase_of_few_steps_errs_by_half_a_stair(steps):
    for schedule, length in itertools.product(FALLING, [64, 256, 1024]):
        stages = ratio_stages(schedule, steps, 0.5, 0.0, length, 8)
        exact = sum(length * (1 - mask_ratio_at(schedule, step / steps, 0.5, 0.0)) for step in range(steps))
        highest = max([1, *(later - earlier for (_, earlier), (_, later) in itertools.pairwise(stages))])
        assert abs(sum(by_step(stages, steps)) - exact) <= highest / 2 + 1, (schedule, length, stages)


def test_a_long_schedule_is_summed_up_as_a_short_one():
    for schedule in FALLING:
        short, long = (ratio_stages(schedule, steps, 0.5, 0.0, 256, 8) for steps in (1000, 2_000_000))
        assert [stage.keep for stage in short] == pytest.approx([stage.keep for stage in long], abs=1)
        for (first, _), (same, _) in zip(short, long, strict=True):
            assert first / 1000 == pytest.approx(same / 2e6, abs=0.005), schedule


@pytest.mark.parametrize("levels", [1, 2, 3, 100])
def test_number_of_levels(levels):
    for schedule in FALLING:
        stages = ratio_stages(schedule, 1000, 0.5, 0.0, 256, levels)
        assert len(stages) <= levels
        assert len(stages) == levels or levels == 100
        exact = [256 * (1 - mask_ratio_at(schedule, step / 1000, 0.5, 0.0)) for step in range(1000)]
        assert sum(by_step(stages, 1000)) == pytest.approx(sum(exact), rel=0.003), stages


def test_a_constant_ratio_is_one_stage():
    assert ratio_stages("constant", 1000, 0.55, 0.1, 16, 8) == ((0, kept_count(16, 0.55)),)
    assert ratio_stages("linear", 1000, 0.55, 0.55, 16, 8) == ((0, kept_count(16, 0.55)),)
    assert ratio_stages("linear", 0, 0.5, 0.0, 16, 8) == ()


def test_stages_that_cannot_be():
    with pytest.raises(ValueError, match="unknown mask schedule 'cosine'"):
        ratio_stages("cosine", 10, 0.5, 0.0, 16, 8)
    with pytest.raises(ValueError, match="mask_ratio_end must be at least 0 and below 1, not 1"):
        ratio_stages("linear", 10, 0.5, 1.0, 16, 8)
    with pytest.raises(ValueError, match="a schedule needs at least 1 level, not 0"):
        ratio_stages("linear", 10, 0.5, 0.0, 16, 0)


# A ratio for each sample

WAYS = [
    RatioPerSample("uniform", 0.3, 0.7),
    RatioPerSample("noise", 0.25, 0.75),
    RatioPerSample("noise", 0.0, 0.5),
    RatioPerSample("uniform", 0.05, 0.1),
    RatioPerSample("uniform", 0.6, 0.99),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_counts_of_a_group(way):
    for length in [*range(1, 70), 256, 1024]:
        counts = way.counts(length)
        assert len(counts) == GROUP
        assert sum(counts) == max(GROUP, round(GROUP * length * (1 - way.mean)))
        assert counts == sorted(counts)
        assert 1 <= counts[0] <= counts[-1] <= length
        assert way.total(3 * GROUP, length) == 3 * sum(counts)
        exact = sorted(length * (1 - way.low - (way.high - way.low) * (i + 0.5) / GROUP) for i in range(GROUP))
        if exact[0] >= 1:
            assert all(abs(a - b) <= 1 for a, b in zip(counts, exact, strict=True)), length


def test_known_counts():
    assert WAYS[0].counts(16) == [5, 6, 7, 8, 8, 9, 10, 11]
    assert WAYS[1].counts(256) == [72, 88, 104, 120, 136, 152, 168, 184]


def kept(way, batch, offset=0, *, seed=3, length=64):
    sample = torch.arange(batch) + offset
    # A noise level is a function of the sample, as in training.
    sigma = ((sample % 1009 * 0.7).sin() * 1.2 - 1.2).exp()
    return way.keep(seed, sample, EDM().log_snr(sigma), length), sigma


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_group_keeps_the_same_counts(way):
    keep, _ = kept(way, 40 * GROUP)
    assert keep.dtype == torch.int32
    assert keep.sum() == way.total(40 * GROUP, 64)
    for group in keep.view(-1, GROUP):
        assert sorted(group.tolist()) == way.counts(64)


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_counts_belong_to_samples(way):
    whole, _ = kept(way, 6 * GROUP, 2**33)
    parts = [kept(way, 2 * GROUP, 2**33), kept(way, GROUP, 2**33 + 2 * GROUP), kept(way, 3 * GROUP, 2**33 + 3 * GROUP)]
    assert torch.equal(torch.cat([keep for keep, _ in parts]), whole)
    assert not torch.equal(kept(way, 6 * GROUP, 2**33 + GROUP)[0], whole)


def test_uniform_counts_are_uniform_over_samples():
    way = WAYS[0]
    keep, _ = kept(way, 4000 * GROUP)
    counts = torch.tensor(way.counts(64))
    assert len(set(counts.tolist())) == GROUP
    table = (keep.view(-1, GROUP, 1) == counts).sum(0)  # place in the group x count
    assert stats.chisquare(table.flatten().numpy()).pvalue > 0.01
    assert table.sum(1).eq(4000).all()
    # Two places of a group share out the counts, and know nothing else of each other, as groups do not.
    correlation = torch.corrcoef(keep.view(-1, GROUP).double().T)
    assert (correlation + 1 / (GROUP - 1) - (1 + 1 / (GROUP - 1)) * torch.eye(GROUP)).abs().max() < 5 / math.sqrt(4000)
    other, _ = kept(way, 4000 * GROUP, seed=4)
    both = torch.stack([keep, other, keep.roll(GROUP)]).double()
    assert (torch.corrcoef(both) - torch.eye(3)).abs().max() < 5 / math.sqrt(4000 * GROUP)


def test_more_noise_keeps_less():
    keep, sigma = kept(WAYS[1], 50 * GROUP)
    for counts, levels in zip(keep.view(-1, GROUP), sigma.view(-1, GROUP), strict=True):
        assert counts[levels.argsort()].tolist() == WAYS[1].counts(64)[::-1]
    assert stats.spearmanr(keep.numpy(), sigma.numpy()).statistic < -0.8


def test_equal_noise_still_shares_out_the_counts():
    keep = WAYS[1].keep(0, torch.arange(GROUP), torch.ones(GROUP), 64)
    assert sorted(keep.tolist()) == WAYS[1].counts(64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", None),
        ("uniform(0.3,0.7)", ("uniform", 0.3, 0.7)),
        (" uniform( .25, 5e-1 )", ("uniform", 0.25, 0.5)),
        ("noise(0,0.9)", ("noise", 0.0, 0.9)),
        ("noise", ("noise", 0.25, 0.75)),
    ],
)
def test_parsing(text, expected):
    assert parse_per_sample(text, 0.5) == expected


def test_plain_noise_stays_within_the_ratios():
    for ratio in (0.01, 0.25, 0.5, 0.75, 0.99):
        way = parse_per_sample("noise", ratio)
        assert 0 < way.low < ratio < way.high < 1
        assert way.mean == pytest.approx(ratio, rel=1e-12)
    assert parse_per_sample("noise", 0.25) == ("noise", 0.125, 0.375)
    with pytest.raises(ValueError, match="noise varies mask_ratio, which must be above 0"):
        parse_per_sample("noise", 0.0)


@pytest.mark.parametrize(
    "text", ["", "uniform", "normal(0.1,0.2)", "uniform(0.3)", "uniform(a,b)", "uniform(,)", "noise()", "noise(1,2,3)"]
)
def test_nonsense(text):
    with pytest.raises(ValueError, match=r"must be constant, noise, noise\(a,b\) or uniform\(a,b\) .*, not "):
        parse_per_sample(text, 0.5)


@pytest.mark.parametrize(
    "text", ["uniform(0.7,0.3)", "uniform(0.5,0.5)", "noise(0,1)", "noise(-.1,.5)", "noise(nan,.5)"]
)
def test_ratios_that_do_not_rise(text):
    with pytest.raises(ValueError, match="the ratios must rise, from at least 0 to below 1"):
        parse_per_sample(text, 0.5)


def test_a_part_of_a_group():
    message = f"drawn for groups of {GROUP} samples, and 12 samples are not a multiple"
    with pytest.raises(ValueError, match=message):
        WAYS[0].total(12, 64)
    with pytest.raises(ValueError, match=message):
        kept(WAYS[0], 12)


# Both in a batch


def drawn(batch=2 * GROUP, seed=3, offset=5 * GROUP, per_sample=WAYS[1], keep=8, draw=training_draws):
    return draw(
        EDM(),
        torch.zeros(batch, 3, 8, 8),
        torch.arange(batch) % 5,
        length=16,
        keep=keep,
        drop=lambda labels, chosen: labels.masked_fill(chosen, 5),
        label_drop=0.1,
        per_sample=per_sample,
        seed=seed,
        offset=offset,
    )


def flat(draws):
    return [*draws[:1], *draws.mask, *draws[2:]]


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_draws_with_a_ratio_per_sample(way):
    draws, plain = drawn(per_sample=way), drawn(per_sample=None)
    for name in ("condition", "t", "noise"):
        assert torch.equal(getattr(draws, name), getattr(plain, name)), name
    keep = way.keep(3, torch.arange(2 * GROUP) + 5 * GROUP, EDM().log_snr(draws.t), 16)
    assert torch.equal(draws.mask.num_kept, keep)
    # A mask is that of the same random order of the patches, cut elsewhere.
    assert torch.equal(draws.mask.dropped.sum(1), 16 - keep)
    for b in range(2 * GROUP):
        fewer, more = sorted(
            [set(torch.where(~mask.dropped[b])[0].tolist()) for mask in (draws.mask, plain.mask)], key=len
        )
        assert fewer <= more
    halves = [drawn(GROUP, offset=offset * GROUP, per_sample=way) for offset in (5, 6)]
    assert torch.equal(torch.cat([half.mask.ids_restore for half in halves]), draws.mask.ids_restore)
    assert torch.equal(torch.cat([half.mask.ids_keep for half in halves]), draws.mask.ids_keep)


def test_nothing_dropped_is_no_mask_for_any_sample():
    assert drawn(keep=16).mask is None


def test_an_offset_within_a_group():
    with pytest.raises(ValueError, match=f"offset must be a multiple of {GROUP} for a mask ratio per sample, not 4"):
        drawn(offset=4)


@pytest.mark.parametrize("way", [None, *WAYS[:2]], ids=str)
def test_seed_and_offset_as_tensors(way):
    tensors = drawn(seed=torch.tensor(3), offset=torch.tensor(5 * GROUP), per_sample=way)
    assert all(map(torch.equal, flat(tensors)[:3], flat(drawn(per_sample=way))[:3]))
    assert torch.equal(tensors.noise, drawn(per_sample=way).noise)


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_draws_compile_into_one_graph(way):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(drawn, fullgraph=True, backend=counter)
    for seed, offset in ((3, 5), (4, 0), (2**40, 2**40)):
        tensors = {"seed": torch.tensor(seed), "offset": torch.tensor(offset * GROUP), "per_sample": way}
        for ours, eager in zip(flat(compiled(**tensors)), flat(drawn(**tensors)), strict=True):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1


def test_ratio_falls_over_the_masked_steps_alone():
    masking = Masking(unmask_steps=20, mask_schedule="linear", mask_ratio_end=0.1)
    assert masking.ratio_at(0, 100) == 0.5
    assert masking.ratio_at(40, 100) == pytest.approx(0.3)
    assert 0.1 < masking.ratio_at(79, 100) < 0.11
    assert [masking.ratio_at(step, 100) for step in (80, 99)] == [0.0, 0.0]
    assert masking.lowest_ratio(100) == 0.0
    assert Masking(mask_schedule="linear", mask_ratio_end=0.1).lowest_ratio(100) == pytest.approx(0.104)
    assert Masking(mask_schedule="linear", mask_ratio=0.2, mask_ratio_end=0.6).lowest_ratio(100) == 0.2


def test_unmasked_from_the_first_step():
    masking = Masking(unmask_steps=10)
    masking.check(max_steps=10, micro_batch=1, can_mask=True)
    assert masking.ratio_at(0, 10) == 0.0
    assert masking.stages(16, 10) == ((0, 16),)
    assert masking.kept_at(0, 16, 10) == 16


def test_stages_of_a_run():
    masking = Masking(unmask_steps=20)
    assert masking.stages(16, 100) == ((0, 8), (80, 16))
    assert [masking.kept_at(step, 16, 100) for step in (0, 79, 80, 99)] == [8, 8, 16, 16]
    assert Masking().stages(16, 100) == ((0, 8),)
    falling = Masking(unmask_steps=20, mask_schedule="linear", mask_ratio_end=0.1, mask_levels=4)
    assert falling.stages(256, 100) == (*ratio_stages("linear", 80, 0.5, 0.1, 256, 4), (80, 256))
    kept = [falling.kept_at(step, 256, 100) for step in range(100)]
    assert kept == sorted(kept)
    assert len(set(kept)) == 5
    ratios = [falling.ratio_at(step, 100) for step in range(80)]
    assert sum(kept[:80]) / 80 == pytest.approx(256 * (1 - sum(ratios) / 80), rel=0.01)


def test_a_schedule_that_ends_unmasked_has_no_stage_after():
    masking = Masking(unmask_steps=100, mask_schedule="exp")
    stages = masking.stages(16, 1000)
    assert stages == ratio_stages("exp", 900, 0.5, 0.0, 16, 8)
    assert stages[-1].keep == 16
    assert stages[-1].first_step < 900
    assert masking.kept_at(950, 16, 1000) == 16


def test_ratios_per_sample_of_a_run():
    assert Masking().per_sample is None
    masking = Masking(mask_ratio_per_sample="uniform(0.2,0.8)")
    masking.check(max_steps=10, micro_batch=64, can_mask=True)
    assert masking.per_sample == ("uniform", 0.2, 0.8)
    masking = Masking(mask_ratio_per_sample="noise", mask_ratio=0.25)
    masking.check(max_steps=10, micro_batch=8, can_mask=True)
    assert masking.per_sample == ("noise", 0.125, 0.375)
    assert masking.kept_at(0, 16, 10) == 12


def test_structured_masks_keep_one_of_each_group_uniformly():
    batch, side = 4096, 6
    mask = structured_mask(batch, side, seed=5, offset=10, device=torch.device("cpu"))
    assert mask.ids_keep.dtype == mask.ids_restore.dtype == torch.int32
    kept = ~mask.dropped.view(batch, 3, 2, 3, 2)
    assert (kept.sum((2, 4)) == 1).all()
    # Each of a group's four positions a fourth of the time, and two groups independently of each other.
    expected = batch / 4
    for counts in kept.sum(0).permute(0, 2, 1, 3).reshape(9, 4):
        assert stats.chisquare(counts.numpy(), [expected] * 4).pvalue > 1e-4
    first, second = (kept[:, 0, :, column].flatten(1).int().argmax(1) for column in (0, 1))
    pairs = torch.bincount(4 * first + second, minlength=16)
    assert stats.chisquare(pairs.numpy(), [batch / 16] * 16).pvalue > 1e-4


@pytest.mark.parametrize("side", [2, 4, 16])
def test_the_indices_of_a_structured_mask_fit_each_other(side):
    mask = structured_mask(3, side, seed=1, offset=0, device=torch.device("cpu"))
    keep = side * side // 4
    assert mask.ids_keep.shape == (3, keep)
    for kept, restore in zip(mask.ids_keep.tolist(), mask.ids_restore.tolist(), strict=True):
        assert sorted(restore) == list(range(side * side))
        assert [restore[position] for position in kept] == list(range(keep))


def test_a_structured_mask_is_a_function_of_seed_and_sample():
    whole = structured_mask(8, 4, seed=2, offset=0, device=torch.device("cpu"))
    seed, offset = torch.tensor(2), torch.tensor(3)
    part = structured_mask(4, 4, seed=seed, offset=offset, device=torch.device("cpu"))
    assert torch.equal(part.ids_keep, whole.ids_keep[3:7])
    assert torch.equal(part.ids_restore, whole.ids_restore[3:7])
    other = structured_mask(8, 4, seed=3, offset=0, device=torch.device("cpu"))
    assert not torch.equal(other.ids_keep, whole.ids_keep)


def test_structured_masks_that_cannot_be():
    with pytest.raises(ValueError, match="a structured mask needs a grid of groups of 2 x 2 patches, not 3 x 3"):
        structured_mask(1, 3, seed=0, offset=0, device=torch.device("cpu"))
    options = {"drop": lambda condition, _: condition, "structured": True}
    for length, keep in ((16, 8), (9, 2), (32, 8)):
        with pytest.raises(ValueError, match=f"keeps a fourth of a square grid, not {keep} of {length} positions"):
            training_draws(EDM(), torch.zeros(2, 1, 8, 8), torch.zeros(2), length=length, keep=keep, **options)


@pytest.mark.parametrize(
    "changed", [{"mask_ratio": 0.5}, {"mask_schedule": "linear"}, {"mask_ratio_per_sample": "uniform(0.6,0.9)"}]
)
def test_a_structured_pattern_goes_with_one_ratio(changed):
    fields = {"mask_ratio": 0.75, "mask_pattern": "structured"}
    Masking(**fields).check(max_steps=10, micro_batch=8, can_mask=True)
    with pytest.raises(ValueError, match="mask_pattern structured keeps one patch of four"):
        Masking(**{**fields, **changed}).check(max_steps=10, micro_batch=8, can_mask=True)
    with pytest.raises(ValueError, match="unknown mask_pattern 'striped'"):
        Masking(mask_pattern="striped").check(max_steps=10, micro_batch=8, can_mask=True)
