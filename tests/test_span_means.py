"""The distance of span means (`span_means`), from the fit on texts to the saved guard: noisy copies, and guards from before."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows, sentence
from scipy import stats

from rm_ood import CalibrationError, FormatError, InputError, MahalanobisDetector, OODGuard, artifact, collected
from rm_ood.canaries import CANARIES
from rm_ood.channels import Channel
from rm_ood.detectors import ContrastedMahalanobis, NormalisedMahalanobis
from rm_ood.dialogue import Dialogue
from rm_ood.preferences import hash_fraction, prompt_key
from rm_ood.rewriting import change_prompt, change_response, vocabulary, word_perturbation
from rm_ood.text import TextEncoder
from rm_ood.vectors import unit_rows

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
# Rows of another seed would be another distribution: their prompts begin otherwise, and the guard sees it.
ALL = preference_rows(960)
ROWS, FRESH = ALL[:160], ALL[160:]
TYPES = {"contrast": ContrastedMahalanobis, "unit": NormalisedMahalanobis, "raw": MahalanobisDetector}


@pytest.fixture(scope="module")
def model(shared_decoder: Any, decoder_tokenizer: Any) -> tuple[Any, Any]:
    return copy.deepcopy(shared_decoder), decoder_tokenizer


def made(model: tuple[Any, Any], rows: Any = ROWS, calibration: Any = 0.5, **options: Any) -> OODGuard:
    settings = {"alpha": 0.2, "max_length": 128, **options}
    return OODGuard(*model, **settings).fit(rows, calibration=calibration, progress=False)


def of_fit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if hash_fraction(prompt_key(row["prompt"]), 0) >= 0.5]


class Seen(list[tuple[Any, Any]]):
    """(prompt, response) of everything that was encoded after a fit's own data: the noisy copies among them."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    kept, encode = Seen(), TextEncoder.encode

    def watch(self: TextEncoder, prompt: Any, response: Any, where: str = "item") -> Any:
        kept.append((prompt, response))
        return encode(self, prompt, response, where)

    monkeypatch.setattr(TextEncoder, "encode", watch)
    return kept


@pytest.mark.parametrize("span_means", TYPES)
def test_a_guard_of_every_distance_is_fitted_saved_and_told(span_means: str, model: Any, tmp_path: Path) -> None:
    guard = made(model, span_means=span_means)
    state = guard.state
    for name, detector in state.detectors.items():
        expected = TYPES[span_means] if Channel.parse(name).pooling == "mean" else MahalanobisDetector
        assert type(detector) is expected
    copies = len(of_fit(ROWS)) if span_means == "contrast" else 0
    assert state.record["noisy_copies"] == copies
    assert state.record["fit_prompts"] == len(of_fit(ROWS))
    card = str(guard.report())
    assert (f"weighed against {copies} noisy copies" in card) == (span_means == "contrast")
    assert ("of vectors of length 1" in card) == (span_means != "raw")
    guard.save_pretrained(tmp_path / "guard")
    back = OODGuard.from_pretrained(tmp_path / "guard", *model)
    assert back.config.span_means == span_means
    assert str(back.report()) == card
    texts = [row["prompt"] for row in FRESH[:20]], [row["chosen"] for row in FRESH[:20]]
    before, after = guard.check(*texts), back.check(*texts)
    assert before[3] == after[3]
    for axis in before.axes:
        for name, channel in before.axis(axis).channels.items():
            assert (channel.scores == after.axis(axis).channel(name).scores).all()
    assert guard.recalibrate(FRESH[:100], progress=False).status == "pass"


def test_the_copies_are_of_fit_prompts_alone_with_their_own_words(model: Any) -> None:
    # Words that calibration prompts alone have: nothing of them may be in what scores these prompts.
    rows = [dict(row) for row in ROWS]
    fit = {row["prompt"] for row in of_fit(rows)}
    for row in rows:
        if row["prompt"] not in fit:
            row["chosen"], row["rejected"] = "alpha omega delta", "sigma kappa"
    guard = made(model, rows)
    words = vocabulary(row[name] for row in of_fit(rows) for name in ("prompt", "chosen"))

    def noisy(text: str) -> str:
        return word_perturbation(text, 0.4, words, guard.config.seed)

    items = [(change_prompt(row["prompt"], noisy), change_response(row["chosen"], noisy)) for row in of_fit(rows)]
    assert sum(prompt != row["prompt"] for (prompt, _), row in zip(items, of_fit(rows), strict=True)) > 0.9 * len(items)
    scoring = guard.scoring()
    parts = [part for _, part in scoring.column.batches(scoring.encode(items), scoring.text)]
    for name, detector in guard.state.detectors.items():
        if isinstance(detector, ContrastedMahalanobis):
            vectors = unit_rows(torch.cat([part.vectors[name] for part in parts]))
            torch.testing.assert_close(detector.noise_.means_[0], vectors.mean(0), rtol=1e-4, atol=1e-6)
            assert detector.noise_.class_counts_.tolist() == [len(items)]


def test_there_are_no_more_copies_than_the_cap(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collected, "NOISY_PROMPTS", 50)
    # Windows of 32 items: the cap holds over them all.
    guard = made(model, batch_size=1)
    assert guard.state.record["noisy_copies"] == 50
    assert "weighed against 50 noisy copies" in str(guard.report())


def test_rows_in_another_order_give_the_same_copies(model: Any, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer copies than prompts, over several windows; a sorted file; answers of several rows to one prompt.
    monkeypatch.setattr(collected, "NOISY_PROMPTS", 40)
    rows = [*ROWS, *({**row, "chosen": f"also {row['chosen']}"} for row in ROWS[::3])]
    given = {text for row in rows for text in row.values()} | {text for pair in CANARIES for text in pair}
    copies, states = [], []
    for order in (sorted(rows, key=lambda row: row["chosen"]), random.Random(0).sample(rows, len(rows))):
        seen.clear()
        states.append(made(model, order, batch_size=2).state)
        copies.append(sorted(pair for pair in seen if not given & set(pair)))
    assert copies[0] == copies[1]
    assert 30 <= len(copies[0]) <= 40
    for name, detector in states[0].detectors.items():
        if isinstance(detector, ContrastedMahalanobis):
            other = states[1].detectors[name].noise_
            torch.testing.assert_close(other.means_, detector.noise_.means_, rtol=1e-5, atol=1e-6)


def test_a_sorted_file_gives_copies_of_all_of_it(model: Any, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collected, "NOISY_PROMPTS", 40)
    rows = [{**row, "prompt": f"{'early' if i < 80 else 'late'} {row['prompt']}"} for i, row in enumerate(ROWS)]
    made(model, rows, batch_size=1)
    given = {row["prompt"] for row in rows}
    heads = [prompt.split()[0] for prompt, _ in seen if prompt not in given]
    assert heads.count("early") > 5
    assert heads.count("late") > 5


def test_texts_without_letters_have_no_copies(model: Any) -> None:
    rng = random.Random(0)

    def digits() -> str:
        return " ".join(str(rng.randrange(1000)) for _ in range(8))

    rows = [{"prompt": f"{i} {digits()}", "chosen": digits(), "rejected": digits()} for i in range(160)]
    with pytest.raises(CalibrationError, match=r"hold no words of letters. Pass span_means='unit'"):
        made(model, rows)
    assert made(model, rows, span_means="unit").state.record["noisy_copies"] == 0
    # Windows of 32 items: the first words come in a later one, and still every text has its copy.
    later = made(model, rows + FRESH[:60], batch_size=1).state.record
    assert later["noisy_copies"] == later["fit_prompts"] > 90


def test_copies_that_become_too_long_are_left_out(model: Any, seen: Seen) -> None:
    rng = random.Random(0)
    rows = [
        {"prompt": f"{sentence(rng, 12, 12)} {i}", "chosen": "the answer", "rejected": "the river"} for i in range(200)
    ]
    tokenizer = model[1]
    longest = max(len(tokenizer(f"{row['prompt']} {row['chosen']}")["input_ids"]) for row in rows)
    guard = made(model, rows, max_length=longest, on_too_long="error", text_format="plain")
    record = guard.state.record
    assert record["dropped"] == 0
    assert 0 < record["noisy_copies"] < record["fit_prompts"]


def test_characters_are_the_words_of_chinese(model: Any, seen: Seen) -> None:
    rng = random.Random(0)
    letters = "今天天气怎么样晴很暖和我们去公园散步好吗可以的请问银行在哪里附近有一家"

    def some(n: int) -> str:
        return "".join(rng.choice(letters) for _ in range(n))

    rows = [{"prompt": some(12), "chosen": some(10), "rejected": some(9)} for _ in range(160)]
    record = made(model, rows).state.record
    assert record["noisy_copies"] == record["fit_prompts"]
    given = {text for row in rows for text in row.values()}
    given |= {text for pair in CANARIES for text in pair}
    copies = [text for pair in seen for text in pair if text not in given and text[0] in letters]
    assert len(copies) > record["noisy_copies"]
    assert all(set(text) <= set(letters) for text in copies)


WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": {}}}


def test_tools_roles_and_calls_stay_as_they_are(model: Any, seen: Seen) -> None:
    rows = []
    for row in ROWS:
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
        }
        messages = [
            {"role": "system", "content": "be brief and kind to the people who ask"},
            {"role": "user", "content": row["prompt"]},
            call,
            {"role": "tool", "content": "warm and sunny all day", "name": "weather"},
        ]
        rows.append({"prompt": messages, "chosen": row["chosen"], "rejected": row["rejected"], "tools": [TOOL]})
    decoder, tokenizer = model[0], copy.deepcopy(model[1])
    tokenizer.chat_template = WITH_TOOLS
    record = made((decoder, tokenizer), rows, max_length=512, text_format="chat").state.record
    assert record["noisy_copies"] == record["fit_prompts"] > 50
    given = [row["prompt"] for row in rows]
    copies = [prompt for prompt, _ in seen if isinstance(prompt, Dialogue) and prompt.messages not in given]
    assert len(copies) > 0.9 * record["noisy_copies"]
    for dialogue in copies:
        assert dialogue.tools == [TOOL]
        assert [message["role"] for message in dialogue.messages] == ["system", "user", "assistant", "tool"]
        assert dialogue.messages[2] == given[0][2]
        assert dialogue.messages[3]["name"] == "weather"


def test_false_alarms_are_as_promised(model: Any) -> None:
    guard = made(model, ALL[:500], calibration=0.7, alpha=0.1, confidence=None)
    fresh = ALL[500:]
    flagged = guard.check([r["prompt"] for r in fresh], [r["rejected"] for r in fresh]).is_ood
    n = int((~guard.state.table.part_a).sum())
    k = int(np.floor(0.1 * (n + 1)))
    # Exact: the rate of one calibration is Beta(k, n + 1 - k), so the count is beta-binomial.
    low, high = stats.betabinom.ppf([0.001, 0.999], len(fresh), k, n + 1 - k)
    assert low <= flagged.sum() <= high


# -- guards that were saved before there was a choice


def stripped(folder: Path, *names: str) -> Path:
    """A saved guard without some settings, with a digest that holds."""
    tensors, config = artifact.read_guard(folder)
    for name in names:
        del config["settings"][name]
    artifact.write_guard(folder, tensors, config, overwrite=True)
    return folder


def test_a_guard_from_before_takes_vectors_as_they_come(model: Any, tmp_path: Path) -> None:
    guard = made(model, span_means="raw")
    guard.save_pretrained(tmp_path / "guard")
    back = OODGuard.from_pretrained(stripped(tmp_path / "guard", "span_means", "project_out_reward"), *model)
    assert (back.config.span_means, back.config.project_out_reward) == ("raw", False)
    assert back.check("a question", "an answer") == guard.check("a question", "an answer")
    # It is fitted anew as it was, not under today's default.
    assert (
        type(back.fit(ROWS, calibration=0.5, progress=False).state.detectors["prompt/mean@0.67"]) is MahalanobisDetector
    )


def test_a_contrasted_guard_without_its_setting_is_refused(model: Any, tmp_path: Path) -> None:
    made(model).save_pretrained(tmp_path / "guard")
    with pytest.raises(FormatError, match="expected no contrast unless span_means='contrast'"):
        OODGuard.from_pretrained(stripped(tmp_path / "guard", "span_means"))
    made(model, channels="prompt/mean@0.67").save_pretrained(tmp_path / "means")
    with pytest.raises(FormatError, match=r"unknown \['noise.center'"):
        OODGuard.from_pretrained(stripped(tmp_path / "means", "span_means"))


def test_a_contrast_is_the_ratio_of_the_distances_of_its_mean(model: Any) -> None:
    state = made(model).state
    assert state.config.joined[1:] == tuple(
        f"{a}/{p}@0.67" for a in ("prompt", "response") for p in ("mean", "contrast")
    )
    assert set(state.detectors) == {"final", "prompt/mean@0.67", "response/mean@0.67"}
    vectors = {name: torch.randn(5, d.n_features_in_) for name, d in state.detectors.items()}
    scored = state.score(vectors, None)
    for axis in ("prompt", "response"):
        detector, x = state.detectors[f"{axis}/mean@0.67"], vectors[f"{axis}/mean@0.67"]
        assert isinstance(detector, ContrastedMahalanobis)
        own = detector.own_sq_distances(x).min(1).values
        column = scored.scores[:, scored.channels.index(f"{axis}/contrast@0.67")]
        np.testing.assert_allclose(column, (own / detector.noise_.score(x)).numpy(), rtol=1e-5)


def test_contrasts_are_joined_by_name_from_the_vectors_of_the_mean(model: Any, tmp_path: Path) -> None:
    guard = made(model)
    prompts, responses = [r["prompt"] for r in FRESH[:40]], [r["chosen"] for r in FRESH[:40]]
    before = guard.check(prompts, responses)
    guard.save_pretrained(tmp_path / "guard")
    back = OODGuard.from_pretrained(tmp_path / "guard", *model, channels="response/contrast@0.67")
    kept = guard.keep("response/contrast@0.67")
    assert set(kept.state.detectors) == {"final", "response/mean@0.67"}
    for few in (kept, back):
        after = few.check(prompts, responses)
        name = "response/contrast@0.67"
        np.testing.assert_array_equal(
            after.axes["response"].channels[name].ood_scores, before.axes["response"].channels[name].ood_scores
        )
        np.testing.assert_array_equal(after.p_values, before.axes["response"].channels[name].p_values)
    assert ": its ratio to the distance from" in str(kept.report())
    d = kept.state.detectors["response/mean@0.67"].n_features_in_
    by_vectors = kept.check_embeddings({"response/mean@0.67": torch.full((1, d), torch.nan)}, rewards=np.zeros(1))
    assert by_vectors.is_ood.all()


def test_contrasts_need_the_noisy_copies(model: Any) -> None:
    assert OODGuard(*model, span_means="unit").config.joined == ("final", "prompt/mean@0.67", "response/mean@0.67")
    with pytest.raises(InputError, match=r"prompt/contrast@0.5.*expected no contrast unless span_means='contrast'"):
        OODGuard(*model, span_means="unit", channels="prompt/contrast@0.5")
