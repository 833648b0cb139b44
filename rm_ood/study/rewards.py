"""What a pair of rewards says by itself: which response wins, how surely, and how far off the pair looks.

Rewards come as (n,) chosen and (n,) rejected, any unit. Scores are larger for more out-of-distribution.

Reference:
    LeVine et al., "A baseline analysis of reward models' ability to accurately analyze foundation models under
    distribution shift", arXiv 2311.14743, 2023, and its released code.
    Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rm_ood.errors import InputError, NonFiniteError

Floats = NDArray[np.float64]

_TIES = ("half", "correct")


def pair_accuracy(chosen: ArrayLike, rejected: ArrayLike, ties: str = "half") -> float:
    """Share of pairs in which the chosen response has the larger reward.

    Args:
        chosen: (n,) rewards of the chosen responses.
        rejected: (n,) rewards of the rejected responses.
        ties: what equal rewards count: `"half"`, or `"correct"` (an argmax that returns index 0, as in the paper).

    Returns:
        A fraction in [0, 1].

    Raises:
        InputError: no pair, unequal lengths, or an unknown `ties`.
        NonFiniteError: a reward that is NaN or infinite.
    """
    return float(pair_credits(chosen, rejected, ties).mean())


def pair_credits(chosen: ArrayLike, rejected: ArrayLike, ties: str = "half") -> Floats:
    """1 where the chosen response wins, 0 where it loses, (n,); a tie counts as `ties` says. Raises as `pair_accuracy`."""
    if ties not in _TIES:
        raise InputError(f"ties={ties!r}: expected one of {_TIES}")
    c, r = pair_vectors(chosen, rejected)
    return np.where(c == r, 0.5 if ties == "half" else 1.0, c > r)


def tie_count(chosen: ArrayLike, rejected: ArrayLike) -> int:
    """Number of pairs with exactly equal rewards: state it beside any accuracy. Raises as `pair_accuracy`."""
    c, r = pair_vectors(chosen, rejected)
    return int((c == r).sum())


def margins(chosen: ArrayLike, rejected: ArrayLike) -> Floats:
    """Chosen minus rejected reward, (n,): positive is right; past the largest float it is infinite.

    Raises:
        InputError, NonFiniteError: as `pair_accuracy`.
    """
    c, r = pair_vectors(chosen, rejected)
    with np.errstate(over="ignore"):
        return np.asarray(c - r, dtype=np.float64)


def confidence(chosen: ArrayLike, rejected: ArrayLike, temperature: float = 1.0) -> Floats:
    """Bradley-Terry probability of the response with the larger reward, (n,) in [.5, 1].

    Args:
        chosen: (n,) rewards of the chosen responses.
        rejected: (n,) rewards of the rejected responses.
        temperature: what rewards are divided by first; infinity leaves .5 everywhere.

    Raises:
        InputError: as `pair_accuracy`, or a temperature that is not positive.
        NonFiniteError: a reward that is NaN or infinite.
    """
    if not temperature > 0:
        raise InputError(f"temperature={temperature}: expected a positive temperature")
    # A difference past the largest float is infinite, and its confidence 1, as it should be.
    difference = np.minimum(np.abs(margins(chosen, rejected)), np.finfo(np.float64).max)
    with np.errstate(over="ignore"):
        return np.asarray(special.expit(difference / temperature), dtype=np.float64)


def energy_score(chosen: ArrayLike, rejected: ArrayLike, T: float = 1.0) -> Floats:
    """Energy of a pair, -T logsumexp([chosen, rejected] / T), (n,); larger = more out-of-distribution.

    The paper's detector: one score per pair, from the rewards alone, the same for both orders, close to minus the
    larger reward.

    Raises:
        InputError: no pair, unequal lengths, or a temperature that is not positive.
        NonFiniteError: a reward that is NaN or infinite.
    """
    if not (math.isfinite(T) and T > 0):
        raise InputError(f"T={T}: expected a positive temperature")
    c, r = pair_vectors(chosen, rejected)
    # The larger reward plus a rest in [0, T log 2]; an infinite difference leaves the larger reward alone.
    with np.errstate(over="ignore"):
        return np.asarray(-np.maximum(c, r) - T * np.log1p(np.exp(-np.abs(c - r) / T)), dtype=np.float64)


def max_softmax_score(chosen: ArrayLike, rejected: ArrayLike) -> Floats:
    """Minus the margin's size, (n,) at most 0; larger = more out-of-distribution.

    Ranks pairs exactly as minus their `confidence` does (the paper's MSP detector), and still tells pairs apart whose
    confidence has rounded to 1. Raises as `pair_accuracy`.
    """
    return -np.abs(margins(chosen, rejected))


def pair_vectors(chosen: ArrayLike, rejected: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float64 vectors of one length, or the errors of `pair_accuracy`."""
    c, r = vector(chosen, "chosen"), vector(rejected, "rejected")
    if len(c) != len(r):
        raise InputError(f"rewards: expected as many chosen as rejected, got {len(c)} and {len(r)}")
    for name, values in (("chosen", c), ("rejected", r)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise NonFiniteError(
                f"{name}: {bad.size} of {len(values)} rewards are NaN or infinite (rows {bad[:10].tolist()}). "
                "Leave those pairs out, and say how many they were."
            )
    return c, r


def vector(values: ArrayLike, name: str) -> Floats:
    """A float64 vector of at least one value, or an `InputError` that names it."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name}: expected a vector of at least one value, got shape {array.shape}")
    return array
