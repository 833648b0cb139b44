"""Out-of-distribution detection for reward models.

    preference data -> text -> reward model -> embeddings -> moments -> covariance -> detector -> OOD scores
                                                                                                      |
                            best-of-n, RL, serving, study <- decision <- calibration (conformal) <----+

`OODGuard` wraps a reward model; everything right of the embeddings works on vectors that came from anywhere.
"""

from importlib.metadata import PackageNotFoundError, version

from rm_ood.batch_tests import BatchTest, batch_test
from rm_ood.calibration import CalibrationTable
from rm_ood.card import GuardCard
from rm_ood.channels import Channel
from rm_ood.client import GuardClient
from rm_ood.config import GuardConfig
from rm_ood.conformal import ConformalCalibrator
from rm_ood.decision import AxisDecision, ChannelDecision, Decision, Decisions
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.dialogue import Dialogue
from rm_ood.errors import (
    CalibrationError,
    CalibrationWarning,
    CaptureError,
    EngineError,
    FormatError,
    InputError,
    IntegrityError,
    MismatchError,
    NonFiniteError,
    NotFittedError,
    OODGuardError,
    OODGuardWarning,
    SaveError,
    TokenisationWarning,
    UnavailableError,
)
from rm_ood.flag_rate import FlagRate
from rm_ood.guard import OODGuard
from rm_ood.moments import ClassMoments
from rm_ood.monitor import TrafficMonitor
from rm_ood.monitor_state import AxisEvidence, MonitorState
from rm_ood.penalty import RewardPenalty
from rm_ood.readers import RewardReader, register_reader
from rm_ood.recalibration import Recalibration
from rm_ood.selection import BestOfN, Regret, Winners, best_of_n, id_regret
from rm_ood.suspects import Suspect
from rm_ood.turns import TurnScore

try:
    __version__ = version("rm_ood")
except PackageNotFoundError:
    # Imported from a source tree that was not installed.
    __version__ = "0.0.0+source"

__all__ = [
    "AxisDecision",
    "AxisEvidence",
    "BatchTest",
    "BestOfN",
    "CalibrationError",
    "CalibrationTable",
    "CalibrationWarning",
    "CaptureError",
    "Channel",
    "ChannelDecision",
    "ClassMoments",
    "ConformalCalibrator",
    "Decision",
    "Decisions",
    "Dialogue",
    "EngineError",
    "FlagRate",
    "FormatError",
    "GuardCard",
    "GuardClient",
    "GuardConfig",
    "InputError",
    "IntegrityError",
    "MahalanobisDetector",
    "MismatchError",
    "MonitorState",
    "NonFiniteError",
    "NotFittedError",
    "OODGuard",
    "OODGuardError",
    "OODGuardWarning",
    "Recalibration",
    "Regret",
    "RewardPenalty",
    "RewardReader",
    "SaveError",
    "Suspect",
    "TokenisationWarning",
    "TrafficMonitor",
    "TurnScore",
    "UnavailableError",
    "Winners",
    "__version__",
    "batch_test",
    "best_of_n",
    "id_regret",
    "register_reader",
]
