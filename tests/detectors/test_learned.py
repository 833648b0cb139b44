from __future__ import annotations

import pytest
import torch

from rm_ood.detectors.learned import check_dtype, check_tensors, fail_closed, part
from rm_ood.errors import FormatError, InputError

FORMS = {"rows": ("n d", None), "sizes": ("*c d", None), "counts": ("n", torch.int64), "weight": ("", torch.float64)}


def state(**changes):
    given = {
        "rows": torch.ones(3, 2),
        "sizes": torch.ones(0, 2),
        "counts": torch.arange(3),
        "weight": torch.tensor(1.0, dtype=torch.float64),
    }
    return {**given, **changes}


def test_forms_give_the_scoring_dtype_and_the_sizes():
    assert check_tensors(state(), FORMS) == (torch.float32, {"n": 3, "d": 2, "*c": 0})
    wide = state(rows=torch.ones(3, 2).double(), sizes=torch.ones(4, 2).double())
    assert check_tensors(wide, FORMS) == (torch.float64, {"n": 3, "d": 2, "*c": 4})
    assert check_tensors({}, {}) == (torch.float64, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": torch.ones(3)},
            r"rows: expected torch\.float32 of shape \(n, d\), got torch\.float32 of shape \(3,\)",
        ),
        ({"rows": torch.ones(0, 2)}, r"rows: expected .* \(n, d\), got .* \(0, 2\)"),
        ({"rows": torch.ones(3, 2).half()}, r"rows: expected torch\.float32 of .*, got torch\.float16"),
        ({"sizes": torch.ones(1, 3)}, r"sizes: expected .* \(\*c, 2\), got .* \(1, 3\)"),
        ({"sizes": torch.ones(1, 2).double()}, r"sizes: expected torch\.float32"),
        ({"counts": torch.arange(4)}, r"counts: expected torch\.int64 of shape \(3\), got .* \(4,\)"),
        ({"weight": torch.tensor(torch.inf).double()}, "weight: holds NaN or infinity"),
        ({"more": torch.ones(1)}, r"missing \[\], unknown \['more'\]"),
    ],
)
def test_other_forms_are_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        check_tensors(state(**changes), FORMS)


def test_what_is_not_finite_is_flagged():
    scores = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, -2.0])
    assert fail_closed(scores).tolist() == [1.0, torch.inf, torch.inf, torch.inf, -2.0]
    finite = torch.tensor([True, True, True, True, False])
    assert fail_closed(scores, finite).tolist() == [1.0, torch.inf, torch.inf, torch.inf, torch.inf]


def test_parts_are_by_prefix_and_dot():
    tensors = {"a.x": torch.ones(1), "a.b.x": torch.ones(2), "ab.x": torch.ones(3), "a": torch.ones(4)}
    assert {name: len(t) for name, t in part(tensors, "a").items()} == {"x": 1, "b.x": 2}


def test_half_precision_is_refused():
    with pytest.raises(InputError, match=r"dtype=torch\.float16"):
        check_dtype(torch.float16)
