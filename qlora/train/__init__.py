"""Training runs."""

from qlora.train.run import RunResult, plan_run, train

__all__ = ["RunResult", "plan_run", "train"]
