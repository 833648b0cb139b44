"""Run one benchmark suite: its tests first, then ours and the peer alternating in one process.

    pip install -e '.[bench]'
    python benchmarks/run.py scoring              # appends rows to benchmarks/results/<device>.csv
    python benchmarks/run.py scoring --no-append  # prints them only

A suite is a module `benchmarks/suites/<name>.py` with `measure()`, which yields `harness.Row`s, and `TESTS`, the test files
that must pass before its numbers mean anything. A suite with only a `main(arguments)` writes its own output: further
arguments are handed to it.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import harness


def main(argv: Sequence[str] | None = None) -> int:
    names = sorted(path.stem for path in (Path(__file__).parent / "suites").glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=names)
    parser.add_argument(
        "--append", action=argparse.BooleanOptionalAction, default=True, help="append to benchmarks/results (default)"
    )
    parser.add_argument("--no-tests", action="store_true", help="skip the tests of the suite")
    options, rest = parser.parse_known_args(argv)

    suite = importlib.import_module(f"suites.{options.suite}")
    tests = getattr(suite, "TESTS", ())
    if tests and not options.no_tests:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=harness.ROOT, check=False)
        if done.returncode != 0:
            print(f"the tests of {options.suite} fail: nothing was measured", file=sys.stderr)
            return 1
    if not hasattr(suite, "measure"):
        code: int = suite.main(rest)
        return code
    if rest:
        parser.error(f"suite {options.suite} takes no further arguments: {' '.join(rest)}")
    rows = list(suite.measure())
    print(harness.table(rows))
    if options.append:
        harness.append(rows, harness.results_file())
        print(f"appended {len(rows)} rows to {harness.results_file().relative_to(harness.ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
