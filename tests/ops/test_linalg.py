"""Symmetric and triangular matrices, against general ones."""

import pytest
import torch

from rm_ood.ops import reference
from rm_ood.ops.linalg import about_another_pivot, cholesky_, inverse, lower_products, mirror_


@pytest.mark.parametrize("d", [1, 2, 127, 128, 129, 700])
def test_inverse(d):
    rng = torch.Generator().manual_seed(d)
    factor = torch.randn(d, d, generator=rng, dtype=torch.float64).div(d**0.5).tril()
    factor.diagonal().abs_().add_(1)
    found = inverse(factor)
    torch.testing.assert_close(found @ factor, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not found.triu(1).any()
    assert found.is_contiguous()


@pytest.mark.parametrize("d", [1, 2, 96, 97, 500, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky(d, dtype):
    x = torch.randn(2 * d + 1, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    matrix = (x.T @ x).to(dtype)
    expected = torch.linalg.cholesky(matrix)
    factor, info = cholesky_(matrix)
    assert info == 0
    assert factor.data_ptr() == matrix.data_ptr()
    torch.testing.assert_close(factor.tril(), expected)


@pytest.mark.parametrize("first", [0, 2, 95, 96, 399])
@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan])
def test_cholesky_names_the_first_minor_that_is_not_positive(first, value):
    diagonal = torch.ones(400, dtype=torch.float64)
    diagonal[first] = value
    assert cholesky_(torch.diag(diagonal))[1] == first + 1


@pytest.mark.parametrize("d", [1, 40, 128, 513, 1100])
@pytest.mark.parametrize("n", [0, 1, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_added_to_the_lower_triangle(d, n, dtype):
    rng = torch.Generator().manual_seed(d)
    x = torch.randn(600, d, generator=rng, dtype=dtype)[:n]
    # Part of a larger matrix.
    lower = torch.ones(d, d + 3, dtype=dtype)[:, 1 : d + 1]
    products = lower_products(lower, x)
    for _ in range(2):
        for part, left, right in products:
            part.addmm_(left, right)
    expected = 1 + 2 * (x.double().T @ x.double())
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-11}
    torch.testing.assert_close(lower.tril().double(), expected.tril(), **tolerance)


def test_another_pivot():
    rng = torch.Generator().manual_seed(0)
    x, pivot, delta = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((30, 5), 5, 5))
    labels = torch.arange(30) % 3
    counts, sums, scatter = reference.class_scatter(x, labels, pivot, 3)
    sums, left, right = about_another_pivot(sums, counts, delta)
    expected = reference.class_scatter(x, labels, pivot - delta, 3)
    for got, want in zip((counts, sums, scatter + left @ right), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("d", [1, 40, 128, 300])
def test_mirror_is_in_place(d):
    whole = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lower = whole.tril()
    got = mirror_(whole)
    assert got.data_ptr() == whole.data_ptr()
    assert torch.equal(got, lower + lower.tril(-1).T)
