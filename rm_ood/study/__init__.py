"""Shift studies: how accuracy, calibration and detection of a reward model change off its own ground.

`pairs` reads the rows, `shifts` changes them, `metrics` makes the numbers, `plots` the drawings.
"""

from rm_ood.study.conversations import Conversation, conversations, random_replies
from rm_ood.study.metrics import (
    auroc,
    confidence,
    ece,
    energy_score,
    fpr95_id_positive,
    fpr95_ood_positive,
    pair_accuracy,
    tie_count,
)
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.shifts import (
    Condition,
    ShiftContext,
    conditions,
    paper_word_perturbation,
    registered_shifts,
    shift,
    word_perturbation,
)

__all__ = [
    "Condition",
    "Conversation",
    "Pair",
    "ShiftContext",
    "auroc",
    "conditions",
    "confidence",
    "conversations",
    "ece",
    "energy_score",
    "fpr95_id_positive",
    "fpr95_ood_positive",
    "pair_accuracy",
    "paper_word_perturbation",
    "random_replies",
    "read_pairs",
    "registered_shifts",
    "shift",
    "tie_count",
    "word_perturbation",
]
