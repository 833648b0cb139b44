"""The guard card: its numbers against the calibration table they come from, and a page that holds for any guard."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from conftest import preference_rows
from scipy import stats

from rm_ood import OODGuard
from rm_ood.card import GuardCard
from rm_ood.doctor import plant
from rm_ood.identity import Identity
from rm_ood.power import share_interval
from rm_ood.state import FittedState

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")


def made(model_and_tokenizer: Any, rows: Any = None, **options: Any) -> OODGuard:
    settings = {"alpha": 0.05, "max_length": 128, **options}
    share = settings.pop("calibration", 0.5)
    return OODGuard(*model_and_tokenizer, **settings).fit(
        rows or preference_rows(400), calibration=share, progress=False
    )


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    return made((copy.deepcopy(shared_decoder), decoder_tokenizer))


@pytest.fixture(scope="module")
def state(guard: OODGuard) -> FittedState:
    return guard._fitted()


class Page(HTMLParser):
    """Tags in order, their nesting, and the words between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "path", "rect"):
            self.open.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def whole(card: GuardCard) -> dict[str, Any]:
    """A card in its three forms, each checked for what every card must be; its values."""
    values = card.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    text, page = str(card), card.to_html()
    assert text in card.to_markdown()
    parsed = Page(page)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert not any(word in page for word in ("http", "url(", "@import"))
    assert not any(word in text + parsed.words for word in ("None", "nan", "inf "))
    return values


def test_estimators_are_named_with_what_they_rest_on(state: FittedState) -> None:
    values = whole(GuardCard.of(state))
    final, prompt = values["detectors"]["final"], values["detectors"]["prompt/mean@0.67"]
    assert final["estimator"] == "class-conditional Mahalanobis, tied covariance"
    copies = state.record["noisy_copies"]
    assert 150 < copies == state.record["fit_prompts"]
    contrast = f", of vectors of length 1 (Mahalanobis++), weighed against {copies} noisy copies of the fit texts"
    contrast += "; and the ratio of the two distances by itself"
    assert prompt["estimator"] == "Mahalanobis, one Gaussian" + contrast
    assert values["detectors"]["response/mean@0.67"]["estimator"] == final["estimator"] + contrast
    assert final["samples_per_feature"] == round(final["samples"] / 32, 2)
    assert (final["shrinkage_rule"], final["floor"]) == ("oas", 1e-4)
    assert next(iter(values["detectors"])) == "final"


def test_length_correlation_is_that_of_part_b_and_standardising_removes_it(tiny_decoder: Any) -> None:
    # Of vectors as they come: at length 1 their scores depend on the number of tokens much less.
    state = made(tiny_decoder, span_means="raw").state
    values = whole(GuardCard.of(state))
    table, found = state.table, values["length_correlation"]
    assert table is not None
    b = ~table.part_a
    assert found["n"] == table.n_b
    assert found["chance"] == pytest.approx(1.96 / math.sqrt(table.n_b - 1))
    for i, name in enumerate(table.channels):
        lengths = table.lengths[b, 0 if name.startswith("prompt") else 1]
        expected = stats.spearmanr(table.scores[b, i], lengths).statistic
        assert found["channels"][name]["raw"] == pytest.approx(expected)
    # Means over more tokens are less noisy, so the raw scores of span means fall with length.
    mean = found["channels"]["response/mean@0.67"]
    assert mean["raw"] < -0.3
    assert abs(mean["standardised"]) < 2 * found["chance"]
    assert all(abs(r) < 2 * found["chance"] for r in found["joined"].values())


def test_an_item_that_moves_by_the_detectable_shift_is_flagged_so_often(state: FittedState) -> None:
    (pool,) = whole(GuardCard.of(state))["detectable"]
    scores = state.profile(state.config.joined).calibration_scores()
    assert pool["unit"] == pytest.approx(scores.std(ddof=1))
    assert pool["group"] is None
    for entry in pool["item"]:
        moved = scores + entry["shift"] * pool["unit"]
        assert (moved + 1e-9 > pool["threshold"]).mean() >= entry["power"]
        assert (moved - 1e-9 > pool["threshold"]).mean() < entry["power"]
    assert [entry["prompts"] for entry in pool["batch"]] == [100, 1000]
    small, large = (entry["shift"] for entry in pool["batch"])
    assert 0 < large < small < pool["item"][0]["shift"]
    np.testing.assert_allclose(pool["quantiles"], np.quantile(scores, [0.05, 0.25, 0.5, 0.75, 0.95]))


def test_the_text_names_what_it_can_detect(state: FittedState) -> None:
    card = GuardCard.of(state)
    (pool,) = card.values["detectable"]
    assert f"50 % if its score moves by {pool['item'][0]['shift']:.1f} sd" in str(card)
    assert f"100 prompts: {pool['batch'][0]['shift']:.2f} sd" in str(card)
    # Some 250 calibration prompts are needed for it, however many come.
    assert f"0.3 sd is not found with n = {pool['n']} calibration prompts" in str(card)
    pool.update(prompts=321)
    assert "0.3 sd is found after about 321 prompts" in str(card)
    pool["batch"][0]["shift"] = None
    assert "100 prompts: none" in str(card)


def test_false_alarms_by_length_carry_their_counts(state: FittedState) -> None:
    cal = whole(GuardCard.of(state))["calibration"]
    assert sum(b["n"] for b in cal["by_length"]) == cal["n"]
    for b in cal["by_length"]:
        assert b["rate"] == b["flagged"] / b["n"]
        assert [b["low"], b["high"]] == pytest.approx(share_interval(b["flagged"], b["n"]))
    assert sum(b["flagged"] for b in cal["by_length"]) <= cal["k"]


def test_a_guard_without_calibration(tiny_decoder: Any) -> None:
    card = made(tiny_decoder, calibration=0).report()
    values = whole(card)
    assert [values[key] for key in ("calibration", "length_correlation", "detectable")] == [None] * 3
    assert "Not calibrated" in str(card)
    assert "not calibrated" in card.to_html()


def test_a_guard_for_vectors_only_has_the_same_card(guard: OODGuard, tmp_path: Any) -> None:
    guard.save_pretrained(tmp_path / "guard")
    loaded = OODGuard.from_pretrained(tmp_path / "guard").report()
    assert whole(loaded) == whole(guard.report())
    assert loaded.to_html() == guard.report().to_html()


def test_a_record_of_an_older_version_still_reports(state: FittedState) -> None:
    values = whole(GuardCard.of(replace(state, record={k: v for k, v in state.record.items() if k != "doctor"})))
    assert values["doctor"] is None
    bare = GuardCard.of(replace(state, record={}, identity=Identity({})))
    assert "Guard on vectors" in str(bare)
    assert "vectors of unknown origin" in bare.to_html()
    assert json.dumps(bare.to_dict(), allow_nan=False)


def test_groups_stand_apart(tiny_decoder: Any) -> None:
    rows = [{**r, "team": "<b>" if i % 2 else "a&c"} for i, r in enumerate(preference_rows(700))]
    guard = made(tiny_decoder, rows, groups="team")
    card = guard.report()
    values = whole(card)
    assert {pool["group"] for pool in values["detectable"]} == {"<b>", "a&c"}
    assert "Detectable shift (group a&c)" in str(card)
    page = card.to_html()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "in each of 2 groups" in page


def test_groups_that_share_a_pool_are_one_row_and_an_empty_one_has_no_rate(tiny_decoder: Any) -> None:
    rows = [{**r, "team": "abcd"[min(i % 9, 3)]} for i, r in enumerate(preference_rows(700))]
    state = made(tiny_decoder, rows, groups="team")._fitted()
    table = state.table
    assert table is not None
    groups = ["d" if label == "c" and not a else label for label, a in zip(table.groups, table.part_a, strict=True)]
    card = GuardCard.of(state.with_table(replace(table, groups=tuple(groups)), {}))
    values = whole(card)
    assert [p["group"] for p in values["detectable"]] == ["a, b, c", "d"]
    by_group = {g["group"]: g for g in values["calibration"]["by_group"]}
    assert (by_group["c"]["rate"], by_group["c"]["flagged"]) == (None, 0)


def test_groups_by_length_and_one_class(tiny_decoder: Any) -> None:
    plain = [{"prompt": r["prompt"], "response": r["chosen"]} for r in preference_rows(700)]
    card = made(tiny_decoder, plain, groups="length", one_class=True, confidence=None).report()
    values = whole(card)
    assert len(values["detectable"]) > 1
    assert {d["estimator"][:25] for d in values["detectors"].values()} == {"Mahalanobis, one Gaussian"}
    assert "(one class)" in str(card)
    assert "on average" in card.to_html()


def test_infinite_calibration_scores_and_equal_lengths(state: FittedState) -> None:
    table = state.table
    assert table is not None
    b = np.flatnonzero(~table.part_a)
    scores = table.scores.copy()
    scores[b[0], :] = math.inf
    holed = replace(table, scores=scores, lengths=np.full_like(table.lengths, 7))
    values = whole(GuardCard.of(state.with_table(holed, {})))
    (pool,) = values["detectable"]
    assert math.isfinite(pool["unit"])
    assert all(math.isfinite(entry["shift"]) for entry in pool["item"])
    assert set(values["length_correlation"]["joined"].values()) == {None}
    assert len(values["calibration"]["by_length"]) == 1


def test_scores_that_do_not_vary(state: FittedState) -> None:
    table = state.table
    assert table is not None
    card = GuardCard.of(state.with_table(replace(table, scores=np.ones_like(table.scores)), {}))
    (pool,) = whole(card)["detectable"]
    assert pool["unit"] is pool["prompts"] is pool["item"][0]["shift"] is None
    assert "unknown, the calibration scores do not vary" in str(card)


def test_blind_spots_are_the_doctors(guard: OODGuard, state: FittedState) -> None:
    assert "not examined" in str(GuardCard.of(state))
    items = [(r["prompt"], r["chosen"]) for r in preference_rows(12, seed=5)]
    findings = plant(guard, items).to_dict()
    findings["notes"].append("one <i>note</i>")
    card = GuardCard.of(replace(state, record={**state.record, "doctor": findings}))
    assert whole(card)["doctor"] == findings
    assert f"caught: {', '.join(findings['caught']) or 'none'}; blind to: {', '.join(findings['blind'])}" in str(card)
    page = card.to_html()
    assert all(part in Page(page).words for part in (*findings["caught"], *findings["blind"], findings["rule"]))
    assert "<i>" not in page


def test_the_page_has_its_sections_and_header_cells(state: FittedState) -> None:
    parsed = Page(GuardCard.of(state).to_html())
    assert parsed.tags.count("section") == parsed.tags.count("h2") == 7
    assert parsed.tags.count("svg") == 1 + len(GuardCard.of(state).values["calibration"]["by_length"])
    assert "rank k =" in parsed.words
    assert "prefers-color-scheme:dark" in parsed.words
    assert state.identity.fields["tokenizer"] in parsed.words


def test_names_that_others_chose_are_escaped(state: FittedState) -> None:
    odd = {"architecture": "<script>alert(1)</script>", "tokenizer": "a\"b'c"}
    record = {**state.record, "notes": ["<img src=x>"]}
    page = GuardCard.of(replace(state, identity=Identity(odd), record=record)).to_html()
    assert not {"script", "img"} & set(Page(page).tags)
    assert "&lt;script&gt;" in page
