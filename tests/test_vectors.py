import numpy as np
import pytest
import scipy.sparse
import torch

from rm_ood.errors import InputError, MismatchError, NonFiniteError
from rm_ood.vectors import as_labels, as_tensor, as_vectors, check_finite, unit_rows

ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_floating_tensors_keep_their_dtype_and_memory(dtype):
    x = torch.tensor(ROWS, dtype=dtype, requires_grad=True)
    got = as_vectors(x)
    assert got.dtype == dtype
    assert got.data_ptr() == x.data_ptr()
    assert not got.requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integer_and_bool_tensors_are_cast(dtype):
    got = as_vectors(torch.tensor(ROWS).to(dtype))
    assert got.dtype == torch.float64
    assert got.tolist() == torch.tensor(ROWS).to(dtype).double().tolist()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "u1", "?", ">f8", ">f4", np.longdouble])
def test_arrays_of_any_real_dtype(dtype):
    array = np.array(ROWS).astype(dtype)
    got = as_vectors(array)
    assert got.is_floating_point()
    np.testing.assert_array_equal(got.double().numpy(), array.astype(np.float64))


def test_array_views_are_accepted():
    array = np.array(ROWS)
    assert as_vectors(array).data_ptr() == array.ctypes.data
    assert as_vectors(array[::-1, ::-1]).tolist() == [[6, 5, 4], [3, 2, 1]]
    assert as_vectors(np.asfortranarray(array)).tolist() == ROWS
    assert as_vectors(array[:, ::2]).tolist() == [[1, 3], [4, 6]]
    array.flags.writeable = False
    assert as_vectors(array).tolist() == ROWS
    assert as_vectors(ROWS).tolist() == ROWS


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor(ROWS).to_sparse(), r"x: sparse .* torch.sparse_coo; pass x.to_dense"),
        (scipy.sparse.csr_array(np.eye(2)), r"x: sparse .* x.toarray"),
        (torch.empty(2, 3, device="meta"), r"x: .* meta device"),
        (torch.tensor(ROWS).to(torch.complex64), r"x: expected real vectors, got torch.complex64"),
        (np.array(ROWS) + 1j, r"x: expected real vectors, got complex128"),
        (np.array([[object()]]), r"x: expected numbers, got dtype object from ndarray"),
        (np.array([["a"]]), r"x: expected numbers, got dtype <U1"),
        ([[1.0], [1.0, 2.0]], r"x: rows of different lengths"),
        (None, r"x: expected numbers, got dtype object from NoneType"),
        (torch.zeros(3), r"x: expected shape \(n, d\), got \(3,\)\. Reshape your data: x\[None\]"),
        (torch.zeros(2, 3, 4), r"x: expected shape \(n, d\), got \(2, 3, 4\)\.$"),
        (torch.zeros(5, 0), r"x: 0 features, shape \(5, 0\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_dense_real_matrix_is_refused(x, message):
    with pytest.raises(InputError, match=message):
        as_vectors(x)


def test_width_is_checked():
    with pytest.raises(MismatchError, match=r"h: expected 768 features, got 1024"):
        as_vectors(torch.zeros(1, 1024), n_features=768, name="h")
    assert as_vectors(torch.zeros(0, 768), n_features=768).shape == (0, 768)


@pytest.mark.parametrize(
    ("labels", "classes", "index"),
    [
        (["rejected", "chosen", "chosen"], ["chosen", "rejected"], [1, 0, 0]),
        (np.array([True, False, True]), [False, True], [1, 0, 1]),
        (torch.tensor([1, -1, 1]), [-1, 1], [1, 0, 1]),
        ((7.5, 2.0, 7.5), [2.0, 7.5], [1, 0, 1]),
        (np.array(["b", "a", "b"], dtype=object), ["a", "b"], [1, 0, 1]),
    ],
    ids=["str", "bool", "tensor", "float", "object"],
)
def test_labels_of_any_kind_in_sorted_order(labels, classes, index):
    got_classes, got_index = as_labels(labels, 3)
    assert got_classes.tolist() == classes
    assert got_index.tolist() == index
    assert got_index.dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"y: expected one label for each of 3 rows, shape \(3,\), got \(2,\)"),
        ([[0], [1], [0]], r"got \(3, 1\)"),
        ([0.0, np.nan, np.inf], r"y: 2 labels are NaN or infinite"),
        (np.array([0, "a", None], dtype=object), r"y: labels of different types"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        as_labels(labels, 3)


def test_as_tensor_keeps_any_number_of_dimensions():
    assert as_tensor(np.arange(3.0)).shape == (3,)
    assert as_tensor(np.float32(2.0)).shape == ()


def test_rows_that_are_not_finite_are_named():
    x = torch.zeros(40, 2)
    check_finite(x)
    check_finite(x[:0])
    x[[3, 7], [0, 1]] = torch.tensor([torch.nan, -torch.inf])
    with pytest.raises(NonFiniteError, match=r"weight: 2 of 40 rows hold NaN or infinity \(rows 3, 7\)"):
        check_finite(x, name="weight")
    x[10:, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"x: 32 of 40 rows hold .* \(rows 3, 7, 10, .* 17, \.\.\.\)"):
        check_finite(x)


@pytest.mark.parametrize("scale", [1e-310, 1e-160, 1.0, 1e160, 1e307])
def test_unit_rows_keep_the_direction_at_any_length(scale):
    x = torch.tensor([[3.0, -4.0], [0.0, 2.0]], dtype=torch.float64) * scale
    torch.testing.assert_close(unit_rows(x), torch.tensor([[0.6, -0.8], [0.0, 1.0]], dtype=torch.float64))


def test_what_has_no_direction_is_nan():
    bad = torch.tensor([[0.0, 0.0], [1.0, torch.inf], [torch.nan, 1.0]])
    assert unit_rows(bad).isnan().any(1).all()
    assert unit_rows(torch.ones(1, 4).half()).dtype == torch.float64
    assert unit_rows(torch.zeros(0, 3)).shape == (0, 3)
