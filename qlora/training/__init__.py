"""Training runs."""

from qlora.training.assemble import RunPlan
from qlora.training.preview import Preview, preview
from qlora.training.run import RunResult, plan_run, train

__all__ = ["Preview", "RunPlan", "RunResult", "plan_run", "preview", "train"]
