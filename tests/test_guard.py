"""`OODGuard` end to end on real tokenizers: a tiny decoder for behaviour, MiniLM and SmolLM2 for the promises."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from torch import nn

from rm_ood import (
    CalibrationError,
    CalibrationWarning,
    CaptureError,
    Decision,
    Decisions,
    InputError,
    MahalanobisDetector,
    MismatchError,
    NonFiniteError,
    NotFittedError,
    OODGuard,
    TrafficMonitor,
)
from rm_ood.preferences import hash_fraction, prompt_key

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")


def make(model_and_tokenizer: tuple[Any, Any], **options: Any) -> OODGuard:
    return OODGuard(*model_and_tokenizer, **{"alpha": 0.05, "max_length": 128, **options})


@pytest.fixture(scope="module")
def fitted(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    """One guard for the tests that only read it."""
    guard = make((copy.deepcopy(shared_decoder), decoder_tokenizer))
    return guard.fit(preference_rows(400), calibration=0.5, progress=False)


@pytest.fixture
def guard(tiny_decoder: Any, fitted: OODGuard) -> OODGuard:
    """A guard of the test's own, on a model of its own, as `fitted` was fitted: states are replaced, never changed."""
    guard = make(tiny_decoder)
    guard._swap(fitted._fitted())
    return guard


@pytest.fixture(scope="module")
def short(minilm: Any, shared_decoder: Any, decoder_tokenizer: Any) -> dict[str, Any]:
    """Model fixture -> the state of a guard of it that reads 64 tokens."""
    found = {}
    for name, pair in (("minilm", minilm), ("tiny_decoder", (copy.deepcopy(shared_decoder), decoder_tokenizer))):
        with make(pair, max_length=64).fit(preference_rows(250), calibration=0.5, progress=False) as guard:
            found[name] = guard._fitted()
    return found


@pytest.fixture
def fresh() -> list[dict[str, Any]]:
    return preference_rows(60, seed=9)


def texts(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    return [r["prompt"] for r in rows], [r["chosen"] for r in rows]


# -- verdicts


def test_verdict_of_one_item_is_that_of_the_list(fitted: OODGuard, fresh: Any) -> None:
    prompts, responses = texts(fresh)
    many = fitted.check(prompts, responses)
    assert isinstance(many, Decisions)
    assert len(many) == 60
    one = fitted.check(prompts[7], responses[7])
    assert isinstance(one, Decision)
    assert one.reward == pytest.approx(many.rewards[7], abs=1e-5)
    assert one.is_ood == many.is_ood[7]
    assert one.axes["response"].channels["final"].score == pytest.approx(
        many.axis("response").channel("final").scores[7], rel=1e-4
    )


def test_is_ood_is_exactly_p_at_most_alpha(fitted: OODGuard, fresh: Any) -> None:
    prompts, responses = texts(fresh)
    decisions = fitted.check(prompts + ["\u4f60\u597d " * 40] * 5, responses + ["\u4e16\u754c " * 40] * 5)
    assert (decisions.is_ood == (decisions.p_values <= 0.05)).all()
    for axis in decisions.axes.values():
        assert (axis.is_ood == (axis.p_values <= 0.05)).all()
    assert decisions.is_ood.any()
    assert not decisions.is_ood.all()


def test_order_and_batch_size_do_not_matter(fitted: OODGuard, fresh: Any) -> None:
    prompts, responses = texts(fresh)
    reference = fitted.check(prompts, responses)
    shuffled = np.random.default_rng(0).permutation(60)
    again = fitted.check([prompts[i] for i in shuffled], [responses[i] for i in shuffled])
    np.testing.assert_allclose(again.rewards, reference.rewards[shuffled], rtol=1e-5)
    np.testing.assert_allclose(again.p_values, reference.p_values[shuffled], rtol=1e-3)
    single = [fitted.check(p, r) for p, r in zip(prompts, responses, strict=True)]
    for channel in ("final", "response/mean@0.67"):
        scores = [d.axes["response"].channels[channel].score for d in single]
        np.testing.assert_allclose(scores, reference.axis("response").channel(channel).scores, rtol=1e-4)
    assert [d.is_ood for d in single] == reference.is_ood.tolist()


def test_nested_responses_come_out_flat_with_their_prompt(fitted: OODGuard) -> None:
    decisions = fitted.check(["first question here", "second one"], [["a b c", "d e f", "g"], ["only one answer"]])
    assert decisions.prompt_index.tolist() == [0, 0, 0, 1]
    best_of = fitted.check("first question here", ["a b c", "d e f"])
    assert best_of.prompt_index.tolist() == [0, 0]
    np.testing.assert_allclose(best_of.rewards, decisions.rewards[:2], rtol=1e-5)


def test_no_items_give_no_verdicts(fitted: OODGuard) -> None:
    decisions = fitted.check([], [])
    assert len(decisions) == 0
    assert list(decisions) == []


def test_reported_channels_that_do_not_join(fitted: OODGuard, fresh: Any) -> None:
    decisions = fitted.check(*texts(fresh))
    response = decisions.axis("response")
    assert set(response.channels) == {"final", "response/mean@0.67", "response/contrast@0.67", "reward"}
    joined = [response.channel(name).ood_scores for name in fitted.config.joined if name in response.channels]
    np.testing.assert_array_equal(response.ood_scores, np.max(joined, axis=0))


def test_reward_channel_joins_only_when_asked(tiny_decoder: Any, rows: Any, fresh: Any) -> None:
    guard = make(tiny_decoder, channels=["final", "reward"]).fit(rows, calibration=0.5, progress=False)
    response = guard.check(*texts(fresh)).axis("response")
    np.testing.assert_array_equal(
        response.ood_scores, np.maximum(response.channel("final").ood_scores, response.channel("reward").ood_scores)
    )
    rewards = guard.check(*texts(fresh)).rewards
    state = guard._fitted()
    np.testing.assert_allclose(response.channel("reward").scores, abs(rewards - state.reward_mean) / state.reward_sd)


def test_one_forward_per_item_gives_both_axes(tiny_decoder: Any, rows: Any) -> None:
    guard = make(tiny_decoder, batch_size=1).fit(rows, calibration=0.5, progress=False)
    calls: list[int] = []
    handle = guard.model.register_forward_hook(lambda *_: calls.append(1))
    decision = guard.check("a question that is fine", "an answer that is fine")
    handle.remove()
    assert len(calls) == 1
    assert set(decision.axes) == {"prompt", "response"}


def test_prompt_score_does_not_depend_on_the_response(tiny_decoder: Any, rows: Any, fresh: Any) -> None:
    # Plain text may merge the prompt's last letters with the response's first ones; a chat template never does.
    guard = make(tiny_decoder, text_format="chat").fit(rows, calibration=0.5, progress=False)
    prompt = fresh[0]["prompt"]
    decisions = guard.check(prompt, [r["chosen"] for r in fresh[:20]])
    scores = decisions.axis("prompt").channel("prompt/mean@0.67").scores
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert np.ptp(decisions.axis("response").ood_scores) > 0.1


def test_prompt_pass_is_a_second_forward_and_strict_for_an_encoder(minilm: Any, rows: Any) -> None:
    options = {"channels": ["prompt/mean@0.67", "response/mean@0.67"], "max_length": 64}
    one = make(minilm, **options).fit(rows[:300], calibration=0.5, progress=False)
    two = make(minilm, prompt_pass=True, **options).fit(rows[:300], calibration=0.5, progress=False)
    spread = []
    for guard, expected in ((one, 1), (two, 2)):
        calls: list[int] = []
        handle = guard.model.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        decisions = guard.check("what is the answer", ["seven", "a long winter at the quiet river", "no idea at all"])
        handle.remove()
        assert len(calls) == expected
        spread.append(np.ptp(decisions.axis("prompt").channel("prompt/mean@0.67").scores))
    assert spread[1] < 1e-2 < spread[0]


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("which", ["minilm", "tiny_decoder"])
def test_rewards_are_bit_identical_with_and_without_the_guard(
    request: pytest.FixtureRequest, which: str, side: str, batch_size: int, rows: Any, short: dict[str, Any]
) -> None:
    model, tokenizer = request.getfixturevalue(which)
    prompts, responses = texts(rows[:batch_size])
    inputs = tokenizer(
        [p + " " + r for p, r in zip(prompts, responses, strict=True)],
        return_tensors="pt",
        padding=True,
        padding_side=side,
    )
    with torch.inference_mode():
        bare = model(**inputs).logits.clone()
    guard = make((model, tokenizer), max_length=64)
    guard._swap(short[which])
    before = {name: value.clone() for name, value in inputs.items()}
    ends = torch.tensor([int(m.nonzero()[0]) + 3 for m in inputs["attention_mask"]])
    if which == "minilm" and not inputs["attention_mask"][:, 0].all():
        with torch.inference_mode(), pytest.raises(InputError, match="left padding changes what Bert"):
            guard(**inputs, prompt_end=ends)
        return
    with torch.inference_mode():
        out = guard(**inputs, prompt_end=ends)
    assert torch.equal(out.logits, bare)
    assert len(out.ood) == batch_size
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    guard.detach()
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, bare)


def test_call_gives_the_verdicts_of_check(fitted: OODGuard, fresh: Any) -> None:
    prompts, responses = texts(fresh[:12])
    out = fitted(**fitted.encode(prompts, responses))
    checked = fitted.check(prompts, responses)
    np.testing.assert_allclose(out.ood.rewards, checked.rewards, rtol=1e-5)
    np.testing.assert_allclose(out.ood.p_values, checked.p_values, rtol=1e-3)
    assert out.ood.is_ood.tolist() == checked.is_ood.tolist()


def test_call_without_spans_says_what_to_pass(fitted: OODGuard) -> None:
    inputs = fitted.tokenizer(["a b c d"], return_tensors="pt")
    with pytest.raises(InputError, match="prompt_end"):
        fitted(**inputs)


def test_call_finds_the_response_by_segments(minilm: Any, rows: Any, short: dict[str, Any]) -> None:
    guard = make(minilm, max_length=64)
    guard._swap(short["minilm"])
    prompts, responses = texts(rows[:8])
    out = guard(**guard.tokenizer(prompts, responses, return_tensors="pt", padding=True))
    checked = guard.check(prompts, responses)
    np.testing.assert_allclose(out.ood.p_values, checked.p_values, rtol=1e-3)


def test_chat_guard_says_that_spans_are_approximate(tiny_decoder: Any) -> None:
    chat = [{**r, "prompt": [{"role": "user", "content": r["prompt"]}]} for r in preference_rows(250)]
    guard = make(tiny_decoder).fit(chat, calibration=0.5, progress=False)
    assert guard.report().to_dict()["text_format"] == "chat"
    encoded = guard.encode(["plain words"], ["an answer"])
    masks = {name: encoded.pop(name) for name in ("prompt_mask", "response_mask")}
    assert guard(**encoded).ood.reasons == (("approximate_spans",),)
    assert guard(**encoded, **masks).ood.reasons == ((),)


# -- fit and calibrate


def test_same_data_in_another_order_give_the_same_guard(
    tiny_decoder: Any, rows: Any, fresh: Any, fitted: OODGuard
) -> None:
    one = fitted
    two = make(tiny_decoder).fit(rows[::-1], calibration=0.5, progress=False)
    np.testing.assert_allclose(one.check(*texts(fresh)).p_values, two.check(*texts(fresh)).p_values, rtol=2e-2)
    assert one._fitted().table.n == two._fitted().table.n
    assert (one._fitted().fit_keys == two._fitted().fit_keys).all()


@pytest.mark.parametrize("form", ["dataset", "iterable", "generator", "jsonl", "parquet", "messages", "unpaired"])
def test_every_form_of_the_same_data_gives_the_same_fit(
    tiny_decoder: Any, rows: Any, fitted: OODGuard, tmp_path: Any, form: str
) -> None:
    import datasets

    expected = fitted
    options: dict[str, Any] = {}
    data: Any
    if form == "dataset":
        data = datasets.Dataset.from_list(rows)
    elif form == "iterable":
        data = datasets.Dataset.from_list(rows).to_iterable_dataset()
    elif form == "generator":
        data = (dict(row) for row in rows)
    elif form == "jsonl":
        data = str(tmp_path / "rows.jsonl.gz")
        datasets.Dataset.from_list(rows).to_json(data, compression="gzip")
    elif form == "parquet":
        data = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(data)
    elif form == "messages":
        data = [
            {k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in r.items()} for r in rows
        ]
        options = {"text_format": "chat"}
        expected = make(tiny_decoder, **options).fit(rows, calibration=0.5, progress=False)
    else:
        data = [
            {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
            for r in rows
            for side in ("chosen", "rejected")
        ]
    guard = make(tiny_decoder, **options).fit(data, calibration=0.5, progress=False)
    for name, detector in guard._fitted().detectors.items():
        reference = expected._fitted().detectors[name]
        assert detector.n_samples_ == reference.n_samples_
        torch.testing.assert_close(detector.means_, reference.means_, rtol=1e-5, atol=1e-5)
    assert (guard._fitted().fit_keys == expected._fitted().fit_keys).all()


def test_calibration_prompts_are_never_fit_prompts(guard: OODGuard, rows: Any) -> None:
    record = guard._fitted().record
    assert record["fit_prompts"] + record["calibration_prompts"] == 400
    with pytest.raises(CalibrationError, match="were fitted on"):
        guard.calibrate(rows, progress=False)


def test_calibrate_takes_unlabelled_rows_and_replaces(guard: OODGuard) -> None:
    plain = [{"prompt": r["prompt"], "response": r["chosen"]} for r in preference_rows(200, seed=3)]
    before = guard._fitted()
    guard.calibrate(plain, progress=False)
    assert guard._fitted().table.n == 200
    assert guard._fitted().heldout is before.heldout
    assert guard._fitted().detectors is before.detectors


def test_calibrating_on_other_traffic_warns(guard: OODGuard) -> None:
    odd = [
        {"prompt": f"{i} \u0434\u0430 \u043d\u0435\u0442 " * 9, "response": "\u3042\u308a\u304c\u3068\u3046 " * 9}
        for i in range(200)
    ]
    with pytest.warns(CalibrationWarning, match="do not look like the held-out share"):
        guard.calibrate(odd, progress=False)


@pytest.mark.filterwarnings("error::rm_ood.CalibrationWarning")
def test_calibrating_on_like_traffic_does_not_warn(guard: OODGuard) -> None:
    guard.calibrate(preference_rows(200, seed=5), progress=False)


def test_traffic_unlike_the_calibration_warns_once(guard: OODGuard) -> None:
    prompts = [f"{i} \u0434\u0430 \u043d\u0435\u0442" for i in range(500)]
    guard.check(prompts, ["\u3042\u308a"] * 500)
    with pytest.warns(CalibrationWarning, match="calibration does not match traffic"):
        guard.check(prompts, ["\u3042\u308a"] * 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.check(prompts, ["\u3042\u308a"] * 500)


def test_row15_too_few_calibration_prompts_names_the_number(tiny_decoder: Any, rows: Any) -> None:
    guard = make(tiny_decoder, alpha=0.01)
    with pytest.raises(CalibrationError, match=r"needs 374 calibration prompts.*have \d+, need \d+ more"):
        guard.fit(rows, progress=False)
    with pytest.raises(NotFittedError, match="call fit"):
        guard.check("a question", "an answer")


def test_a_guard_without_calibration_refuses_to_judge(tiny_decoder: Any, rows: Any) -> None:
    guard = make(tiny_decoder).fit(rows, calibration=0, progress=False)
    with pytest.raises(NotFittedError, match="not calibrated"):
        guard.check("a question", "an answer")
    guard.calibrate(preference_rows(150, seed=4), progress=False)
    assert guard.check("a question", "an answer").p_value > 0


@pytest.mark.parametrize("calibration", [-0.1, 1.0, 1.5])
def test_calibration_share_out_of_range(tiny_decoder: Any, rows: Any, calibration: float) -> None:
    with pytest.raises(InputError, match="share of the prompts"):
        make(tiny_decoder).fit(rows, calibration=calibration, progress=False)


def test_row10_no_rows(tiny_decoder: Any) -> None:
    with pytest.raises(CalibrationError, match="no usable rows"):
        make(tiny_decoder).fit([], progress=False)


def test_row12_a_missing_class_needs_the_explicit_option(tiny_decoder: Any, rows: Any) -> None:
    chosen = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in rows]
    with pytest.raises(CalibrationError, match="no rejected responses"):
        make(tiny_decoder).fit(chosen, calibration=0.5, progress=False)
    guard = make(tiny_decoder, one_class=True).fit(chosen, calibration=0.5, progress=False)
    decision = guard.check("a question", "an answer")
    assert decision.nearest_class is None
    assert decision.class_log_odds is None


def test_row14_repeated_rows_warn_with_the_share(tiny_decoder: Any, rows: Any) -> None:
    with pytest.warns(CalibrationWarning, match="50% of the items are repeats"):
        make(tiny_decoder).fit([*rows, *rows], calibration=0.5, progress=False)


def test_row4_infinite_vectors_stop_the_fit_or_are_dropped(tiny_decoder: Any, rows: Any) -> None:
    model, tokenizer = tiny_decoder
    at = next(i for i, r in enumerate(rows) if hash_fraction(prompt_key(r["prompt"]), 0) >= 0.5)
    marked = [{**r, "chosen": r["chosen"] + " zebra"} if i == at else r for i, r in enumerate(rows)]
    zebra = tokenizer(" zebra", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight[zebra] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"rows\[{at}\].chosen"):
        make(tiny_decoder).fit(marked, calibration=0.5, progress=False)
    guard = make(tiny_decoder, on_bad="drop").fit(marked, calibration=0.5, progress=False)
    assert guard.report().to_dict()["fit"]["dropped_rows"] == 1
    decisions = guard.check(["fine question", "other question"], ["an answer", "an answer zebra"])
    assert decisions.reasons[1] == ("non_finite",)
    assert decisions.is_ood[1]
    assert decisions.p_values[1] == decisions.p_values.min()
    assert decisions[1].nearest_class is None
    assert np.isfinite(decisions.p_values[0])
    assert decisions.reasons[0] == ()
    clean = guard.check("fine question", "an answer")
    assert clean.p_value == pytest.approx(decisions.p_values[0])


def test_row58_bad_rows_are_errors_or_counted(tiny_decoder: Any, rows: Any) -> None:
    bad = [
        *rows,
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": None, "rejected": "x"},
    ]
    with pytest.raises(InputError, match=r"rows\[400\]: chosen and rejected are the same"):
        make(tiny_decoder).fit(bad, calibration=0.5, progress=False)
    guard = make(tiny_decoder, on_bad="drop").fit(bad, calibration=0.5, progress=False)
    assert guard.report().to_dict()["fit"]["dropped_rows"] == 2


def test_constant_rewards_are_refused(tiny_decoder: Any, rows: Any) -> None:
    nn.init.zeros_(tiny_decoder[0].score.weight)
    with pytest.raises(CalibrationError, match=r"all .* fit rewards are equal"):
        make(tiny_decoder).fit(rows, calibration=0.5, progress=False)


def test_row61_an_interrupted_fit_leaves_guard_and_model_as_they_were(
    tiny_decoder: Any, rows: Any, guard: OODGuard
) -> None:
    before = guard.check("a question", "an answer")

    def interrupted() -> Any:
        yield from preference_rows(600, seed=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.fit(interrupted(), calibration=0.5, progress=False)
    assert guard.check("a question", "an answer") == before
    guard.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in guard.model.modules())


def test_row64_a_check_during_a_fit_uses_the_old_state(guard: OODGuard, fresh: Any) -> None:
    prompts, responses = texts(fresh[:8])
    before = guard.check(prompts, responses)
    seen: list[Any] = []

    def rows_with_a_check() -> Any:
        for i, row in enumerate(preference_rows(400, seed=2)):
            if i == 200:
                seen.append(guard.check(prompts, responses))
            yield row

    guard.fit(rows_with_a_check(), calibration=0.5, progress=False)
    np.testing.assert_array_equal(seen[0].p_values, before.p_values)
    assert guard.check(prompts, responses).p_values.tolist() != before.p_values.tolist()


def test_row65_eight_threads_get_their_own_verdicts(fitted: OODGuard, fresh: Any) -> None:
    prompts, responses = texts(fresh)
    expected = fitted.check(prompts, responses)
    wrong: list[int] = []

    def work(start: int) -> None:
        for i in range(start, 60, 8):
            one = fitted.check(prompts[i], responses[i])
            if abs(one.reward - expected.rewards[i]) > 1e-4 or one.is_ood != expected.is_ood[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- self-check


def test_a_wrong_read_out_position_stops_the_fit(tiny_decoder: Any, rows: Any) -> None:
    with pytest.raises(CaptureError, match="read-out self-check failed"):
        make(tiny_decoder, read_out="first").fit(rows, calibration=0.5, progress=False)


def test_a_wrong_read_out_position_flags_at_serve_time(guard: OODGuard) -> None:
    # The model's rule moves (its pad id is patched, as trainers do) under a guard whose rule was right at fit.
    guard._embedder.capture._rule = "first"
    decision = guard.check("a question", "an answer")
    assert decision.reasons == ("read_out_mismatch",)
    assert decision.is_ood


@pytest.mark.filterwarnings("ignore::rm_ood.TokenisationWarning")
def test_row54_pad_equal_to_eos_follows_the_model(tiny_decoder: Any, rows: Any) -> None:
    _, tokenizer = tiny_decoder
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    guard = make(tiny_decoder, append_eos=True).fit(rows, calibration=0.5, progress=False)
    assert guard.check("a question", "an answer").reasons == ()
    # A rule that takes the final eos itself is another token, and the self-check sees it.
    with pytest.raises(CaptureError, match="self-check"):
        make(tiny_decoder, append_eos=True, read_out="last_token").fit(rows, calibration=0.5, progress=False)


# -- vectors


def test_vectors_alone_give_the_verdicts_of_the_final_profile(
    tiny_decoder: Any, rows: Any, fresh: Any, tmp_path: Any
) -> None:
    guard = make(tiny_decoder, channels="final").fit(rows, calibration=0.5, progress=False)
    guard.save_pretrained(tmp_path / "guard")
    prompts, responses = texts(fresh)
    encoded = guard.encode(prompts, responses)
    spans = {name: encoded.pop(name) for name in ("prompt_end", "prompt_mask", "response_mask")}
    with torch.inference_mode():
        out = guard.model(**encoded, output_hidden_states=True)
    ids = encoded["input_ids"]
    at = (torch.arange(ids.shape[1]) * (ids != guard.tokenizer.pad_token_id)).argmax(1)
    vectors = out.hidden_states[-1][torch.arange(len(ids)), at]
    lengths = np.stack([spans["prompt_mask"].sum(1), spans["response_mask"].sum(1)], 1)
    alone = OODGuard.from_pretrained(tmp_path / "guard")
    from_vectors = alone.check_embeddings(vectors, out.logits[:, 0], lengths=lengths)
    checked = guard.check(prompts, responses)
    np.testing.assert_allclose(from_vectors.p_values, checked.p_values, rtol=1e-2)
    assert from_vectors.is_ood.tolist() == checked.is_ood.tolist()
    without = alone.check_embeddings(vectors.numpy())
    assert np.isnan(without.rewards).all()
    assert set(without.axes) == {"response"}
    with pytest.raises(MismatchError, match="no reward model"):
        alone.check("a", "b")


def test_vectors_and_tensors_may_tell_their_prompts(fitted: OODGuard) -> None:
    inputs = fitted.encode(["a question"] * 3 + ["another"], ["one", "two", "three", "four"])
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with fitted.observe(prompts=[5, 5, 5, 9], **inputs) as seen:
        rewards = fitted.model(**{k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}).logits[:, 0]
    for decisions, alone in (
        (fitted(prompts=["q", "q", "q", "r"], **inputs).ood, fitted(**inputs).ood),
        (seen.decide(rewards), fitted(**inputs).ood),
        (fitted.check_embeddings(vectors, prompts=[5, 5, 5, 9]), fitted.check_embeddings(vectors)),
    ):
        assert decisions.prompt_index.tolist() == [0, 0, 0, 1]
        assert alone.prompt_index.tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(decisions.p_values, alone.p_values)
        # What a monitor takes for independent.
        scores = {"response": np.arange(50.0)}
        assert [TrafficMonitor(scores).watch(one).counted for one in (decisions, alone)] == [2, 4]
    with pytest.raises(InputError, match="prompts: expected one key per item, 4 of them, got 3 of them"):
        fitted(prompts=[1, 2, 3], **inputs)


def test_row17_vectors_of_another_width(fitted: OODGuard) -> None:
    with pytest.raises(MismatchError, match="expected 32 features, got 33"):
        fitted.check_embeddings(np.zeros((2, 33)))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ({"embeddings": np.zeros(32)}, {}, InputError, r"expected shape \(n, d\)"),
        ({"embeddings": {"final": np.zeros((2, 32)), "prompt/mean@0.67": np.zeros((3, 32))}}, {}, InputError, "one n"),
        ({"embeddings": {"response/mean@0.5": np.zeros((2, 32))}}, {}, MismatchError, "are not in this guard"),
        ({"embeddings": np.zeros((2, 32))}, {"rewards": [1.0]}, InputError, "expected 2 values"),
        ({"embeddings": np.zeros((2, 32))}, {"lengths": [[1, 2]]}, InputError, r"shape \(2, 2\)"),
    ],
)  # fmt: skip
def test_row20_malformed_vectors(fitted: OODGuard, arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fitted.check_embeddings(**arguments, **options)


def test_rows1_2_non_finite_vectors_are_flagged(fitted: OODGuard) -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    vectors[0, 0], vectors[1, 5] = np.nan, np.inf
    decisions = fitted.check_embeddings(vectors, rewards=[0.0, 0.0, np.nan])
    assert decisions.reasons == (("non_finite",),) * 3
    assert decisions.is_ood.all()


# -- groups


def test_groups_are_calibrated_by_themselves(tiny_decoder: Any) -> None:
    grouped = [{**r, "team": "ab"[i % 2]} for i, r in enumerate(preference_rows(700))]
    guard = make(tiny_decoder, groups="team").fit(grouped, calibration=0.5, progress=False)
    decisions = guard.check(["one question", "two questions"], ["an answer", "an answer"], groups=["a", "b"])
    assert len(decisions) == 2
    assert {b["group"] for b in guard.report().to_dict()["calibration"]["by_group"]} == {"a", "b"}
    with pytest.raises(InputError, match=r"a.*b"):
        guard.check(["one question"], ["an answer"], groups=["c"])
    with pytest.raises(InputError, match="grouping column"):
        make(tiny_decoder, groups="team").fit(preference_rows(9), progress=False)


# -- life


def test_detached_guard_refuses_and_attaches_again(guard: OODGuard) -> None:
    with guard:
        assert guard.check("a question", "an answer").p_value > 0
    with pytest.raises(CaptureError, match="attach"):
        guard.check("a question", "an answer")
    guard.detach()
    assert guard.attach().check("a question", "an answer").p_value > 0


def test_training_mode_is_refused_or_switched(tiny_decoder: Any, rows: Any) -> None:
    tiny_decoder[0].train()
    with pytest.raises(MismatchError, match="training mode"):
        make(tiny_decoder).fit(rows, calibration=0.5, progress=False)
    make(tiny_decoder, eval_mode="switch").fit(rows, calibration=0.5, progress=False)
    assert tiny_decoder[0].training


def test_detector_instance_sets_the_covariance(tiny_decoder: Any, rows: Any) -> None:
    guard = make(tiny_decoder, detector=MahalanobisDetector(shrinkage=0.25, floor=1e-3))
    guard.fit(rows, calibration=0.5, progress=False)
    assert {d.shrinkage_ for d in guard._fitted().detectors.values()} == {0.25}


def test_repr_tells_where_the_guard_stands(tiny_decoder: Any, guard: OODGuard) -> None:
    assert "not fitted" in repr(make(tiny_decoder))
    assert "calibrated" in repr(guard)


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        (["a", "b"], ["c"], "2 prompts and 1 responses"),
        (["a"], 3, "response: expected str or a list, got int"),
        (7, ["a"], "prompt: expected str, messages or a list"),
        (["a", "b"], ["c", 5], r"items\[1\].response: expected str, got int"),
        (["a", None], ["c", "d"], r"items\[1\].prompt: expected str or a list of messages, got None"),
        (["a"], [["b", b"c"]], r"items\[0\].response\[1\]: expected str, got bytes"),
        (" ", "x", "prompt: empty"),
    ],
)
def test_row48_malformed_calls_name_the_field(fitted: OODGuard, prompt: Any, response: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted.check(prompt, response)


# -- saved


def test_saved_guard_gives_bit_identical_verdicts_in_another_process(
    tiny_decoder: Any, guard: OODGuard, fresh: Any, tmp_path: Any
) -> None:
    model, tokenizer = tiny_decoder
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    guard.save_pretrained(tmp_path / "guard")
    prompts, responses = texts(fresh[:10])
    script = f"""
import json, torch
torch.set_num_threads(1)
from rm_ood import OODGuard
from rm_ood.reward_model import load_reward_model
guard = OODGuard.from_pretrained({str(tmp_path / "guard")!r}, *load_reward_model({str(tmp_path / "model")!r}))
d = guard.check({prompts!r}, {responses!r})
print("RESULT" + json.dumps([d.p_values.tolist(), d.rewards.tolist(), d.axis("response").ood_scores.tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    p, rewards, scores = json.loads(done.stdout.partition("RESULT")[2])
    here = guard.check(prompts, responses)
    assert here.p_values.tolist() == p
    assert here.rewards.tolist() == rewards
    assert here.axis("response").ood_scores.tolist() == scores


def test_row37_another_model_is_refused_by_field(guard: OODGuard, tiny_decoder: Any, tmp_path: Any) -> None:
    guard.save_pretrained(tmp_path / "guard")
    other, tokenizer = tiny_decoder
    guard.detach()
    with torch.no_grad():
        other.score.weight.add_(1e-3)
    with pytest.raises(MismatchError, match=r"fingerprint tier 0.*head_weights"):
        OODGuard.from_pretrained(tmp_path / "guard", other, tokenizer)


def test_row38_another_dtype_is_refused_or_allowed(guard: OODGuard, tiny_decoder: Any, tmp_path: Any) -> None:
    guard.save_pretrained(tmp_path / "guard")
    guard.detach()
    model, tokenizer = tiny_decoder
    model.to(torch.bfloat16)
    with pytest.raises(MismatchError, match="allow_dtype_change=True"):
        OODGuard.from_pretrained(tmp_path / "guard", model, tokenizer)
    with pytest.warns(CalibrationWarning, match=r"differs from the fitted one in .*dtype"):
        loaded = OODGuard.from_pretrained(tmp_path / "guard", model, tokenizer, allow_dtype_change=True)
    assert loaded.check("a question", "an answer").reasons == ("model_mismatch:dtype", "model_mismatch:head_weights")


def test_saved_guard_takes_fewer_channels_and_another_promise(fitted: OODGuard, fresh: Any, tmp_path: Any) -> None:
    fitted.save_pretrained(tmp_path / "guard")
    final = OODGuard.from_pretrained(
        tmp_path / "guard", fitted.model, fitted.tokenizer, channels="final", alpha=0.1, confidence=None
    )
    assert final.config.joined == ("final",)
    decisions, reference = final.check(*texts(fresh)), fitted.check(*texts(fresh))
    assert set(decisions.axes) == {"response"}
    np.testing.assert_array_equal(
        decisions.axis("response").ood_scores, reference.axis("response").channel("final").ood_scores
    )
    assert decisions.alpha == 0.1
    with pytest.raises(InputError, match="were not fitted"):
        OODGuard.from_pretrained(tmp_path / "guard", channels="response/mean@0.1")
    with pytest.raises(InputError, match="unknown options"):
        OODGuard.from_pretrained(tmp_path / "guard", channel="final")


def test_a_refused_load_leaves_no_hooks(fitted: OODGuard, tiny_decoder: Any, tmp_path: Any) -> None:
    fitted.save_pretrained(tmp_path / "guard")
    other, tokenizer = tiny_decoder
    with torch.no_grad():
        other.score.weight.mul_(3)
    with pytest.raises(MismatchError):
        OODGuard.from_pretrained(tmp_path / "guard", other, tokenizer)
    assert not any(module._forward_hooks for module in other.modules())


def test_a_guard_that_is_gone_leaves_no_hooks(tiny_decoder: Any) -> None:
    guard = make(tiny_decoder)
    assert any(module._forward_hooks for module in tiny_decoder[0].modules())
    del guard
    gc.collect()
    assert not any(module._forward_hooks for module in tiny_decoder[0].modules())


def test_a_prompt_pass_guard_refuses_ready_made_inputs(minilm: Any, rows: Any) -> None:
    guard = make(minilm, prompt_pass=True, max_length=64).fit(rows[:250], calibration=0.5, progress=False)
    with pytest.raises(InputError, match="use check"):
        guard(**guard.encode(["a question"], ["an answer"]))


def test_response_channels_alone_need_no_prompt_end(tiny_decoder: Any, rows: Any) -> None:
    guard = make(tiny_decoder, channels="final").fit(rows, calibration=0.5, progress=False)
    out = guard(**guard.tokenizer(["some words"], return_tensors="pt"))
    assert set(out.ood.axes) == {"response"}


def test_a_guard_by_length_needs_lengths(tiny_decoder: Any) -> None:
    guard = make(tiny_decoder, groups="length", channels="final").fit(
        preference_rows(700), calibration=0.5, progress=False
    )
    assert len(guard.report().to_dict()["calibration"]["by_group"]) > 1
    with pytest.raises(InputError, match="pass lengths"):
        guard.check_embeddings(np.zeros((1, 32)))


def test_several_answers_to_one_prompt_count_once_as_traffic(fitted: OODGuard) -> None:
    fitted._swap(fitted._state)
    fitted.check(["a question", "another one"], [["an answer"] * 30, ["no"] * 30])
    assert len(fitted._traffic._scores) == 2


def test_columns_of_a_data_set_are_lists(fitted: OODGuard, fresh: Any) -> None:
    import datasets

    columns = datasets.Dataset.from_list(fresh[:4])
    assert len(fitted.check(columns["prompt"], columns["chosen"])) == 4


def test_one_class_needs_no_labels(tiny_decoder: Any) -> None:
    plain = [{"prompt": r["prompt"], "response": r["chosen"]} for r in preference_rows(300)]
    guard = make(tiny_decoder, one_class=True).fit(plain, calibration=0.5, progress=False)
    assert guard.check("a question", "an answer").nearest_class is None


@pytest.mark.parametrize("calibration", [True, None])
def test_calibration_that_is_no_share_and_no_data(tiny_decoder: Any, rows: Any, calibration: Any) -> None:
    with pytest.raises(InputError, match="share of the prompts"):
        make(tiny_decoder).fit(rows, calibration=calibration, progress=False)


def test_a_detector_of_another_dtype_is_refused(tiny_decoder: Any) -> None:
    with pytest.raises(InputError, match="float32"):
        make(tiny_decoder, detector=MahalanobisDetector(dtype=torch.float64))


def test_drop_covers_items_that_are_too_long(tiny_decoder: Any, rows: Any) -> None:
    long = [*rows, {"prompt": "a " * 300, "chosen": "b", "rejected": "c"}]
    guard = make(tiny_decoder, on_too_long="error", on_bad="drop").fit(long, calibration=0.5, progress=False)
    assert guard.report().to_dict()["fit"]["dropped_rows"] == 2


def test_vectors_only_guard_in_a_with_block(fitted: OODGuard, tmp_path: Any) -> None:
    fitted.save_pretrained(tmp_path / "guard")
    with OODGuard.from_pretrained(tmp_path / "guard") as guard:
        assert len(guard.check_embeddings({"final": np.zeros((2, 32)), "prompt/mean@0.67": np.zeros((2, 32)),
                                           "response/mean@0.67": np.zeros((2, 32))})) == 2  # fmt: skip


@pytest.mark.slow
def test_smollm2_gives_both_verdicts_and_bit_identical_rewards(smollm2: Any) -> None:
    """A real 30-layer decoder with its chat template: one forward, untouched rewards, a prompt score of the prompt alone."""
    model, tokenizer = smollm2
    chat = [
        {"prompt": [{"role": "user", "content": f"say {word}"}], "chosen": f"{word} it is", "rejected": f"not {i}"}
        for i, word in enumerate(r["prompt"].split()[3] + str(i) for i, r in enumerate(preference_rows(110)))
    ]
    texts_of = [tokenizer.apply_chat_template([*r["prompt"], {"role": "assistant", "content": r["chosen"]}], tokenize=False)
                for r in chat[:16]]  # fmt: skip
    batches = [
        tokenizer(texts_of[:n], return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
        for n in (1, 16)
        for side in ("right", "left")
    ]
    with torch.inference_mode():
        bare = [model(**batch).logits.clone() for batch in batches]
    # At alpha .2 a few prompts are enough; what is tested here is not the threshold.
    guard = OODGuard(model, tokenizer, alpha=0.2).fit(chat, calibration=0.7, progress=False)
    with torch.inference_mode():
        for batch, expected in zip(batches, bare, strict=True):
            ends = batch["attention_mask"].int().argmax(1) + 3
            out = guard(**batch, prompt_end=ends)
            assert torch.equal(out.logits, expected)
            assert len(out.ood) == len(expected)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    decisions = guard.check(chat[0]["prompt"], ["yes", "a much longer answer that says something else"])
    handle.remove()
    assert len(calls) == 1
    scores = decisions.axis("prompt").channel("prompt/mean@0.67").scores
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    guard.detach()


def test_a_guard_loaded_with_fewer_channels_is_calibrated_and_saved_with_those(
    guard: OODGuard, tiny_decoder: Any, tmp_path: Any
) -> None:
    guard.save_pretrained(tmp_path / "guard")
    guard.detach()
    final = OODGuard.from_pretrained(tmp_path / "guard", *tiny_decoder, channels="final")
    final.calibrate(preference_rows(200, seed=4), progress=False)
    assert final.state.channel_names == ("final", "reward")
    assert final.recalibrate(preference_rows(200, seed=4), progress=False).status == "pass"
    final.save_pretrained(tmp_path / "final")
    again = OODGuard.from_pretrained(tmp_path / "final", *tiny_decoder)
    assert again.config.joined == ("final",)
    assert again.check("a question", "an answer").p_value == final.check("a question", "an answer").p_value
