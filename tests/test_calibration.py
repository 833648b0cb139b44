"""The calibration table: split, join, rank, groups; the false-alarm promise of the combined verdict."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rm_ood.calibration import CalibrationTable, part_a_size, prompts_needed, split_parts
from rm_ood.conformal import p_values
from rm_ood.errors import CalibrationError, InputError
from rm_ood.length import LengthStandardiser

PROMPT, RESPONSE = "prompt/mean@0.67", "response/mean@0.67"
CHANNELS = ("final", PROMPT, RESPONSE, "reward")
DEFAULT = CHANNELS[:3]
ONE_IN_A_THOUSAND = (0.0005, 0.9995)


def make(n: int, seed: int = 0, *, correlation: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of `CHANNELS` and span lengths of n in-distribution items."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(4, 0.9, (n, 2))), 1, 1024).astype(np.int64)
    common, own = rng.normal(size=(n, 1)), rng.normal(size=(n, 4))
    noise = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own
    spans = lengths[:, [1, 0, 1, 1]]
    scores = np.exp(noise * np.sqrt(0.01 + 1 / spans) + 3 / np.sqrt(spans))
    scores[:, 3] = np.abs(noise[:, 3])
    return scores, lengths


def table(n: int, seed: int = 0, **options: Any) -> CalibrationTable:
    scores, lengths = make(n, seed)
    keys = np.random.default_rng(seed).integers(0, 2**63, n).astype(np.uint64)
    return CalibrationTable(scores, CHANNELS, lengths, split_parts(keys, 0), **options)


# Split


@pytest.mark.parametrize(("n", "a"), [(10, 10), (50, 50), (100, 50), (250, 50), (251, 51), (374, 75), (10_000, 2000)])
def test_part_a_is_a_fifth_and_at_least_fifty(n: int, a: int) -> None:
    assert part_a_size(n) == a
    assert split_parts(np.arange(n), 0).sum() == a


@given(st.sets(st.integers(0, 2**64 - 1), min_size=60, max_size=120), st.integers(-(2**70), 2**70), st.randoms())
def test_the_split_depends_on_the_set_of_keys_alone(keys: set[int], seed: int, random: Any) -> None:
    order = sorted(keys)
    split = dict(zip(order, split_parts(np.array(order, dtype=np.uint64), seed), strict=True))
    random.shuffle(order)
    again = split_parts(np.array(order, dtype=np.uint64), seed)
    assert [split[key] for key in order] == list(again)


def test_the_split_is_pinned_and_moves_with_the_seed() -> None:
    # A saved guard stores the split; this pins the hash, so that refitting the same data gives the same guard.
    keys = np.arange(100, dtype=np.uint64)
    assert np.flatnonzero(split_parts(keys, 0))[:8].tolist() == [1, 4, 5, 6, 7, 11, 13, 16]
    overlap = (split_parts(keys, 0) & split_parts(keys, 1)).sum()
    assert stats.hypergeom(100, 50, 50).ppf(0.0005) <= overlap <= stats.hypergeom(100, 50, 50).ppf(0.9995)


def test_every_prompt_is_in_part_a_equally_often() -> None:
    keys = np.arange(100, dtype=np.uint64) * 7919
    counts = np.sum([split_parts(keys, seed) for seed in range(400)], axis=0)
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], 400, 0.5)
    assert low <= counts.min()
    assert counts.max() <= high


def test_a_prompt_that_comes_twice_is_refused() -> None:
    with pytest.raises(CalibrationError, match="2 of 5 calibration rows repeat a prompt"):
        split_parts(np.array([1, 2, 1, 1, 3]), 0)


@pytest.mark.parametrize(("alpha", "confidence", "total"), [(0.01, 0.95, 374), (0.05, 0.95, 109), (0.01, None, 149)])
def test_prompts_needed_is_the_smallest_number_that_profiles(
    alpha: float, confidence: float | None, total: int
) -> None:
    assert prompts_needed(alpha, confidence) == total
    profile = table(total).profile(("final",), alpha=alpha, confidence=confidence)
    assert profile.pools["all"].k == 1
    with pytest.raises(CalibrationError, match=f"needs {total} calibration prompts .*have {total - 1}, need 1 more"):
        table(total - 1).profile(("final",), alpha=alpha, confidence=confidence)


# The table


def test_sizes() -> None:
    t = table(400)
    assert (t.n, t.n_b) == (400, 320)
    assert t.scores.dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.ones((4, 2))}, "do not fit together"),
        ({"scores": np.ones(5)}, "do not fit together"),
        ({"lengths": np.ones((5, 3))}, "do not fit together"),
        ({"part_a": np.ones((5, 1))}, "do not fit together"),
        ({"channels": ("final", "final")}, "do not fit together"),
        ({"groups": ("a",)}, "1 groups for 5 prompts"),
        ({"scores": np.array([[1, np.nan]] * 2 + [[1, 1]] * 3)}, r"2 rows are NaN or -inf in \['reward'\]"),
        ({"scores": np.array([[-np.inf, 1]] * 5)}, r"5 rows are NaN or -inf in \['final'\]"),
        ({"lengths": np.full((5, 2), -1)}, "negative"),
    ],
)
def test_row5_a_table_that_cannot_be_ranked_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "scores": np.ones((5, 2)),
        "channels": ("final", "reward"),
        "lengths": np.ones((5, 2)),
        "part_a": np.zeros(5),
        "groups": None,
    }
    CalibrationTable(**good)
    with pytest.raises(CalibrationError, match=message):
        CalibrationTable(**{**good, **change})


def test_row10_an_empty_table_names_all_that_is_missing() -> None:
    empty = CalibrationTable(np.ones((0, 1)), ("final",), np.ones((0, 2)), np.ones(0))
    with pytest.raises(CalibrationError, match=r"needs 374 .*\(299 to rank among.*have 0, need 374 more"):
        empty.profile(("final",), alpha=0.01, confidence=0.95)


def test_row15_a_split_without_a_part_a_is_missing_those_prompts() -> None:
    scores, lengths = make(400)
    t = CalibrationTable(scores, CHANNELS, lengths, np.zeros(400))
    with pytest.raises(CalibrationError, match="have 400, need 50 more"):
        t.profile(("final",), alpha=0.01, confidence=0.95)
    t = CalibrationTable(scores, CHANNELS, lengths, np.arange(400) < 300)
    with pytest.raises(CalibrationError, match="have 400, need 199 more"):
        t.profile(("final",), alpha=0.01, confidence=0.95)


def test_profile_refuses_what_it_does_not_have() -> None:
    t = table(400)
    with pytest.raises(InputError, match=r"\['prompt/mean'\] are not in this calibration"):
        t.profile(("prompt/mean",), alpha=0.01, confidence=0.95)
    with pytest.raises(InputError, match="not in this calibration"):
        t.profile((), alpha=0.01, confidence=0.95)
    with pytest.raises(InputError, match="groups='language': the calibration rows were read without a group column"):
        t.profile(("final",), alpha=0.01, confidence=0.95, groups="language")


def test_a_channel_with_hardly_a_finite_score_is_refused() -> None:
    t = table(400)
    scores = t.scores.copy()
    scores[np.flatnonzero(t.part_a)[24:], 1] = np.inf
    broken = CalibrationTable(scores, CHANNELS, t.lengths, t.part_a)
    with pytest.raises(CalibrationError, match=re.escape(f"channel {PROMPT}: only 24 of the 80")):
        broken.profile(("final",), alpha=0.01, confidence=0.95)


# Ranking


def by_hand(t: CalibrationTable, joined: tuple[str, ...], scores: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """The join, written out: standardise on A, largest of each axis, largest of all, rank in B."""
    z_b, z = {}, {}
    for i, name in enumerate(CHANNELS):
        span = 0 if name == PROMPT else 1
        fit = LengthStandardiser.fit(t.scores[t.part_a, i], t.lengths[t.part_a, span], logarithmic=name != "reward")
        z_b[name] = fit(t.scores[~t.part_a, i], t.lengths[~t.part_a, span])
        z[name] = fit(scores[:, i], lengths[:, span])
    found: dict[str, Any] = {"channel_p": {name: p_values(z_b[name], z[name], 0.95) for name in CHANNELS}, "z": z}
    axes = {"prompt": [PROMPT], "response": ["final", RESPONSE, "reward"]}
    axes = {axis: [name for name in names if name in joined] for axis, names in axes.items()}
    largest_b = {a: np.max([z_b[name] for name in names], axis=0) for a, names in axes.items() if names}
    largest = {a: np.max([z[name] for name in names], axis=0) for a, names in axes.items() if names}
    found["axis_score"] = largest
    found["axis_p"] = {axis: p_values(largest_b[axis], largest[axis], 0.95) for axis in largest}
    found["score"] = np.max(list(largest.values()), axis=0)
    found["p"] = p_values(np.max(list(largest_b.values()), axis=0), found["score"], 0.95)
    return found


@pytest.mark.parametrize("joined", [("final",), (PROMPT,), DEFAULT, CHANNELS, ("reward", PROMPT)])
def test_ranking_is_the_join_written_out(joined: tuple[str, ...]) -> None:
    t = table(500)
    scores, lengths = make(40, seed=1)
    scores[:4] *= 20
    ranking = t.profile(joined, alpha=0.01, confidence=0.95).rank(scores, CHANNELS, lengths)
    for name, value in by_hand(t, joined, scores, lengths).items():
        np.testing.assert_equal(getattr(ranking, name), value)
    assert (ranking.p[:4] <= 0.01).all()


def test_channels_may_come_in_any_order_and_those_outside_the_verdict_may_stay_away() -> None:
    profile = table(500).profile((PROMPT, "final"), alpha=0.05, confidence=0.95)
    scores, lengths = make(9, seed=1)
    whole = profile.rank(scores, CHANNELS, lengths)
    part = profile.rank(scores[:, [1, 0]], (PROMPT, "final"), lengths)
    np.testing.assert_array_equal(part.p, whole.p)
    np.testing.assert_array_equal(part.z[PROMPT], whole.z[PROMPT])
    assert list(part.channel_p) == [PROMPT, "final"]
    assert list(whole.channel_p) == list(CHANNELS)
    assert list(whole.axis_p) == ["prompt", "response"]


def test_is_ood_is_exactly_above_the_threshold() -> None:
    for seed in range(5):
        profile = table(200, seed).profile(DEFAULT, alpha=0.05, confidence=0.95)
        scores, lengths = make(500, seed + 100)
        ranking = profile.rank(scores, CHANNELS, lengths)
        np.testing.assert_array_equal(ranking.p <= 0.05, ranking.score > profile.pools["all"].threshold)


def test_row1_an_item_that_cannot_be_scored_is_flagged_and_alone() -> None:
    profile = table(500).profile(DEFAULT, alpha=0.01, confidence=0.95)
    scores, lengths = make(6, seed=1)
    clean = profile.rank(scores, CHANNELS, lengths)
    scores[0, 1], scores[1, 0], scores[2, 3] = np.nan, np.inf, np.nan
    ranking = profile.rank(scores, CHANNELS, lengths)
    assert (ranking.p[:2] <= 0.01).all()
    assert (ranking.p[:2] == ranking.p.min()).all()
    assert ranking.axis_p["prompt"][0] <= 0.01
    assert ranking.axis_p["response"][1] <= 0.01
    # The reward is not part of this verdict.
    assert ranking.channel_p["reward"][2] <= 0.01
    np.testing.assert_array_equal(ranking.p[2:], clean.p[2:])
    np.testing.assert_array_equal(ranking.axis_p["response"][[0, 2, 3]], clean.axis_p["response"][[0, 2, 3]])


def test_infinite_calibration_scores_count_as_the_largest() -> None:
    t = table(500)
    scores = t.scores.copy()
    in_b = np.flatnonzero(~t.part_a)
    scores[in_b[:3], 2] = np.inf
    scores[np.flatnonzero(t.part_a)[:3], 2] = np.inf
    holed = CalibrationTable(scores, CHANNELS, t.lengths, t.part_a)
    profile = holed.profile(DEFAULT, alpha=0.05, confidence=0.95)
    assert np.isfinite(profile.pools["all"].threshold)
    assert np.isinf(profile.pools["all"].scores[-3:]).all()
    with pytest.raises(CalibrationError, match="3 of 400 are infinite"):
        holed.profile(DEFAULT, alpha=0.01, confidence=0.95)
    # A channel outside the verdict may be in any state.
    holed.profile(("final",), alpha=0.01, confidence=0.95)


def test_a_constant_channel_and_zero_scores() -> None:
    t = table(500)
    scores = t.scores.copy()
    scores[:, 0] = 7.0
    scores[5:9, 1] = 0.0
    profile = CalibrationTable(scores, CHANNELS, t.lengths, t.part_a).profile(DEFAULT, alpha=0.05, confidence=0.95)
    ranking = profile.rank(scores[:20], CHANNELS, t.lengths[:20])
    assert all(np.isfinite(z).all() for z in ranking.z.values())
    assert (ranking.channel_p[PROMPT][5:9] > 0.9).all()


def test_scores_that_go_below_zero_are_standardised_as_they_are() -> None:
    t = table(500)
    scores = t.scores.copy()
    scores[:, 0] = np.log(scores[:, 0]) - 1
    assert scores[t.part_a, 0].min() < 0
    mixed = CalibrationTable(scores, CHANNELS, t.lengths, t.part_a).profile(("final",), alpha=0.05, confidence=0.95)
    logs = t.profile(("final",), alpha=0.05, confidence=0.95)
    queries, lengths = make(50, seed=1)
    shifted = queries.copy()
    shifted[:, 0] = np.log(queries[:, 0]) - 1
    np.testing.assert_allclose(
        mixed.rank(shifted, CHANNELS, lengths).z["final"],
        logs.rank(queries, CHANNELS, lengths).z["final"],
        rtol=1e-9,
        atol=1e-9,
    )


def test_the_reward_is_not_logged() -> None:
    """|standardised reward| near 0 is the most ordinary reward, not an extreme one."""
    t = table(500)
    scores = np.repeat(make(1, seed=1)[0], 3, axis=0)
    scores[:, 3] = [0.0, 1e-9, 6.0]
    ranking = t.profile(CHANNELS, alpha=0.05, confidence=0.95).rank(scores, CHANNELS, np.full((3, 2), 50))
    assert ranking.z["reward"][0] == pytest.approx(ranking.z["reward"][1], abs=1e-6)
    assert ranking.z["reward"][0] > -4
    assert ranking.p[2] <= 0.05


def test_no_items() -> None:
    ranking = table(200).profile(DEFAULT, alpha=0.05, confidence=0.95).rank(np.ones((0, 4)), CHANNELS, np.ones((0, 2)))
    assert ranking.p.shape == ranking.score.shape == ranking.axis_p["prompt"].shape == (0,)


def test_one_at_a_time_is_bit_identical_to_a_batch() -> None:
    profile = table(300).profile(DEFAULT, alpha=0.05, confidence=0.95)
    scores, lengths = make(37, seed=1)
    whole = profile.rank(scores, CHANNELS, lengths)
    for i in range(37):
        one = profile.rank(scores[i : i + 1], CHANNELS, lengths[i : i + 1])
        assert (one.p[0], one.score[0]) == (whole.p[i], whole.score[i])


@pytest.mark.parametrize(
    ("scores", "channels", "lengths", "message"),
    [
        (np.ones((2, 2)), ("final", "prompt/mean"), np.ones((2, 2)), r"\['prompt/mean'\] are not in this calibration"),
        (np.ones((2, 1)), ("final",), np.ones((2, 2)), rf"\['{PROMPT}'\] are part of the verdict"),
        (np.ones((2, 3)), ("final", PROMPT), np.ones((2, 2)), r"expected \(q, 2\).*got \(2, 3\)"),
        (np.ones(2), ("final", PROMPT), np.ones((2, 2)), r"expected \(q, 2\).*got \(2,\)"),
        (np.ones((2, 3)), ("final", PROMPT, "final"), np.ones((2, 2)), r"expected \(q, 3\)"),
        (np.ones((2, 2)), ("final", PROMPT), np.ones((2, 1)), r"lengths: expected \(2, 2\), got \(2, 1\)"),
        (np.ones((2, 2)), ("final", PROMPT), np.ones((1, 2)), r"lengths: expected \(2, 2\), got \(1, 2\)"),
    ],
)
def test_rank_refuses_what_does_not_fit(
    scores: np.ndarray, channels: tuple[str, ...], lengths: np.ndarray, message: str
) -> None:
    profile = table(200).profile(("final", PROMPT), alpha=0.05, confidence=0.95)
    with pytest.raises(InputError, match=message):
        profile.rank(scores, channels, lengths)


# Groups


def test_length_groups_are_quintiles_of_a_ranked_apart() -> None:
    t = table(2000)
    profile = t.profile(("final",), alpha=0.05, confidence=0.95, groups="length")
    assert profile.length_edges is not None
    expected = np.quantile(t.lengths[t.part_a, 1], [0.2, 0.4, 0.6, 0.8], method="lower")
    assert list(profile.length_edges) == expected.tolist()
    e = profile.length_edges
    assert list(profile.pools) == [
        f"0-{e[0]} tokens",
        f"{e[0] + 1}-{e[1]} tokens",
        f"{e[1] + 1}-{e[2]} tokens",
        f"{e[2] + 1}-{e[3]} tokens",
        f"{e[3] + 1}+ tokens",
    ]
    in_b = t.lengths[~t.part_a, 1]
    sizes = np.diff([0, *[(in_b <= edge).sum() for edge in e], in_b.size])
    assert [pool.scores.size for pool in profile.pools.values()] == sizes.tolist()
    # The same score at two lengths, ranked in two groups.
    ranking = profile.rank(np.full((2, 1), 1.5), ("final",), np.array([[9, e[0]], [9, e[0] + 1]]))
    pools = list(profile.pools.values())
    assert list(ranking.p <= 0.05) == [z > pool.threshold for z, pool in zip(ranking.score, pools[:2], strict=True)]
    for i in range(2):
        assert ranking.p[i] == p_values(pools[i].scores, ranking.score[i], 0.95)[0]


@pytest.mark.parametrize(("n", "groups"), [(109, 1), (260, 2), (340, 3), (500, 5)])
def test_length_groups_that_are_too_small_merge_with_a_neighbour(n: int, groups: int) -> None:
    profile = table(n).profile(("final",), alpha=0.05, confidence=0.95, groups="length")
    assert len(profile.pools) == groups
    assert min(pool.scores.size for pool in profile.pools.values()) >= 59


@pytest.mark.parametrize(
    ("in_b", "edges"),
    [
        ([60, 60, 60, 60, 60], (1, 2, 3, 4)),
        ([5, 60, 60, 60, 60], (2, 3, 4)),
        ([60, 60, 60, 60, 5], (1, 2, 3)),
        ([60, 90, 5, 70, 60], (1, 2, 4)),
        ([60, 70, 5, 90, 60], (1, 3, 4)),
        ([10, 10, 10, 10, 30], ()),
    ],
)
def test_the_smallest_length_group_joins_its_smaller_neighbour(in_b: list[int], edges: tuple[int, ...]) -> None:
    lengths = np.r_[np.repeat([1, 2, 3, 4, 5], 10), np.repeat([1, 2, 3, 4, 5], in_b)]
    part_a = np.arange(lengths.size) < 50
    t = CalibrationTable(np.ones((lengths.size, 1)), ("final",), np.c_[lengths, lengths], part_a)
    assert t.profile(("final",), alpha=0.05, confidence=0.95, groups="length").length_edges == edges


def test_length_groups_of_equal_lengths_are_one_group() -> None:
    t = table(500)
    flat = CalibrationTable(t.scores, CHANNELS, np.zeros((500, 2)), t.part_a)
    profile = flat.profile(DEFAULT, alpha=0.05, confidence=0.95, groups="length")
    assert sum(pool.scores.size for pool in profile.pools.values()) >= 400
    assert profile.rank(t.scores[:3], CHANNELS, np.zeros((3, 2))).p.shape == (3,)


def test_column_groups_rank_inside_their_group() -> None:
    names = ("en",) * 250 + ("de",) * 250 + ("fr",) * 20
    t = table(520, groups=names)
    profile = t.profile(("final",), alpha=0.05, confidence=0.95, groups="language")
    assert list(profile.pools) == ["de", "en", "fr"]
    in_b = {name: sum(np.array(names)[~t.part_a] == name) for name in ("de", "en", "fr")}
    host = min("de", "en", key=lambda name: (in_b[name], name))
    assert profile.pools["fr"] is profile.pools[host]
    assert profile.pools["fr"].scores.size == in_b["fr"] + in_b[host]
    assert sorted(profile.calibration_scores()) == sorted(np.r_[profile.pools["de"].scores, profile.pools["en"].scores])
    scores, lengths = make(3, seed=1)
    ranking = profile.rank(scores, CHANNELS, lengths, ["en", "fr", "de"])
    for i, group in enumerate(["en", "fr", "de"]):
        assert ranking.p[i] == p_values(profile.pools[group].scores, ranking.score[i], 0.95)[0]
    with pytest.raises(InputError, match=r"\['xx'\] were not there at calibration; known: \['de', 'en', 'fr'\]"):
        profile.rank(scores, CHANNELS, lengths, ["en", "xx", "de"])
    with pytest.raises(InputError, match="3 labels needed"):
        profile.rank(scores, CHANNELS, lengths)


def test_a_group_that_fell_into_part_a_altogether_is_known() -> None:
    t = table(520)
    rare = int(np.flatnonzero(t.part_a)[0])
    names = ["en"] * 520
    names[rare] = "la"
    profile = table(520, groups=tuple(names)).profile(("final",), alpha=0.05, confidence=0.95, groups="language")
    assert profile.pools["la"] is profile.pools["en"]


def test_groups_given_to_a_profile_without_groups_are_unknown() -> None:
    profile = table(200, groups=("en",) * 200).profile(("final",), alpha=0.05, confidence=0.95)
    scores, lengths = make(2, seed=1)
    assert list(profile.pools) == ["all"]
    with pytest.raises(InputError, match=r"\['en'\] were not there"):
        profile.rank(scores, CHANNELS, lengths, ["en", "en"])


# The promise


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_combined_p_value_of_two_axes_is_never_inflated(correlation: float) -> None:
    scores, lengths = make(6250, seed=3, correlation=correlation)
    part_a = split_parts(np.arange(6250), 0)
    t = CalibrationTable(scores, CHANNELS, lengths, part_a)
    fresh, at = make(20_000, seed=4, correlation=correlation)
    for alpha in (0.01, 0.05):
        ranking = t.profile((PROMPT, RESPONSE), alpha=alpha, confidence=None).rank(fresh, CHANNELS, at)
        k = int(alpha * 5001)
        low, high = stats.betabinom.ppf(ONE_IN_A_THOUSAND, 20_000, k, 5001 - k)
        assert low <= (ranking.p <= alpha).sum() <= high
        for p in (*ranking.axis_p.values(), *ranking.channel_p.values()):
            assert low <= (p <= alpha).sum() <= high
        if correlation > 0.5:
            continue
        # The contrast: an alarm when either axis alone is small goes over budget.
        assert (np.minimum(ranking.axis_p["prompt"], ranking.axis_p["response"]) <= alpha).sum() > high


def test_5000_benign_items_at_one_percent() -> None:
    """n of part B is 4,999: the acceptance region of 22 to 88 flags is exact whatever part A learned."""
    scores, lengths = make(6249, seed=11, correlation=0.4)
    t = CalibrationTable(scores, CHANNELS, lengths, split_parts(np.arange(6249), 0))
    assert t.n_b == 4999
    fresh, at = make(5000, seed=12, correlation=0.4)
    flags = (t.profile(DEFAULT, alpha=0.01, confidence=None).rank(fresh, CHANNELS, at).p <= 0.01).sum()
    assert 22 <= flags <= 88


def test_the_guarantee_of_the_joined_verdict() -> None:
    """200 calibrations of 109 prompts at alpha .05; the true rate of each from 3,000 fresh items."""
    two = (PROMPT, RESPONSE)
    fresh, at = make(3000, seed=21, correlation=0.3)
    rates = []
    for seed in range(200):
        scores, lengths = make(109, seed=1000 + seed, correlation=0.3)
        t = CalibrationTable(scores[:, 1:3], two, lengths, split_parts(np.arange(109), seed))
        profile = t.profile(two, alpha=0.05, confidence=0.95)
        rates.append((profile.rank(fresh[:, 1:3], two, at).p <= 0.05).mean())
    low, high = stats.binom.ppf(ONE_IN_A_THOUSAND, 200, 0.95**59)
    assert low <= (np.array(rates) > 0.05).sum() <= high


def test_worst_length_quintile_of_the_joined_verdict() -> None:
    worst = []
    for seed in range(6):
        scores, lengths = make(2500, seed=seed)
        t = CalibrationTable(scores, CHANNELS, lengths, split_parts(np.arange(2500), seed))
        fresh, at = make(20_000, seed=50 + seed)
        flagged = t.profile(DEFAULT, alpha=0.05, confidence=0.95).rank(fresh, CHANNELS, at).p <= 0.05
        quintile = np.searchsorted(np.quantile(at[:, 1], [0.2, 0.4, 0.6, 0.8]), at[:, 1])
        worst.append([flagged[quintile == i].mean() / 0.05 for i in range(5)])
    assert np.max(np.mean(worst, axis=0)) <= 1.25


def test_length_groups_hold_the_promise_in_each_group() -> None:
    scores, lengths = make(6000, seed=31)
    scores[:, 0] *= 1 + (lengths[:, 1] < 20)
    t = CalibrationTable(scores, CHANNELS, lengths, split_parts(np.arange(6000), 0))
    profile = t.profile(("final",), alpha=0.05, confidence=None, groups="length")
    fresh, at = make(20_000, seed=32)
    fresh[:, 0] *= 1 + (at[:, 1] < 20)
    flagged = profile.rank(fresh, CHANNELS, at).p <= 0.05
    group = np.searchsorted(profile.length_edges, at[:, 1], side="left")
    for i, pool in enumerate(profile.pools.values()):
        n, k = pool.scores.size, pool.k
        low, high = stats.betabinom.ppf(ONE_IN_A_THOUSAND, (group == i).sum(), k, n + 1 - k)
        assert low <= flagged[group == i].sum() <= high


def test_scores_of_no_axis_are_refused() -> None:
    profile = table(300).profile(("final",), alpha=0.05, confidence=0.95)
    assert list(profile.axis_scores()) == ["response"]
    with pytest.raises(InputError, match="axes: got none"):
        profile.axis_scores([])
