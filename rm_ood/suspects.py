"""High rewards that the guard does not believe: a list to read every morning while a policy learns."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from rm_ood.decision import Decision
from rm_ood.dialogue import Response, Text
from rm_ood.errors import InputError
from rm_ood.fitting import WINDOW_BATCHES, windows
from rm_ood.preferences import named_items
from rm_ood.rows import dataset_length, iter_rows
from rm_ood.scoring import Scoring

Floats = NDArray[np.float64]
OFF_SUPPORT, REJECTED_LIKE = "off_support", "rejected_like"


@dataclass(frozen=True)
class Suspect:
    """One item whose reward is high while the guard disagrees.

    Attributes:
        id: the row's id or number, with `#chosen` and the like for a preference row.
        reasons: `"off_support"`: flagged as out-of-distribution; `"rejected_like"`: nearer to the rejected responses of the fit
            data than to the chosen ones, on the vector that the reward is read from.
        suspicion: -log10 of the share of the items that are as strange, or as rejected-like for their reward, whichever is
            smaller: 2 is the odd one in a hundred.
    """

    id: str
    prompt: Text = field(repr=False)
    response: Response = field(repr=False)
    reward: float
    suspicion: float
    reasons: tuple[str, ...]
    decision: Decision = field(repr=False)


def find_suspects(
    scoring: Scoring, dataset: Any, k: int, *, share: float = 0.25, progress: bool = False
) -> list[Suspect]:
    """The k most suspicious of the items with a high reward, most suspicious first; see `OODGuard.suspects`.

    Texts and verdicts of the whole dataset are kept while this runs, vectors are not.

    Args:
        scoring: the guard on its model.
        dataset: rows as `calibrate` takes them.
        share: items that count as highly rewarded, a fraction of the dataset's in (0, 1].
    """
    if k < 1 or not 0 < share <= 1:
        raise InputError(f"suspects: k={k}, share={share}: expected at least 1 item, and a share in (0, 1]")
    c = scoring.state.config
    # A guard that is not calibrated says so before the forwards, not after.
    scoring.state.profile(c.joined)
    column, reader = c.group_column, c.reader(labelled=False)
    # What is read here is no traffic.
    scoring = replace(scoring, ends=copy(scoring.ends))
    named, verdicts = [], []
    with tqdm(total=dataset_length(dataset), desc="suspects", unit="row", disable=not progress) as bar:
        for window in windows(named_items(iter_rows(dataset), reader, bar.update), c.batch_size * WINDOW_BATCHES):
            items = [item for _, item in window]
            scored, part = scoring.score(scoring.encode([(item.prompt, item.response) for item in items]))
            groups = None if column is None else [str(item.group) for item in items]
            named += window
            verdicts += list(scoring.state.decide(scored, part, groups=groups))
    rewards = np.array([d.reward for d in verdicts])
    finite = np.isfinite(rewards)
    if not finite.any():
        return []
    odds = np.array([math.nan if d.class_log_odds is None else d.class_log_odds for d in verdicts])
    strange = _rarity(np.array([max(axis.ood_score for axis in d.axes.values()) for d in verdicts]))
    unlike = _rarity(-_beyond_reward(odds, rewards))
    suspicion = -np.log10(np.fmin(strange, unlike))
    bar_at = np.quantile(rewards[finite], 1 - share)
    found = []
    for i in np.lexsort((-np.where(finite, rewards, -np.inf), -suspicion)):
        decision, (name, item) = verdicts[i], named[i]
        reasons = (*([OFF_SUPPORT] if decision.is_ood else []), *([REJECTED_LIKE] if odds[i] < 0 else []))
        if finite[i] and rewards[i] >= bar_at and reasons:
            reward = float(rewards[i])
            found.append(Suspect(name, item.prompt, item.response, reward, float(suspicion[i]), reasons, decision))
        if len(found) == k:
            break
    return found


def _rarity(values: Floats) -> Floats:
    """Share of the items with a value as large, (n,) in (0, 1]; NaN counts as no news, infinity as the largest."""
    known = np.sort(values[~np.isnan(values)])
    above = known.size - np.searchsorted(known, values, side="left")
    return np.where(np.isnan(values), 1.0, (np.maximum(above, 1)) / max(known.size, 1))


def _beyond_reward(odds: Floats, rewards: Floats) -> Floats:
    """Class log-odds less what a straight line over the items expects at the reward; NaN where either is missing."""
    both = np.isfinite(odds) & np.isfinite(rewards)
    if both.sum() < 3 or np.ptp(rewards[both]) == 0:
        return np.where(both, odds, np.nan)
    slope, shift = np.polyfit(rewards[both], odds[both], 1)
    with np.errstate(invalid="ignore"):
        return np.where(both, odds - slope * rewards - shift, np.nan)
