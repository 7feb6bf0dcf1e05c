"""Which tile each convolution of a workload gets on the card at hand: proved first, then timed, then remembered."""

from .problems import Problem, problem
from .search import Tuned, tune
from .workload import Tuning, tune_workload

__all__ = ["Problem", "Tuned", "Tuning", "problem", "tune", "tune_workload"]
