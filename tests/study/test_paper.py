"""The paper's released scores: its numbers to the printed digit by its definitions, and the correct ones beside them."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED

from rm_ood.cli import main
from rm_ood.study import paper
from rm_ood.study.bootstrap import clustered_interval, detection_resamples
from rm_ood.study.detection import auroc
from rm_ood.study.metrics import ece, energy_score, mce, pair_accuracy, pair_metrics
from rm_ood.study.score_files import read_pairs_file

SCORES = SHARED / "paper_scores"
SFF = "deberta_v3_large/open_ai_summarize_from_feedback"
WORDS = f"{SFF}/word_perturb/10k_subset/trial0"
STEAM = "steamshp_xl/shp/word_perturb/5k_subset/trial10"
PLACES = {"prompt": "prompt", "response": "response", "both": "prompt_and_response"}

# set, condition | acc, conf, gap, ECE, MCE in % | Brier | NLL | T | AUROC | FPR95 OOD positive, ID positive | AUPR | MSP
PRINTED = """
SFF english         | 71.62 86.15 +14.5 14.53 20.0 | 0.2116 | 0.753 | 3.05
SFF french prompt   | 70.30 80.88 +10.6 10.59 15.0 | 0.2064 | 0.649 | 2.20  | 0.649 | 0.689 0.977 | 0.558 | 0.620
SFF hindi prompt    | 63.59 75.95 +12.4 12.36 18.8 | 0.2418 | 0.721 | 2.58  | 0.883 | 0.279 0.783 | 0.812 | 0.707
SFF french response | 65.52 85.90 +20.4 20.37 24.3 | 0.2640 | 0.961 | 4.38  | 0.743 | 0.700 0.852 | 0.698 | 0.521
SFF hindi response  | 55.96 73.58 +17.6 17.62 30.9 | 0.2854 | 0.831 | 5.31  | 0.971 | 0.094 0.176 | 0.957 | 0.744
SFF french both     | 64.46 84.33 +19.9 19.87 24.6 | 0.2658 | 0.927 | 4.24  | 0.793 | 0.570 0.827 | 0.739 | 0.556
SFF hindi both      | 50.90 62.97 +12.1 12.06 38.5 | 0.2754 | 0.773 | 13.79 | 0.996 | 0.014 0.007 | 0.996 | 0.864
SFF french back     | 64.49 86.96 +22.5 22.46 26.7 | 0.2774 | 1.080 | 5.29  | 0.770 | 0.681 0.772 | 0.748 | 0.490
SFF hindi back      | 54.45 78.23 +23.8 23.78 37.6 | 0.3194 | 1.096 | 11.11 | 0.965 | 0.178 0.186 | 0.963 | 0.649
SHP english         | 54.98 74.34 +19.4 19.35 36.5 | 0.2990 | 0.880 | 7.99
SHP hindi prompt    | 55.89 75.34 +19.5 19.45 31.9 | 0.2914 | 0.864 | 5.73  | 0.761 | 0.684 0.790 | 0.727 | 0.480
SHP hindi response  | 44.44 67.76 +23.3 23.31 74.8 | 0.3437 | 1.031 | inf   | 0.761 | 0.739 0.776 | 0.726 | 0.635
SHP hindi both      | 38.72 63.07 +24.4 24.35 82.4 | 0.3258 | 0.876 | inf   | 0.984 | 0.047 0.041 | 0.970 | 0.730
SHP hindi back      | 41.38 65.65 +24.3 24.27 71.7 | 0.3296 | 0.896 | inf   | 0.971 | 0.079 0.128 | 0.946 | 0.677
"""
# Mean of ten trials: acc, conf, ECE in % | AUROC | FPR95 OOD positive, ID positive | AUPR | MSP.
WORD_MEANS = """
prompt .1   | 70.99 84.76 13.78 | 0.555 | 0.864 0.952 | 0.522 | 0.538
prompt .5   | 66.74 81.46 14.73 | 0.736 | 0.581 0.890 | 0.666 | 0.611
prompt .9   | 60.18 76.52 16.35 | 0.952 | 0.180 0.312 | 0.936 | 0.698
response .1 | 64.44 87.48 23.04 | 0.745 | 0.734 0.813 | 0.716 | 0.481
response .5 | 55.79 74.19 18.40 | 0.981 | 0.078 0.099 | 0.976 | 0.727
response .9 | 52.91 64.88 11.96 | 0.985 | 0.062 0.074 | 0.981 | 0.849
both .1     | 66.22 85.86 19.63 | 0.709 | 0.685 0.883 | 0.658 | 0.522
both .5     | 53.71 74.80 21.09 | 0.976 | 0.124 0.152 | 0.974 | 0.697
both .9     | 48.11 54.34 6.23  | 1.000 | 0.001 0.000 | 0.999 | 0.956
"""
# SteamSHP on SHP, mean of three trials: ties %, acc by the paper and with half ties, conf, ECE the same | AUROC.
STEAM_MEANS = """
prompt .0   | 4.2 71.9 69.7 63.1 8.9  6.8
prompt .5   | 7.5 72.1 68.4 61.4 10.8 7.0 | 0.582 | 0.900
response .0 | 4.3 72.2 70.1 63.0 9.3  7.2
response .5 | 4.4 65.5 63.3 62.5 3.5  1.7 | 0.704 | 0.691
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `rm-ood study-scores` writes for the folder as it is."""
    if not SCORES.exists():
        pytest.skip("the paper's released scores are not beside the project")
    folder = tmp_path_factory.mktemp("paper")
    assert run(SCORES, "--output", folder) == 0
    doc: dict[str, Any] = json.loads((folder / "study-scores.json").read_text())
    return doc


def run(*arguments: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return main(["study-scores", *map(str, arguments), "--no-progress"])


def row_of(study: dict[str, Any], place: str, condition: str) -> dict[str, Any]:
    (found,) = [r for r in study["files"] if r["condition"] == condition and r["file"].startswith(place)]
    return found


def lines(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def asked(table: str) -> list[Any]:
    return [pytest.param(*line, id=line[0]) for line in ([row[0], row[1:]] for row in lines(table))]


def near(values: list[float], printed: str, unit: float, slack: float = 0.0) -> None:
    """Equal to the last printed digit, or to within `slack`."""
    texts = printed.split()
    assert len(texts) == len(values)
    for value, text in zip(values, texts, strict=True):
        digits = len(text.partition(".")[2])
        assert abs(unit * value - float(text)) <= max(slack, 0.5 * 10**-digits + 1e-9), (value, text)


def detection_numbers(energy: dict[str, Any]) -> list[float]:
    return [energy["fpr95"]["ood_positive"], energy["fpr95"]["id_positive"]]


@pytest.mark.shared
@pytest.mark.parametrize(("name", "printed"), asked(PRINTED))
def test_translations_are_the_papers_to_the_printed_digit(study: dict[str, Any], name: str, printed: list[str]) -> None:
    data, _, condition = name.partition(" ")
    row = row_of(study, SFF if data == "SFF" else "deberta_v3_large/shp", condition)
    found = row["paper"]
    acc, conf, gap, rest = printed[0].split(maxsplit=3)
    near([found[k] for k in ("accuracy", "confidence", "ece", "mce")], f"{acc} {conf} {rest}", 100)
    # Printed as the difference of the two rounded numbers.
    near([found["gap"]], gap, 100, slack=0.06)
    near([found["brier"]], printed[1], 1)
    near([found["nll"]], printed[2], 1)
    if printed[3] == "inf":
        assert found["temperature"] is None
    else:
        near([found["temperature"]], printed[3], 1)
    if condition == "english":
        assert row["energy"] is row["max_softmax"] is None
        return
    near([row["energy"]["auroc"]], printed[4], 1)
    near(detection_numbers(row["energy"]), printed[5], 1)
    near([row["energy"]["aupr"]], printed[6], 1)
    near([row["max_softmax"]["auroc"]], printed[7], 1)
    # DeBERTa has next to no ties: the correct definitions differ by a hundredth of a point at most.
    assert row["correct"]["ece"] == pytest.approx(found["ece"], abs=1.2e-4)
    assert row["correct"]["accuracy"] == pytest.approx(found["accuracy"], abs=1.2e-4)


@pytest.mark.shared
def test_english_sff_is_the_notebooks_number(study: dict[str, Any]) -> None:
    row = row_of(study, SFF, "english")
    assert row["paper"]["ece"] == pytest.approx(0.14528659532547955, abs=1e-12)
    assert row["correct"]["n_pairs"] == 83_802
    shp = row_of(study, "deberta_v3_large/shp", "english")
    assert shp["paper"]["accuracy"] == pytest.approx(0.5498373828, abs=1e-10)
    assert shp["correct"]["n_pairs"] == 10_454


@pytest.mark.shared
def test_the_clean_temperature_helps_less_off_its_ground(study: dict[str, Any]) -> None:
    found = {
        r["condition"]: 100 * r["correct"]["ece_at_id_temperature"]
        for r in study["files"]
        if r["id_file"] == f"{SFF}/english_original_scores.csv.gz"
    }
    near([found["english"]], "0.75", 1)
    # Over six languages: 2.2 to 5.4 for prompts, 3.4 to 5.2 for responses, 6.0 to 9.8 for back-translations.
    for language in ("french", "hindi"):
        assert 2.15 <= found[f"{language} prompt"] <= 5.45
        assert 3.35 <= found[f"{language} response"] <= 5.25
        assert 5.95 <= found[f"{language} back"] <= 9.85


@pytest.mark.shared
@pytest.mark.parametrize(("name", "printed"), asked(WORD_MEANS))
def test_one_word_trial_is_near_the_mean_of_ten(study: dict[str, Any], name: str, printed: list[str]) -> None:
    side, severity = name.split()
    row = row_of(study, f"{WORDS}/{PLACES[side]}/", f"word {side} 0{severity}")
    assert (row["side"], row["severity"]) == (side, float(severity))
    assert row["id_file"] == f"{WORDS}/{PLACES[side]}/00_scores.csv.gz"
    near([row["paper"][k] for k in ("accuracy", "confidence", "ece")], printed[0], 100, slack=2.0)
    near([row["energy"]["auroc"]], printed[1], 1, slack=0.02)
    near(detection_numbers(row["energy"]), printed[2], 1, slack=0.02)
    near([row["energy"]["aupr"]], printed[3], 1, slack=0.02)
    near([row["max_softmax"]["auroc"]], printed[4], 1, slack=0.02)


# What these files of one trial each give: acc and ECE by the paper, then correct | AUROC, FPR95 OOD and ID positive, MSP.
PINNED = """
SFF prompt .0     | 0.715400 0.144996 0.715400 0.144996
SFF prompt .1     | 0.711700 0.135125 0.711700 0.135125 | 0.554727 0.8649 0.9516 0.536347
SFF prompt .5     | 0.664100 0.149271 0.664100 0.149271 | 0.736686 0.5773 0.8915 0.608804
SFF prompt .9     | 0.610300 0.154514 0.610300 0.154514 | 0.951355 0.1799 0.3123 0.694656
SFF response .0   | 0.715400 0.144996 0.715400 0.144996
SFF response .1   | 0.651900 0.226861 0.651900 0.226861 | 0.742715 0.7462 0.8187 0.470916
SFF response .5   | 0.555900 0.184033 0.555900 0.184033 | 0.980755 0.0772 0.0976 0.725412
SFF response .9   | 0.529700 0.117734 0.529700 0.117734 | 0.984438 0.0617 0.0726 0.847527
SFF both .0       | 0.715400 0.144996 0.715400 0.144996
SFF both .1       | 0.670300 0.190793 0.670300 0.190793 | 0.707327 0.6941 0.8872 0.512694
SFF both .5       | 0.530400 0.218316 0.530400 0.218316 | 0.975747 0.1257 0.1521 0.693701
SFF both .9       | 0.471700 0.071602 0.471700 0.071602 | 0.999452 0.0015 0.0005 0.955242
Steam prompt .0   | 0.724800 0.096741 0.704400 0.076341
Steam prompt .5   | 0.723000 0.108724 0.686800 0.072524 | 0.584169 0.8966 0.9314 0.539995
Steam response .0 | 0.723400 0.093164 0.702400 0.072164
Steam response .5 | 0.658600 0.037403 0.638400 0.017203 | 0.704087 0.6868 0.9502 0.497789
"""


@pytest.mark.shared
@pytest.mark.parametrize(("name", "printed"), asked(PINNED))
def test_the_word_trials_present_keep_their_own_figures(study: dict[str, Any], name: str, printed: list[str]) -> None:
    data, side, severity = name.split()
    place = f"{WORDS if data == 'SFF' else STEAM}/{PLACES[side]}/"
    row = row_of(study, place, f"word {side} {float(severity):g}")
    values = [row[kind][number] for kind in ("paper", "correct") for number in ("accuracy", "ece")]
    near(values, printed[0], 1)
    if severity == ".0":
        assert row["energy"] is row["max_softmax"] is None
        return
    energy = row["energy"]
    near([energy["auroc"], *detection_numbers(energy), row["max_softmax"]["auroc"]], printed[1], 1)


@pytest.mark.shared
@pytest.mark.parametrize(("name", "printed"), asked(STEAM_MEANS))
def test_ties_are_half_of_steamshps_story(study: dict[str, Any], name: str, printed: list[str]) -> None:
    side, severity = name.split()
    row = row_of(study, f"{STEAM}/{side}/", f"word {side} {float(severity):g}")
    theirs, correct = row["paper"], row["correct"]
    ties = correct["ties"] / correct["n_pairs"]
    values = [ties, theirs["accuracy"], correct["accuracy"], theirs["confidence"], theirs["ece"], correct["ece"]]
    near(values, printed[0], 100, slack=2.0)
    assert theirs["accuracy"] - correct["accuracy"] == pytest.approx(ties / 2, abs=1e-12)
    # Under-confident: a temperature below 1.
    assert correct["temperature"] < 1
    assert theirs["gap"] < 0
    if severity != ".0":
        near([row["energy"]["auroc"]], printed[1], 1, slack=0.02)
        near([row["energy"]["fpr95"]["ood_positive"]], printed[2], 1, slack=0.02)


@pytest.mark.shared
def test_a_tie_on_the_edge_of_a_bin_is_half_off_by_itself(study: dict[str, Any]) -> None:
    chosen, rejected = read_pairs_file(SCORES / STEAM / "prompt" / "05_scores.csv.gz")

    def of(metric: Any, ties: str, closed: str) -> float:
        return float(metric(chosen, rejected, ties=ties, closed=closed))

    # Credited in full, the ties of (.4, .5] make a bin that is right every time at confidence .5; at half they are exact.
    assert of(mce, "correct", "right") == 0.5
    assert of(mce, "correct", "left") == pytest.approx(0.126391, abs=1e-6)
    assert of(mce, "half", "right") == of(mce, "half", "left") == pytest.approx(0.126391, abs=1e-6)
    # The credit alone moves ECE by 3.6 points, half the share of ties.
    assert of(ece, "correct", "left") - of(ece, "half", "left") == pytest.approx(0.0362, abs=1e-4)


# Condition | energy at T = 1, .1, 5, 100 | -max, -min, -mean.
REWARD_ONLY = """
french/french_prompt_english_response | 0.649 0.656 0.613 0.580 | 0.656 0.504 0.578
hindi/hindi_prompt_english_response   | 0.883 0.888 0.864 0.843 | 0.888 0.730 0.842
hindi/english_prompt_hindi_response   | 0.971 0.972 0.968 0.964 | 0.972 0.906 0.963
french/french_prompt_french_response  | 0.793 0.792 0.786 0.772 | 0.792 0.709 0.771
french/translated_back_scores         | 0.770 0.767 0.779 0.778 | 0.767 0.748 0.778
"""


@pytest.mark.shared
@pytest.mark.parametrize(("name", "printed"), asked(REWARD_ONLY))
def test_the_energys_temperature_runs_from_the_larger_reward_to_the_mean(
    study: dict[str, Any], name: str, printed: list[str]
) -> None:
    clean = read_pairs_file(SCORES / SFF / "english_original_scores.csv.gz")
    shifted = read_pairs_file(SCORES / SFF / "translation" / f"{name}.csv.gz")
    near([auroc(energy_score(*clean, T), energy_score(*shifted, T)) for T in (1, 0.1, 5, 100)], printed[0], 1)
    near([auroc(-f(clean, axis=0), -f(shifted, axis=0)) for f in (np.max, np.min, np.mean)], printed[1], 1)


@pytest.mark.shared
def test_clustered_errors_are_those_of_the_block_bootstrap(study: dict[str, Any]) -> None:
    """Neighbouring rows share responses; blocks of 20 rows stand for their posts."""
    clean = read_pairs_file(SCORES / SFF / "english_original_scores.csv.gz")
    shifted = read_pairs_file(SCORES / SFF / "translation" / "french" / "english_prompt_french_response.csv.gz")
    blocks = np.arange(len(clean[0])) // 20
    for statistic, error in ((pair_accuracy, 0.0019), (ece, 0.0018)):
        low, high = clustered_interval(statistic, blocks, *clean, n_resamples=200, level=0.68269)
        assert (high - low) / 2 == pytest.approx(error, rel=0.2), statistic.__name__
    drawn = detection_resamples(energy_score(*clean), energy_score(*shifted), blocks, blocks, n_resamples=100)
    assert drawn["auroc"].std() == pytest.approx(0.0014, rel=0.2)
    # As many independent rows would have accuracy's error at .00156.
    by_row = clustered_interval(pair_accuracy, range(len(clean[0])), *clean, n_resamples=100, level=0.68269)
    assert (by_row[1] - by_row[0]) / 2 == pytest.approx(0.00156, rel=0.15)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A clean file, a shifted one in which half of the pairs tie, and nothing of the paper's layout."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(2, 1, 500), rng.normal(1, 1, 500)
    for name, c, r in (
        ("clean.csv", chosen, rejected),
        ("far|off.csv.gz", chosen - 3, np.where(rng.random(500) < 0.5, chosen, rejected) - 3),
    ):
        text = "id,chosen,rejected\n" + "".join(
            f"{i},{a:.17g},{b:.17g}\n" for i, (a, b) in enumerate(zip(c, r, strict=True))
        )
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return tmp_path


def test_files_outside_the_layout_take_a_clean_file_by_name(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "out" / "deep"
    assert run(files / "far|off.csv.gz", "--id", files / "clean.csv", "--output", out, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    doc = json.loads(captured.out)
    assert doc == json.loads((out / "study-scores.json").read_text())
    clean, far = doc["files"]
    assert (clean["file"], clean["id_file"], far["file"], far["id_file"]) == (
        "clean.csv", "clean.csv", "far|off.csv.gz", "clean.csv",
    )  # fmt: skip
    ground, shifted = (read_pairs_file(files / name) for name in ("clean.csv", "far|off.csv.gz"))
    assert clean["energy"] is None
    assert far["energy"]["auroc"] == auroc(energy_score(*ground), energy_score(*shifted)) > 0.9
    assert far["correct"] == pair_metrics(*shifted, temperature=clean["correct"]["temperature"])
    assert far["paper"]["accuracy"] == pair_accuracy(*shifted, ties="correct") > far["correct"]["accuracy"]
    with (out / "study-scores.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["condition"] for row in rows] == ["clean", "far|off"]
    assert rows[0]["energy.auroc"] == ""
    assert float(rows[1]["energy.fpr95.id_positive"]) == far["energy"]["fpr95"]["id_positive"]
    assert float(rows[1]["correct.ece"]) == far["correct"]["ece"]


def test_markdown_shows_both_definitions(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(files / "clean.csv", files / "far|off.csv.gz", "--id", files / "clean.csv", "--output", files / "out") == 0
    )
    shown = capsys.readouterr().out
    page = (files / "out" / "study-scores.md").read_text()
    assert page.strip() in shown
    assert "study-scores.json, study-scores.md, study-scores.csv" in shown
    doc = json.loads((files / "out" / "study-scores.json").read_text())
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    head, _, clean, far = ([c.strip() for c in line.replace("\\|", "/").strip("|").split("|")] for line in table)
    assert far[head.index("condition")] == "far/off"
    theirs, correct = doc["files"][1]["paper"], doc["files"][1]["correct"]
    assert far[head.index("acc")] == f"{100 * theirs['accuracy']:.2f} / {100 * correct['accuracy']:.2f}"
    assert far[head.index("ECE")] == f"{100 * theirs['ece']:.2f} / {100 * correct['ece']:.2f}"
    assert far[head.index("FPR95 ID+")] == f"{doc['files'][1]['energy']['fpr95']['id_positive']:.3f}"
    assert far[head.index("FPR95 OOD+")] == f"{doc['files'][1]['energy']['fpr95']['ood_positive']:.3f}"
    assert far[head.index("FPR95 OOD+")] != far[head.index("FPR95 ID+")]
    assert clean[head.index("AUROC")] == "-"


def test_a_file_without_a_clean_one_has_accuracy_alone(files: Path) -> None:
    doc = paper.study_scores([files / "clean.csv"], progress=False)
    (row,) = doc["files"]
    assert row["id_file"] is row["energy"] is row["correct"]["ece_at_id_temperature"] is None
    assert "## Without a clean file" in paper.markdown(doc)
    assert row["paper"]["gap"] == pytest.approx(row["paper"]["confidence"] - row["paper"]["accuracy"])


def test_a_model_that_cannot_be_trusted_has_no_finite_temperature(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "bad.csv").write_text("chosen,rejected\n" + "0,1\n" * 40 + "100,0\n")
    (files / "worse.csv").write_text("chosen,rejected\n" + "0,1\n" * 400 + "100,0\n")
    assert run(files / "bad.csv", "--id", files / "worse.csv", "--output", files / "out") == 0
    worse, bad = json.loads((files / "out" / "study-scores.json").read_text())["files"]
    assert worse["correct"]["temperature"] is None
    assert " inf |" in capsys.readouterr().out
    # At that temperature confidence is .5 everywhere.
    assert bad["correct"]["ece_at_id_temperature"] == pytest.approx(0.5 - 1 / 41)
    # The paper's bins lose the pair of confidence 1, from ECE and not from accuracy.
    sure = 1 / (1 + math.exp(-1))
    assert bad["paper"]["ece"] == pytest.approx(sure)
    assert bad["correct"]["ece"] == pytest.approx(40 / 41 * sure)


def test_the_papers_mce_asks_for_more_than_30_pairs(tmp_path: Path) -> None:
    # A bin that is always wrong, and 40 pairs that are right at .73.
    for wrong, seen in ((30, False), (31, True)):
        path = tmp_path / f"{wrong}.csv"
        path.write_text("chosen,rejected\n" + "1,0\n" * 40 + "0,3\n" * wrong)
        (row,) = paper.study_scores([path], progress=False)["files"]
        gap = 1 / (1 + math.exp(-3)) if seen else 1 - 1 / (1 + math.exp(-1))
        assert row["paper"]["mce"] == pytest.approx(gap)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("score\n1\n", r"bad\.csv line 1: expected each of the columns chosen and rejected once"),
        ("chosen,rejected\n1,2\n3,nan\n", r"bad\.csv line 3: rejected is nan"),
        ("chosen,rejected\n", r"bad\.csv: no reward pair"),
    ],
)
def test_bad_files_exit_1_and_leave_nothing(
    files: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (files / "bad.csv").write_text(text)
    assert run(files, "--id", files / "clean.csv", "--output", files / "out") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rm-ood study-scores: ")
    assert re.search(message, captured.err)
    assert not (files / "out").exists()


def test_a_missing_file_exits_1(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files / "none.csv", "--output", files / "out") == 1
    assert "no file at" in capsys.readouterr().err
