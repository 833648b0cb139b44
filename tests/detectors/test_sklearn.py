import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone

from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.detectors.sklearn import MahalanobisOutlier
from rm_ood.errors import InputError

CHECK = """
import json, sys, warnings
warnings.simplefilter("ignore")
from sklearn.utils.estimator_checks import check_estimator
from rm_ood.detectors.sklearn import MahalanobisOutlier
results = check_estimator(MahalanobisOutlier(), on_fail=None, on_skip=None)
print(json.dumps([[r["check_name"], r["status"], str(r["exception"])] for r in results]))
"""


def data(seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(300) % 2
    return rng.normal(size=(300, 4)) * [1, 2, 3, 4] + 5 * y[:, None], np.array(["chosen", "rejected"])[y]


def test_every_check_of_scikit_learn_passes():
    # A process of its own: SciPy reads the variable when it is first imported.
    environment = os.environ | {"SCIPY_ARRAY_API": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [r for r in results if r[1] != "passed"] == []
    assert len(results) >= 40


@pytest.mark.parametrize("labelled", [False, True])
def test_scores_are_the_detectors_with_the_other_sign(labelled):
    x, y = data()
    y = y if labelled else None
    probe = data(seed=1)[0]
    estimator = MahalanobisOutlier(shrinkage=0.2).fit(x, y)
    expected = MahalanobisDetector(shrinkage=0.2, dtype=torch.float64).fit(x, y)
    np.testing.assert_array_equal(estimator.score_samples(probe), -expected.score(probe).numpy())
    assert estimator.shrinkage_ == 0.2
    assert estimator.classes_.tolist() == (["chosen", "rejected"] if labelled else [0])
    assert estimator.means_.shape == (2 if labelled else 1, 4)


def test_predictions_follow_the_contamination():
    x, y = data()
    estimator = MahalanobisOutlier(contamination=0.1).fit(x, y)
    assert (estimator.predict(x) == -1).sum() == 30
    np.testing.assert_array_equal(estimator.predict(x) == -1, estimator.decision_function(x) < 0)
    far = np.full((1, 4), 100.0)
    assert estimator.predict(far).tolist() == [-1]
    assert estimator.decision_function(x).mean() > estimator.decision_function(far).item()


def test_pickled_memory_mapped_and_cloned():
    x, y = data()
    estimator = MahalanobisOutlier().fit(x, y)
    copied = pickle.loads(pickle.dumps(estimator))
    copied.whitening_.flags.writeable = False  # as after a memory-mapped load
    np.testing.assert_array_equal(copied.score_samples(x), estimator.score_samples(x))
    assert not hasattr(clone(estimator), "offset_")


@pytest.mark.parametrize("contamination", [0, -0.1, 0.51, float("nan")])
def test_contamination_is_checked(contamination):
    with pytest.raises(InputError, match="contamination"):
        MahalanobisOutlier(contamination=contamination).fit(*data())
