import csv
import types

import harness
import pytest
import run


def row(**changes):
    values = {"suite": "s", "op": "o", "provider": "p", "shape": "n=1", "dtype": "float32", "metric": "cpu_time"}
    return harness.Row(**values | {"value": 1.25, "low": None, "high": 2.0, "unit": "us"} | changes)


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "results/cpu.csv"
    harness.append([row()], path)
    harness.append([row(provider="q", ratio=3.14159)], path)
    with path.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [r["provider"] for r in rows] == ["p", "q"]
    assert (rows[0]["value"], rows[0]["low"], rows[0]["ratio"], rows[1]["ratio"]) == ("1.25", "", "", "3.142")
    assert tuple(rows[0]) == harness.COLUMNS
    assert rows[0]["torch"]
    assert rows[0]["date"]


def test_columns_are_those_that_readers_of_the_table_know():
    known = (
        "suite op provider shape dtype metric value low high unit peak_memory ratio device driver torch triton commit"
    )
    assert " ".join(harness.COLUMNS) == f"{known} date"


def test_providers_alternate_and_are_paired():
    now, calls = [0.0], []

    def provider(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        return call

    timings = harness.alternate(
        {"fast": provider("fast", 1.0), "slow": provider("slow", 3.0)}, rounds=4, seconds=2.0, clock=lambda: now[0]
    )
    assert calls[4:] == ["fast", "fast", "slow", "slow", "fast", "fast", "fast", "fast", "slow", "slow", "fast", "fast"]
    assert timings["fast"].samples == (1.0,) * 4
    assert timings["fast"].times_faster_than(timings["slow"]) == 3.0


def test_timing_summaries():
    timing = harness.Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert timing.median == 3.0
    assert (timing.low, timing.high) == pytest.approx((1.4, 4.6))
    assert harness.quantile([7.0], 0.9) == 7.0


def test_table_is_markdown():
    assert harness.table([row(ratio=4.2)]).splitlines()[-1] == "| o | p | n=1 | cpu_time | 1.25 |  | 2 | us | 4.2 |"


def test_unknown_suites_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["no-such-suite"])
    assert "scoring" in capsys.readouterr().err


def test_a_suite_is_measured_printed_and_appended(monkeypatch, tmp_path, capsys):
    import suites.scoring as suite

    monkeypatch.setattr(suite, "measure", lambda: iter([row()]))
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert run.main(["scoring", "--no-tests", "--no-append"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert run.main(["scoring", "--no-tests", "--append"]) == 0
    assert harness.results_file().exists()
    assert "| o | p |" in capsys.readouterr().out


@pytest.mark.parametrize(("returncode", "expected"), [(1, 1), (0, 0)])
def test_the_tests_of_the_suite_come_first(monkeypatch, capsys, returncode, expected):
    import suites.scoring as suite

    ran = []

    def fake_run(command, **_):
        ran.append(command)
        return types.SimpleNamespace(returncode=returncode)

    monkeypatch.setattr(run.subprocess, "run", fake_run)
    monkeypatch.setattr(suite, "measure", lambda: iter([row()]))
    assert run.main(["scoring", "--no-append"]) == expected
    assert ran[0][-2:] == list(suite.TESTS)
    printed = capsys.readouterr()
    assert ("| o |" in printed.out) == (returncode == 0)
    assert ("nothing was measured" in printed.err) == (returncode == 1)


def test_further_arguments_go_to_suites_that_write_their_own_output(monkeypatch):
    given = []
    monkeypatch.setattr(
        run.importlib, "import_module", lambda _: types.SimpleNamespace(main=lambda a: given.append(a) or 7)
    )
    assert run.main(["detection", "--rows", "3"]) == 7
    assert given == [["--rows", "3"]]
    monkeypatch.setattr(run.importlib, "import_module", lambda _: types.SimpleNamespace(measure=list))
    with pytest.raises(SystemExit):
        run.main(["scoring", "--rows", "3"])
