"""Shift studies: how accuracy, calibration and detection of a reward model change off its own ground.

`shifts` makes the data, `metrics` the numbers, `plots` the drawings.
"""

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
from rm_ood.study.shifts import Conversation, conversations, random_replies, word_perturbation

__all__ = [
    "Conversation",
    "auroc",
    "confidence",
    "conversations",
    "ece",
    "energy_score",
    "fpr95_id_positive",
    "fpr95_ood_positive",
    "pair_accuracy",
    "random_replies",
    "tie_count",
    "word_perturbation",
]
