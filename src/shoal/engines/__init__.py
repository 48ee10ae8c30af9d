"""Where a cohort runs."""

from shoal.engines.base import BlockResult, ClientResult, ClientTask, Engine, Result
from shoal.engines.choice import ENGINES, choose_engine
from shoal.engines.cohort import CohortSum, Outcome
from shoal.engines.sequential import SequentialEngine
from shoal.engines.vectorized import VectorizedEngine

__all__ = [
    "ENGINES",
    "BlockResult",
    "ClientResult",
    "ClientTask",
    "CohortSum",
    "Engine",
    "Outcome",
    "Result",
    "SequentialEngine",
    "VectorizedEngine",
    "choose_engine",
]
