"""Training runs."""

from qlora.training.callbacks import Callback, StopTraining
from qlora.training.check_resume import ResumeCheck, check_resume
from qlora.training.estimation import estimate
from qlora.training.evaluation import EvaluationReport, evaluate
from qlora.training.plan import RunPlan
from qlora.training.preview import Preview, preview
from qlora.training.release import merge
from qlora.training.replay import ReplayReport, replay
from qlora.training.run import RunResult, plan_run, train
from qlora.training.tune import RateTrial, TuneReport, tune

__all__ = [
    "Callback",
    "EvaluationReport",
    "Preview",
    "RateTrial",
    "ReplayReport",
    "ResumeCheck",
    "RunPlan",
    "RunResult",
    "StopTraining",
    "TuneReport",
    "check_resume",
    "estimate",
    "evaluate",
    "merge",
    "plan_run",
    "preview",
    "replay",
    "train",
    "tune",
]
