"""Shift studies: how accuracy, calibration and detection of a reward model change off its own ground.

`pairs` reads the rows, `shifts` changes them; `metrics` has the numbers of reward pairs, `detection` those of OOD scores,
`bootstrap` their intervals; `scorer` scores each text once, `study` puts all of it together, `report` and `plots` show it.
"""

from rm_ood.study.bootstrap import auroc_interval, clustered_interval, ece_interval
from rm_ood.study.conversations import Conversation, conversations, random_replies
from rm_ood.study.detection import aupr, auroc, flag_rate, fpr95_id_positive, fpr95_ood_positive, roc_curve
from rm_ood.study.metrics import (
    confidence,
    ece,
    energy_score,
    fit_temperature,
    max_softmax_score,
    mce,
    pair_accuracy,
    pair_metrics,
    reliability_curve,
    risk_coverage,
    selective_metrics,
    tie_count,
)
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.scorer import Scorer
from rm_ood.study.shifts import (
    Condition,
    ShiftContext,
    conditions,
    paper_word_perturbation,
    registered_shifts,
    shift,
    word_perturbation,
)
from rm_ood.study.study import Study, run_study

__all__ = [
    "Condition",
    "Conversation",
    "Pair",
    "Scorer",
    "ShiftContext",
    "Study",
    "aupr",
    "auroc",
    "auroc_interval",
    "clustered_interval",
    "conditions",
    "confidence",
    "conversations",
    "ece",
    "ece_interval",
    "energy_score",
    "fit_temperature",
    "flag_rate",
    "fpr95_id_positive",
    "fpr95_ood_positive",
    "max_softmax_score",
    "mce",
    "pair_accuracy",
    "pair_metrics",
    "paper_word_perturbation",
    "random_replies",
    "read_pairs",
    "registered_shifts",
    "reliability_curve",
    "risk_coverage",
    "roc_curve",
    "run_study",
    "selective_metrics",
    "shift",
    "tie_count",
    "word_perturbation",
]
