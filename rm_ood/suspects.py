"""High rewards that the guard does not believe: a list to read every morning while a policy learns."""

from __future__ import annotations

import math
from collections import Counter
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from rm_ood.decision import Decision
from rm_ood.dialogue import Response, Text, response_text
from rm_ood.errors import InputError
from rm_ood.fitting import WINDOW_BATCHES, windows
from rm_ood.preferences import named_items
from rm_ood.rows import dataset_length, iter_rows
from rm_ood.scoring import Scoring

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
OFF_SUPPORT, REJECTED_LIKE = "off_support", "rejected_like"


@dataclass(frozen=True)
class Suspect:
    """One item whose reward is high while the guard disagrees.

    Attributes:
        id: the row's id or number, with `#chosen` and the like for a preference row.
        reasons: `"off_support"`: flagged as out-of-distribution; `"rejected_like"`: nearer to the rejected responses of the fit
            data than to the chosen ones, on the vector that the reward is read from.
        suspicion: 2 is the odd one in a hundred, by the reasons that are named, the larger of the two: -log10 of the guard's
            p-value, off support; -log10 of the share of the distinct responses that are as rejected-like for their reward.
        count: items of the dataset with this very response, of which this is the most suspicious.
    """

    id: str
    prompt: Text = field(repr=False)
    response: Response = field(repr=False)
    reward: float
    suspicion: float
    reasons: tuple[str, ...]
    decision: Decision = field(repr=False)
    count: int = 1


def find_suspects(
    scoring: Scoring, dataset: Any, k: int, *, share: float = 0.25, progress: bool = False
) -> list[Suspect]:
    """The k most suspicious of the items with a high reward, most suspicious first; see `OODGuard.suspects`.

    Flagged items come first. How strange one is, is told by the calibration, not by the dataset: a policy that has collapsed
    makes what it says common. Equal responses are one suspect, with their count.

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
    texts = [response_text(item.response) for _, item in named]
    counts, first = Counter(texts), {text: i for i, text in reversed(list(enumerate(texts)))}
    once = np.array(sorted(first.values()))
    unlike = -np.log10(_rarity(-_beyond_reward(odds, rewards, once), once))
    flagged = np.array([d.is_ood for d in verdicts])
    strange = -np.log10([d.p_value for d in verdicts])
    suspicion = np.fmax(np.where(flagged, strange, 0.0), np.where(odds < 0, unlike, 0.0))
    # Beyond the calibration scores all p-values are one.
    scores = np.array([max(axis.ood_score for axis in d.axes.values()) for d in verdicts])
    scores = np.where(np.isfinite(scores), scores, np.inf)
    bar_at = np.quantile(rewards[finite], 1 - share)
    found: dict[str, Suspect] = {}
    for i in np.lexsort((-np.where(finite, rewards, -np.inf), -scores, -suspicion, ~flagged)):
        decision, (name, item) = verdicts[i], named[i]
        reasons = (*([OFF_SUPPORT] if flagged[i] else []), *([REJECTED_LIKE] if odds[i] < 0 else []))
        if finite[i] and rewards[i] >= bar_at and reasons and texts[i] not in found:
            found[texts[i]] = Suspect(
                name,
                item.prompt,
                item.response,
                float(rewards[i]),
                float(suspicion[i]),
                reasons,
                decision,
                counts[texts[i]],
            )
        if len(found) == k:
            break
    return list(found.values())


def _rarity(values: Floats, among: Ints) -> Floats:
    """Share of the items `among` with a value as large, (n,) in (0, 1]; NaN counts as no news, infinity as the largest."""
    known = np.sort(values[among][~np.isnan(values[among])])
    above = known.size - np.searchsorted(known, values, side="left")
    return np.where(np.isnan(values), 1.0, (np.maximum(above, 1)) / max(known.size, 1))


def _beyond_reward(odds: Floats, rewards: Floats, among: Ints) -> Floats:
    """Class log-odds less what a straight line over the items `among` expects at the reward; NaN where either is missing."""
    both = np.isfinite(odds) & np.isfinite(rewards)
    line = among[both[among]]
    if line.size < 3 or np.ptp(rewards[line]) == 0:
        return np.where(both, odds, np.nan)
    slope, shift = np.polyfit(rewards[line], odds[line], 1)
    with np.errstate(invalid="ignore"):
        return np.where(both, odds - slope * rewards - shift, np.nan)
