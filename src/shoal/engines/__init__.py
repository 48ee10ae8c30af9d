"""Where a cohort runs."""

from shoal.engine import BlockResult, ClientResult, ClientTask, Engine, Result, SiteEngine
from shoal.engines.accounts import one_line
from shoal.engines.choice import ENGINES, choose_engine
from shoal.engines.cohort import CohortSum, Outcome
from shoal.engines.control import ALARM
from shoal.engines.distributed import DistributedEngine
from shoal.engines.process import ProcessEngine
from shoal.engines.sequential import SequentialEngine
from shoal.engines.sites import SitesEngine
from shoal.engines.vectorized import VectorizedEngine
from shoal.engines.workers import Workers, launched_workers, restarted

__all__ = [
    "ALARM",
    "ENGINES",
    "BlockResult",
    "ClientResult",
    "ClientTask",
    "CohortSum",
    "DistributedEngine",
    "Engine",
    "Outcome",
    "ProcessEngine",
    "Result",
    "SequentialEngine",
    "SiteEngine",
    "SitesEngine",
    "VectorizedEngine",
    "Workers",
    "choose_engine",
    "launched_workers",
    "one_line",
    "restarted",
]
