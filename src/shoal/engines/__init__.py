"""Where a cohort runs."""

from shoal.engines.base import ClientResult, ClientTask, Engine
from shoal.engines.choice import ENGINES, choose_engine
from shoal.engines.sequential import SequentialEngine

__all__ = ["ENGINES", "ClientResult", "ClientTask", "Engine", "SequentialEngine", "choose_engine"]
