"""What the compiler makes of the kernels for three generations of GPUs: `python -m pytest tests/kernels/compiler`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton
from compiled import HEADER, SHARED, Case, candidates, cases, distance, rows, scatter, table, variants

import rm_ood.ops

README = Path(rm_ood.ops.__file__).parent / "README.md"
# Of the machine that the work runs on: tensor cores of Ampere, Hopper and Blackwell.
FAMILY = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCMMA", 120: "HMMA"}


def named(case: Case) -> str:
    return "-".join(map(str, case[:-1] if case.forced is None else (*case[:5], *case.forced)))


@pytest.mark.parametrize("case", [*cases(), *variants()], ids=named)
def test_distance_kernel_fits_and_uses_the_tensor_cores(case):
    made = distance(case)
    assert made.stack == 0
    assert made.spills == 0
    assert made.shared <= SHARED[case.cc]
    if case.mode == "fp32":
        assert made.mma == {}
    else:
        # Warp groups multiply 64 rows at least. A kernel that the compiler gives up on is a trap without any products.
        family = FAMILY[case.cc] if case.blocks.rows >= 64 else "HMMA"
        assert set(made.mma) == {family}
    assert bool(made.bulk_copies) == (case.cc >= 90)
    assert ".tf32" not in made.ptx


@pytest.mark.parametrize("case", candidates(), ids=named)
def test_blocks_that_are_tried_compute_what_is_asked_for(case):
    made = distance(case)
    if case.mode == "fp32":
        assert made.mma == {}, "float32 products became TF32"
        assert made.spills == 0
    else:
        assert made.mma, "a trap"
    assert ".tf32" not in made.ptx


@pytest.mark.parametrize("split_x", [True, False])
@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100, 120])
def test_scatter_kernel_fits_and_uses_the_tensor_cores(cc, split_x):
    made = scatter(cc, split_x)
    assert made.spills == made.stack == 0
    assert made.shared <= SHARED[cc]
    # Class sums have 16 rows, too few for a warp group.
    assert (FAMILY[cc] in made.mma) if split_x else made.mma == {}
    assert ".tf32" not in made.ptx


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_partial_sums_are_seen_by_the_last_program(cc):
    case = next(c for c in cases() if c.cc == cc and c.batch == "<= 16")
    # Partial sums, all threads, one ticket for all of them, all threads, sums that no cache has kept.
    order = r"st\.global.*bar\.sync.*atom\.(?:acq_rel\.gpu\.global|global\.gpu\.acq_rel)\.add.*bar\.sync.*ld\.volatile\.global"
    assert re.search(order, distance(case).ptx, re.DOTALL)
    assert "atom" not in distance(case, split=1).ptx


def test_readme_has_the_table(capsys):
    made = {tuple(cells[:7]): cells[7:] for cells in rows()}
    text = README.read_text(encoding="utf-8")
    lines = text[text.index(HEADER) :].split("\n\n")[0].splitlines()[2:]
    written = {tuple(cells[:7]): cells[7:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines)}
    with capsys.disabled():
        print(f"\nTriton {triton.__version__}\n{table()}")
    assert written.keys() == made.keys()
    if f"Triton {triton.__version__}" not in text:
        pytest.skip(f"the table is of another Triton than {triton.__version__}, which allots registers otherwise")
    for key, cells in made.items():
        assert int(cells[0]) <= 1.1 * int(written[key][0]), f"{key}: more registers than the README says"
        assert cells[1:] == written[key][1:], f"{key}: write the table anew with tests/kernels/compiler/compiled.py"
