"""Training runs."""

from qlora.training.assemble import RunPlan
from qlora.training.callbacks import Callback, StopTraining
from qlora.training.check_resume import ResumeCheck, check_resume
from qlora.training.estimation import estimate
from qlora.training.evaluation import EvaluationReport, evaluate
from qlora.training.preview import Preview, preview
from qlora.training.replay import ReplayReport, replay
from qlora.training.run import RunResult, plan_run, train

__all__ = [
    "Callback",
    "EvaluationReport",
    "Preview",
    "ReplayReport",
    "ResumeCheck",
    "RunPlan",
    "RunResult",
    "StopTraining",
    "check_resume",
    "estimate",
    "evaluate",
    "plan_run",
    "preview",
    "replay",
    "train",
]
