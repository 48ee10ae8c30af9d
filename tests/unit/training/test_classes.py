from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.training.classes import class_reports

metrics = pytest.importorskip("sklearn.metrics")


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_reports_are_those_of_scikit_learn(classes, examples, seed):
    rng = np.random.default_rng(seed)
    labels, taken = rng.integers(classes, size=(2, examples))
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, taken), 1)
    expected = metrics.precision_recall_fscore_support(labels, taken, labels=range(classes), zero_division=0.0)
    found = [[getattr(report, name) for report in class_reports(confusion)] for name in ("precision", "recall", "f1")]
    np.testing.assert_allclose(found, expected[:3])
    assert [report.examples for report in class_reports(confusion)] == expected[3].tolist()


def test_a_class_that_never_comes_has_zeros_and_no_warning():
    empty = class_reports(np.array([[3, 0], [0, 0]]))[1]
    assert (empty.label, empty.precision, empty.recall, empty.f1, empty.examples) == (1, 0.0, 0.0, 0.0, 0)
