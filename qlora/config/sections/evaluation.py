"""The section `eval`, when a run stops early, and samples: what a run is judged by while it trains."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from qlora.config.sections.base import Section
from qlora.config.sections.values import Count, Names, PathText, ShareOrSteps

# Metrics of answers; any other one is a function in a Python file, `path/to/file.py:function`.
ANSWER_METRICS = ("exact_match", "contains", "accuracy", "macro_f1", "f1", "chrf", "bleu")
USER_METRIC = re.compile(r"(?P<path>.+\.py):(?P<function>[A-Za-z_]\w*)", re.ASCII)


def metric_name(metric: str) -> str:
    """Return the name under which a metric of answers is logged: that of the function if it is in a file."""
    found = USER_METRIC.fullmatch(metric)
    return metric if found is None else found["function"]


def _check_metrics(value: list[str]) -> list[str]:
    for metric in value:
        if metric not in ANSWER_METRICS and USER_METRIC.fullmatch(metric) is None:
            raise ValueError(
                f"{metric!r:.80} is unknown; use {', '.join(ANSWER_METRICS)}, or a function of yours, as "
                "path/to/file.py:function"
            )
    names = [metric_name(metric) for metric in value]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"has two metrics named {name}; remove or rename one")
        if name not in value and name in ("loss", "perplexity", "supervised_tokens", *ANSWER_METRICS):
            raise ValueError(f"has a function named {name}, which is the name of another metric; rename it")
    return value


class EvalSection(Section):
    """Metrics of the answers that the model gives to held-out rows, at every evaluation."""

    metrics: Annotated[Names, AfterValidator(_check_metrics)] = Field(
        default=[],
        description="Metrics of greedy answers, compared with those of the rows: exact_match, contains, accuracy, "
        "macro_f1, f1, chrf, bleu, or a function of yours as path/to/file.py:function, which is run. Without any, "
        "nothing is generated.",
        examples=[["exact_match", "chrf"]],
    )
    rows: Count = Field(
        default=200,
        description="Largest number of rows of each held-out set that are answered.",
        examples=[50],
    )
    max_new_tokens: Count = Field(
        default=128,
        description="Largest number of tokens in an answer.",
        examples=[512],
    )


class SamplesSection(Section):
    """Greedy answers to a few prompts, which show what a run learns while it trains."""

    prompts: Count | PathText = Field(
        default=4,
        description="Number of held-out rows that are asked, or a file of prompts as for qlora generate --prompts.",
        examples=["data/prompts.jsonl"],
    )
    every: ShareOrSteps = Field(
        default=0.25,
        description="Interval between samples: steps, or with a dot and up to 1.0 a share of the run; null takes them "
        "before the first step and after the last.",
        examples=[100],
    )
    max_new_tokens: Count = Field(default=128, description="Largest number of tokens in an answer.", examples=[256])


class EarlyStoppingSection(Section):
    """When a run ends before its last step, because evaluations no longer improve."""

    metric: str = Field(
        default="eval_loss",
        description="Metric of the evaluations, by its name in metrics.jsonl; see train.best_mode.",
        examples=["eval_exact_match"],
    )
    patience: Count = Field(
        default=3,
        description="Number of evaluations in a row without an improvement after which the run stops.",
        examples=[5],
    )
    min_delta: float = Field(
        default=0.0,
        ge=0,
        description="Least change of the metric that is an improvement.",
        examples=[0.001],
    )
