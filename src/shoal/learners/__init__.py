"""What trains and evaluates a model on one client's data, one file a framework."""

from shoal.learners.base import Learner

__all__ = ["Learner"]
