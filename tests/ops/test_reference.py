import torch

from rm_ood.ops import reference


def test_scatter_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 6.0]])
    pivot = torch.tensor([1.0, 2.0], dtype=torch.float64)
    counts, sums, scatter = reference.class_scatter(x, torch.tensor([0, 0, 2]), pivot, 3)
    assert counts.tolist() == [2, 0, 1]
    assert sums.tolist() == [[2, 0], [0, 0], [4, 4]]
    assert scatter.tolist() == [[4 + 16, 16], [16, 16]]


def test_distance_by_hand():
    whitening = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    x = torch.tensor([[2.0, 3.0], [torch.nan, 0.0]])
    offsets = torch.tensor([[0.0, 0.0], [1.0, 5.0]], dtype=torch.float64)
    sq, lowest, nearest = reference.whitened_sq_distance(x, whitening, torch.tensor([1.0, 1.0]), offsets)
    assert sq[0].tolist() == [1 + 25, 0]
    assert sq[1].tolist() == [torch.inf, torch.inf]
    assert lowest.tolist() == [0, torch.inf]
    assert nearest.tolist() == [1, 0]
