"""Training runs."""

from qlora.training.run import RunResult, plan_run, train

__all__ = ["RunResult", "plan_run", "train"]
