"""Bets against clean traffic whose evidence may be watched for ever: Pólya bets with restarts.

n calibration scores and the traffic's scores are exchangeable while the traffic is clean. How many of t requests fall
beyond the k-th largest calibration score then follows a Pólya urn, whatever the scores' law: after C hits in t requests
the next one hits with probability rho = (k + C) / (n + 1 + t), exactly. A bet that multiplies by q / rho on a hit and by
(1 - q) / (1 - rho) otherwise is fair given the past. Ranks against a fixed calibration set that are betted on as if they
were independent are not: such bets learn the calibration set's own error and alarm on clean traffic.

Reference:
    Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005 (test martingales, exchangeability).
    Shin, Ramdas, Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_ood.calibration import splitmix64
from rm_ood.conformal import sorted_scores
from rm_ood.errors import CalibrationError, FormatError

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
LEVELS = (0.01, 0.05, 0.2)
# Low scores are watched at the wider levels only: one in a hundred smallest scores says little.
LOW_LEVELS = (0.05, 0.2)
RATIOS = (1.5, 2.0, 4.0, 8.0, 16.0)
_HIGHEST = 0.9
_CLIP = 1e290
_BLOCK, _STEP = 256, 16
# Requests that are laid out as arrays at once: some ten numbers for each bet.
_CHUNK = 16_384
LARGER, SMALLER = "larger", "smaller"


def tie_keys(count: int, start: int, seed: int) -> Words:
    """Seeded noise that breaks ties between equal scores, (count,) uint64: the same for the same places in the stream."""
    return splitmix64(np.arange(start, start + count, dtype=np.uint64) ^ _salt(seed))


@lru_cache(maxsize=64)
def _salt(seed: int) -> np.uint64:
    return np.uint64(splitmix64(np.array([seed % 2**64], dtype=np.uint64))[0])


class Wealth:
    """What B fair bets have made, each of them begun anew at every request.

    `ever` holds bets that are financed from a capital of 1, the share 1 / ((t + e) ln(t + e)^2) at request t: the evidence
    is a nonnegative martingale from 1, so that it ever reaches A with probability at most 1 / A (Ville). `recent` gets 1
    at every request (Shiryaev-Roberts): reaching A takes A requests on average at least, and happens within T requests
    with probability at most T / A.
    """

    def __init__(self, bets: int) -> None:
        self.t = 0
        self.cash = 1.0
        # (B,) capital where the evidence first reached its limit, and where `recent` last did, in the last `advance`.
        self.reached: Floats | None = None
        self.fired: Floats | None = None
        # Both kinds side by side: one array operation for the two of them.
        self._both = np.zeros(2 * bets)

    @property
    def ever(self) -> Floats:
        """(B,) capital of the bets that are financed from 1."""
        return self._both[: self._both.size // 2]

    @property
    def recent(self) -> Floats:
        """(B,) capital of the bets that get 1 at every request."""
        return self._both[self._both.size // 2 :]

    @property
    def evidence(self) -> float:
        """Evidence that some request so far began a change; 1 at the start."""
        return self.evidence_of(slice(None))

    @property
    def recent_evidence(self) -> float:
        """Mean of `recent`."""
        return float(_mean(self.recent))

    def evidence_of(self, bets: slice) -> float:
        """The same by some of the bets alone."""
        return float(_mean(self.ever[bets])) + self.cash

    def advance(self, factors: Floats, limit: float, ever: float = math.inf) -> tuple[Floats, Floats]:
        """Play m requests; `recent` starts anew after a request at which its mean reaches `limit`.

        Args:
            factors: (m, B) what each bet multiplies by at each request.
            ever: the evidence at which the capital is kept, in `reached`.
        Returns:
            Evidence and mean of `recent` after each request, (m,) each.
        """
        evidence, recent = np.empty(len(factors)), np.empty(len(factors))
        at, size = 0, _BLOCK
        self.reached = self.fired = None
        while at < len(factors):
            e, r = self._block(factors[at : at + size], limit, ever)
            evidence[at : at + len(e)], recent[at : at + len(e)] = e, r
            at += len(e)
            # What follows an alarm is played again: in small steps, for the next one is near.
            size = _STEP if r[-1] >= limit else min(2 * size, _BLOCK)
        return evidence, recent

    def _block(self, factors: Floats, limit: float, ever: float) -> tuple[Floats, Floats]:
        """Play requests up to the first at which `recent` reaches the limit: evidence and mean of `recent` after each."""
        m, bets = factors.shape
        gains, cash = np.ones((m, 2 * bets)), np.empty(m)
        left = self.cash
        for i in range(m):
            x = self.t + i + 1 + math.e
            share = 1 / (x * math.log(x) ** 2)
            left -= share
            cash[i] = left
            gains[i, :bets] = share
        both = np.concatenate([factors, factors], axis=1)
        before, played = self._both, np.empty((m, 2 * bets))
        for gain, factor, after in zip(gains, both, played, strict=True):
            np.add(before, gain, out=after)
            np.multiply(after, factor, out=after)
            np.minimum(after, _CLIP, out=after)
            before = after
        recent = _mean(played[:, bets:])
        fired = np.flatnonzero(recent >= limit)
        last = int(fired[0]) if fired.size else m - 1
        self.t += last + 1
        self.cash = float(cash[last])
        self._both = played[last].copy()
        if fired.size:
            self.fired = played[last, bets:].copy()
            self.recent[:] = 0
        evidence = _mean(played[: last + 1, :bets]) + cash[: last + 1]
        reached = np.flatnonzero(evidence >= ever)
        if self.reached is None and reached.size:
            self.reached = played[reached[0], :bets].copy()
        return evidence, recent[: last + 1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able state; floats come back bit for bit."""
        return {"t": self.t, "cash": self.cash, "ever": self.ever.tolist(), "recent": self.recent.tolist()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up the state that `to_dict` gave.

        Raises:
            FormatError: not the state of as many bets.
        """
        ever, recent = (np.array(saved[name], dtype=np.float64) for name in ("ever", "recent"))
        if ever.shape != self.ever.shape or recent.shape != ever.shape or min(ever.min(), recent.min()) < 0:
            raise FormatError(f"saved bets: expected {self.ever.size} of each kind, none negative")
        self.t, self.cash, self._both = int(saved["t"]), float(saved["cash"]), np.concatenate([ever, recent])


class PolyaBets:
    """Bets on one score against a fixed calibration set, in both tails.

    A bet is a tail, a level a and a ratio: it hits when a score is among the floor(a (n + 1)) largest (smallest) of the
    calibration scores and itself, and says that this happens `ratio` times as often as a.

    Args:
        calibration: (n,) OOD scores of held-out in-distribution inputs; +inf allowed.
        ratios: inflations of the hit rate that are betted on. The smallest one is the tolerance: less is hardly found.
        seed: of the tie keys.

    Raises:
        CalibrationError: too few scores for any bet, or NaN or -inf among them.
    """

    def __init__(self, calibration: Floats, ratios: Sequence[float], seed: int) -> None:
        self.calibration = sorted_scores(calibration)
        n = self.calibration.size
        keys = tie_keys(n, 0, seed)
        order = np.lexsort((keys, self.calibration))
        ranks: list[int] = []
        signs: list[float] = []
        which: list[int] = []
        target: list[float] = []
        for sign, levels in ((1.0, LEVELS), (-1.0, LOW_LEVELS)):
            for level in levels:
                chances = [level * ratio for ratio in ratios if level * ratio < _HIGHEST]
                k = math.floor(level * (n + 1) + 1e-9)
                if k and chances:
                    which += [len(ranks)] * len(chances)
                    target += chances
                    ranks.append(k)
                    signs.append(sign)
        if -1.0 not in signs:
            raise CalibrationError(f"{n} calibration scores are too few to bet on both tails: need 4, better 1,000")
        self._ranks, self._signs = np.array(ranks), np.array(signs)
        at = order[[n - k if sign > 0 else k - 1 for k, sign in zip(ranks, signs, strict=True)]]
        self._scores, self._keys = self.calibration[at], keys[at]
        self._which, self._target = np.array(which), np.array(target)
        high = int(np.sum(self._signs[self._which] > 0))
        self.high, self.low = slice(0, high), slice(high, len(which))
        self.hits = np.zeros(len(ranks))
        self.wealth = Wealth(len(which))
        # Which tail had it: where the evidence first reached `ever`, and where `recent` last fired, in the last `advance`.
        self.reached_side: str | None = None
        self.fired_side: str | None = None

    def advance(self, scores: Floats, keys: Words, limit: float, ever: float = math.inf) -> tuple[Floats, Floats]:
        """Play m requests: evidence and mean of the recent bets after each, see `Wealth.advance`.

        Args:
            scores: (m,) in the unit of the calibration; what is not finite counts as the largest.
            keys: (m,) tie keys.
            limit, ever: of the recent bets and of the evidence; the tails that reached them are kept.
        """
        evidence, recent = np.empty(len(scores)), np.empty(len(scores))
        self.reached_side = self.fired_side = None
        for start in range(0, len(scores), _CHUNK):
            part = slice(start, start + _CHUNK)
            evidence[part], recent[part] = self._advance(scores[part], keys[part], limit, ever)
            self.reached_side = self.reached_side or self._side(self.wealth.reached)
            self.fired_side = self._side(self.wealth.fired) or self.fired_side
        return evidence, recent

    def _side(self, capital: Floats | None) -> str | None:
        if capital is None:
            return None
        return LARGER if _mean(capital[self.high]) >= _mean(capital[self.low]) else SMALLER

    def _advance(self, scores: Floats, keys: Words, limit: float, ever: float) -> tuple[Floats, Floats]:
        s = np.where(np.isfinite(scores), scores, np.inf)[:, None]
        equal = s == self._scores
        above, later = s > self._scores, keys[:, None] > self._keys
        below, earlier = s < self._scores, keys[:, None] < self._keys
        hit = np.where(self._signs > 0, above | (equal & later), below | (equal & earlier))
        count = self.hits + np.cumsum(hit, axis=0)
        before = count - hit
        t = np.arange(self.wealth.t, self.wealth.t + len(s))[:, None]
        rho = ((self._ranks + before) / (self.calibration.size + 1 + t))[:, self._which]
        # Never below the null: what the traffic has shown so far is its normal.
        q = np.maximum(self._target, rho)
        factors = np.where(hit[:, self._which], q / rho, (1 - q) / (1 - rho))
        self.hits = count[-1]
        return self.wealth.advance(factors, limit, ever)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"hits": [int(h) for h in self.hits], "wealth": self.wealth.to_dict()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up the state that `to_dict` gave.

        Raises:
            FormatError: not the state of these bets.
        """
        hits = np.array(saved["hits"], dtype=np.float64)
        if hits.shape != self.hits.shape or hits.min() < 0 or hits.max() > saved["wealth"]["t"]:
            raise FormatError(f"saved bets: expected {self.hits.size} counts of at most the number of requests")
        self.wealth.restore(saved["wealth"])
        self.hits = hits


def _mean(values: Floats) -> Any:
    return np.add.reduce(values, axis=-1) / values.shape[-1]
