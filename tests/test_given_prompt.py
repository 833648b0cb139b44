"""The axis `response_given_prompt`: is the response strange for this prompt, through everything that meets an axis."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows, sentence

from rm_ood import InputError, MahalanobisDetector, OODGuard, doctor
from rm_ood.calibration import MINIMUM_A
from rm_ood.channels import AXES
from rm_ood.cli import main
from rm_ood.detectors import ConditionalMahalanobis
from rm_ood.length import LengthStandardiser
from rm_ood.study import conditions, findings, read_pairs, run_study
from rm_ood.study.detection import auroc
from rm_ood.study.report import html_page, markdown
from rm_ood.study.vector_baselines import fit_baselines

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
GIVEN = "response_given_prompt"
PAIR = f"{GIVEN}/mean@0.67"
HALVES = ("prompt/mean@0.67", "response/mean@0.67")


def answering(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose answers take up the prompt's own words, in another order: each side is random, both together are not."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        words = sentence(rng, 6, 10).split()
        first, second = (" ".join(rng.sample(words, len(words))) for _ in range(2))
        rows.append({"prompt": f"{' '.join(words)} {seed} {i}", "chosen": first, "rejected": f"{second} no"})
    return rows


def texts(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    return [row["prompt"] for row in rows], [row["chosen"] for row in rows]


def vectors(guard: OODGuard, prompts: list[str], responses: list[str]) -> tuple[dict[str, torch.Tensor], Any]:
    """Channel vectors of the items in their order, and their span lengths."""
    scoring = guard.scoring()
    batches = list(scoring.column.batches(scoring.encode(list(zip(prompts, responses, strict=True))), scoring.text))
    back = torch.cat([torch.from_numpy(index) for index, _ in batches]).argsort()
    names = batches[0][1].vectors
    found = {name: torch.cat([part.vectors[name] for _, part in batches])[back] for name in names}
    return found, np.concatenate([part.lengths for _, part in batches])[back]


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    model = copy.deepcopy(shared_decoder)
    made = OODGuard(model, decoder_tokenizer, axes=AXES, alpha=0.05, max_length=128)
    return made.fit(answering(400), calibration=0.5, progress=False)


def test_it_joins_the_verdict_only_when_asked_for(guard: OODGuard, tiny_decoder: Any) -> None:
    assert OODGuard(*tiny_decoder).config.axes == ("prompt", "response")
    assert PAIR not in OODGuard(*tiny_decoder).config.joined
    contrasts = [half.replace("mean", "contrast") for half in HALVES]
    assert guard.config.joined == ("final", HALVES[0], contrasts[0], HALVES[1], contrasts[1], PAIR)
    decision = guard.check(*(column[0] for column in texts(answering(1, seed=5))))
    assert list(decision.axes) == list(decision.to_dict()["axes"]) == list(AXES)
    assert list(decision.axes[GIVEN].channels) == [PAIR]
    assert decision.axes[GIVEN].channels[PAIR].class_scores is None
    many = guard.check(*texts(answering(30, seed=5)))
    joined = np.max([many.axis(axis).ood_scores for axis in AXES], axis=0)
    assert (many.p_values.argsort(kind="stable")[0]) in np.flatnonzero(joined == joined.max())
    assert {f"{GIVEN}.p_value", f"{GIVEN}.{PAIR}.score"} <= many._flat().keys()


def test_its_vector_is_the_prompts_and_the_responses_and_the_chain_rule_holds_on_it(guard: OODGuard) -> None:
    items = texts(answering(40, seed=6))
    found, _ = vectors(guard, *items)
    assert torch.equal(found[PAIR], torch.cat([found[name] for name in HALVES], 1))
    detector = guard.state.detectors[PAIR]
    assert isinstance(detector, ConditionalMahalanobis)
    assert (detector.n_given_, detector.n_features_in_, len(detector.classes_)) == (32, 64, 1)
    given, rest = (part.double().numpy()[:, 0] for part in detector.part_sq_distances(found[PAIR]))
    joint = MahalanobisDetector.from_state(detector.state_tensors()).sq_distances(found[PAIR]).double().numpy()[:, 0]
    np.testing.assert_allclose(given + rest, joint, rtol=1e-4)
    np.testing.assert_allclose(guard.check(*items).axis(GIVEN).channel(PAIR).scores, rest, rtol=1e-4)


def test_the_read_out_stands_beside_the_prompts_end(tiny_decoder: Any) -> None:
    channels = [f"{GIVEN}/readout", f"{GIVEN}/readout@0.67", "prompt/prompt_end@0.67", "response/readout@0.67"]
    channels += ["prompt/prompt_end"]
    made = OODGuard(*tiny_decoder, axes=AXES, channels=channels, alpha=0.05, max_length=128)
    found, _ = vectors(made.fit(answering(300), calibration=0.5, progress=False), *texts(answering(20, seed=6)))
    assert torch.equal(found[channels[1]], torch.cat([found[channels[2]], found[channels[3]]], 1))
    assert torch.equal(found[channels[0]], torch.cat([found["prompt/prompt_end"], found["final"]], 1))


def test_its_score_is_standardised_by_the_responses_length_and_ranked_in_b(guard: OODGuard) -> None:
    table = guard.state.table
    column = table.channels.index(PAIR)
    items = texts([*answering(20, seed=6), *answering(20, seed=7)])
    axis = guard.check(*items).axis(GIVEN)
    assert table.part_a.sum() >= MINIMUM_A
    raw, spans = table.scores[:, column], table.lengths[:, 1]
    curve = LengthStandardiser.fit(raw[table.part_a], spans[table.part_a], logarithmic=True)
    z = curve(axis.channel(PAIR).scores, vectors(guard, *items)[1][:, 1])
    np.testing.assert_allclose(axis.ood_scores, z, rtol=1e-9)
    calibration = curve(raw[~table.part_a], spans[~table.part_a])
    order = [(calibration >= value).sum() for value in z]
    assert (np.argsort(axis.p_values, kind="stable") == np.argsort(order, kind="stable")).all()
    assert axis.is_ood.tolist() == (axis.p_values <= 0.05).tolist()


def test_an_answer_to_another_prompt_is_seen_best_by_this_axis(minilm: Any) -> None:
    # An encoder's response span sees the prompt as well, so the other axes are not blind; weighed, they see it all.
    made = OODGuard(*minilm, axes=AXES, channels=[*HALVES, PAIR], span_means="raw", alpha=0.05, max_length=64)
    made.fit(answering(700), calibration=0.35, progress=False)
    prompts, responses = texts(answering(100, seed=3))
    own, other = made.check(prompts, responses), made.check(prompts, responses[1:] + responses[:1])
    seen = {axis: auroc(own.axis(axis).ood_scores, other.axis(axis).ood_scores) for axis in AXES}
    assert seen[GIVEN] > 0.99 > max(seen["prompt"], seen["response"])
    assert own.axis(GIVEN).is_ood.mean() < 0.15
    assert other.axis(GIVEN).is_ood.mean() > 0.9


def test_a_saved_guard_gives_the_same_bits(guard: OODGuard, tmp_path: Any) -> None:
    guard.save_pretrained(tmp_path / "guard")
    items = texts(answering(30, seed=8))
    found, lengths = vectors(guard, *items)
    bare = OODGuard.from_pretrained(tmp_path / "guard")
    with_model = OODGuard.from_pretrained(tmp_path / "guard", guard.model, guard.tokenizer)
    assert isinstance(bare.state.detectors[PAIR], ConditionalMahalanobis)
    one, two = guard.check(*items), with_model.check(*items)
    assert one.to_dict() == two.to_dict()
    from_vectors = [g.check_embeddings(found, one.rewards, lengths=lengths) for g in (guard, bare)]
    assert from_vectors[0].to_dict() == from_vectors[1].to_dict()
    np.testing.assert_allclose(from_vectors[1].p_values, one.p_values, rtol=1e-3)
    alone = bare.check_embeddings({PAIR: found[PAIR]}, lengths=lengths)
    assert list(alone.axes) == [GIVEN]
    np.testing.assert_array_equal(alone.axis(GIVEN).p_values, from_vectors[1].axis(GIVEN).p_values)
    fewer = OODGuard.from_pretrained(tmp_path / "guard", guard.model, guard.tokenizer, channels=PAIR)
    np.testing.assert_allclose(fewer.check(*items).p_values, one.axis(GIVEN).p_values)
    with_model.detach()
    fewer.detach()


def test_the_prompts_part_comes_from_the_prompt_only_pass(minilm: Any) -> None:
    options = {"axes": AXES, "channels": [PAIR, *HALVES], "alpha": 0.1, "max_length": 64}
    rows, answers = answering(200), ["seven", "a long winter at the quiet river", "no idea at all"]
    one = OODGuard(*minilm, **options).fit(rows, calibration=0.5, progress=False)
    two = OODGuard(*minilm, prompt_pass=True, **options).fit(rows, calibration=0.5, progress=False)
    seen, strict = (vectors(g, ["what is the answer"] * 3, answers)[0][PAIR] for g in (one, two))
    torch.testing.assert_close(strict[:, 384:], seen[:, 384:])
    torch.testing.assert_close(strict[1:, :384], strict[:1, :384].expand(2, -1), rtol=1e-4, atol=1e-5)
    assert (seen[1:, :384] - seen[:1, :384]).norm(dim=1).min() > 0.1
    with pytest.raises(InputError, match="in a forward of their own"):
        two(**two.encode(["what is the answer"], ["seven"]))


def test_ready_made_inputs_give_the_verdicts_of_check_and_need_the_prompt(guard: OODGuard, tmp_path: Any) -> None:
    prompts, responses = texts(answering(8, seed=9))
    inputs = guard.encode(prompts, responses)
    with torch.inference_mode():
        got = guard(**inputs).ood
        np.testing.assert_allclose(
            got.axis(GIVEN).ood_scores, guard.check(prompts, responses).axis(GIVEN).ood_scores, atol=1e-3
        )
        guard.save_pretrained(tmp_path / "guard")
        alone = OODGuard.from_pretrained(tmp_path / "guard", guard.model, guard.tokenizer, channels=PAIR)
        with alone, pytest.raises(InputError, match="this guard judges prompts: pass prompt_end"):
            alone(**{name: inputs[name] for name in ("input_ids", "attention_mask")})


def test_reasons_stay(guard: OODGuard) -> None:
    decisions = guard.check(["river " * 200, "a question"], ["an answer", ""])
    assert decisions.reasons == (("truncated",), ("empty_response",))
    assert np.isfinite(decisions.axis(GIVEN).ood_scores).all()


def test_recalibration_knows_its_geometry(tiny_decoder: Any) -> None:
    made = OODGuard(*tiny_decoder, axes=(GIVEN,), alpha=0.05, max_length=128)
    made.fit(answering(400), calibration=0.5, progress=False)
    report = made.recalibrate(answering(200, seed=4), progress=False)
    assert report.status == "pass"
    assert report.drift[PAIR] == pytest.approx(1, abs=1e-3)
    made.calibrate(answering(200, seed=4), progress=False)
    assert list(made.check("a question", "an answer").axes) == [GIVEN]


def test_card_and_doctor_name_it(guard: OODGuard) -> None:
    found = doctor.plant(guard, list(zip(*texts(answering(25, seed=2)), strict=True)))
    assert {row.side for row in found.planted} == {"prompt", "response", "both"}
    assert found.to_dict()["clean"]["flagged"].keys() == {"combined", *AXES}
    assert "prompt   resp.   given  AUROC" in str(found).splitlines()[0]
    assert not any("does not judge" in note for note in found.notes)
    told = copy.copy(guard)
    told._state = guard.state
    card = told.annotate(doctor=found.to_dict()).report()
    assert card.values["detectors"][PAIR]["estimator"].startswith("Mahalanobis of the response given the prompt")
    assert card.values["calibration"]["axes"][GIVEN] == [PAIR]
    assert card.values["length_correlation"]["channels"].keys() >= {PAIR}
    page = card.to_html()
    assert "response given prompt axis" in page
    assert "A guard of the prompt and the response and the response given prompt for" in page


def test_a_study_measures_it(guard: OODGuard) -> None:
    rows = read_pairs(answering(40, seed=2))
    baselines = fit_baselines(guard, answering(400), progress=False)
    assert not any(PAIR in name for name in baselines)
    study = run_study(
        guard,
        rows,
        conditions(rows, ["mismatched:response"], seed=0),
        baselines=baselines,
        n_bootstrap=20,
        progress=False,
    )
    doc = json.loads(json.dumps(study.to_dict()))
    row = doc["shifts"][0]
    assert row["flag_rate"].keys() == doc["id"]["flag_rate"].keys() == {"combined", *AXES}
    assert row["auroc"][GIVEN].keys() == {"default", PAIR}
    assert row["intervals"]["flag_rate"][GIVEN] is not None
    assert "response given prompt flag" in markdown(doc)
    assert findings.flags(doc)[GIVEN] == "response given prompt"
    assert "response given prompt" in html_page(doc)


def test_the_command_line_fits_checks_and_reports(
    shared_decoder: Any, decoder_tokenizer: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in (shared_decoder, decoder_tokenizer):
        part.save_pretrained(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(400)), encoding="utf-8")
    model, saved = str(tmp_path / "model"), str(tmp_path / "guard")
    fit = ["fit", "--model", model, "--data", str(data), "--output", saved, "--axes", ",".join(AXES), "--alpha", "0.05"]
    assert main([*fit, "--shrinkage", "likelihood", "--calibration-share", "0.5", "--no-progress", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["channels"][-1] == PAIR
    assert {d["shrinkage_rule"] for d in card["detectors"].values()} == {"likelihood"}
    out = tmp_path / "out.jsonl"
    assert main(["check", "--guard", saved, "--model", model, "--data", str(data), "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flagged"].keys() == {"combined", *AXES}
    assert list(json.loads(out.read_text().splitlines()[0])["axes"]) == list(AXES)
