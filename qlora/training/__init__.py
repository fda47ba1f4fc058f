"""Training runs."""

from qlora.training.assemble import RunPlan
from qlora.training.run import RunResult, plan_run, train

__all__ = ["RunPlan", "RunResult", "plan_run", "train"]
