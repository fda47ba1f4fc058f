"""The log of a run: metrics.jsonl, samples.jsonl, the display, and trackers."""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qlora.checkpoint import RunDirectory, metric_label
from qlora.files.log_file import LogFile
from qlora.model import Evaluation
from qlora.processes import Processes
from qlora.training.display import Display
from qlora.training.loop import StepReport
from qlora.training.progress import Progress
from qlora.training.samples import describe_sample
from qlora.training.tracking import Tracking

# Values of a line that depend on the clock or the system, and differ between equal runs.
VOLATILE = ("tokens_per_second", "peak_memory")
# Number of rows of a source that a message names.
SHOWN_ROWS = 8


class MetricsLog:
    """Log of steps and evaluations; on every process but the first it does nothing.

    Args:
        run: Directory of the run, whose metrics.jsonl and samples.jsonl are appended to.
        processes: Processes of the run.
        tracking: Trackers of the run.
        total_steps: Number of steps of the run.
        steps_per_epoch: Number of steps per epoch.
        log_every: Number of steps between lines.
        display: Display of the run.
        unit: What the display calls the tokens of a run of texts, or the images of one of images.
    """

    def __init__(
        self,
        run: RunDirectory,
        processes: Processes,
        tracking: Tracking,
        total_steps: int,
        steps_per_epoch: int,
        log_every: int,
        display: Display,
        unit: str = "tok",
    ) -> None:
        self.unit = unit
        self._tracking, self.total_steps, self.steps_per_epoch = tracking, total_steps, steps_per_epoch
        self.log_every, self.is_main, self.display = log_every, processes.is_first, display
        self._since_line = {"tokens": 0, "seconds": 0.0}
        self._metrics, self._samples = LogFile(run.metrics), LogFile(run.samples)

    def announce(self, lines: Sequence[str]) -> None:
        """Print messages that a user should see, or keep them for the result."""
        if self.is_main:
            self.display.announce(lines)

    def log_step(self, progress: Progress, report: StepReport) -> None:
        """Log an optimizer step, if it is due."""
        self._since_line["tokens"] += report.tokens
        self._since_line["seconds"] += report.seconds
        is_due = progress.step % self.log_every == 0 or progress.step == self.total_steps
        if not self.is_main or not is_due or report.was_skipped:
            return
        tokens_per_second = self._since_line["tokens"] / max(1e-9, self._since_line["seconds"])
        self._since_line = {"tokens": 0, "seconds": 0.0}
        self._write(
            {
                "step": progress.step,
                **self._epoch(progress.step),
                "loss": report.loss,
                **report.metrics,
                "grad_norm": report.grad_norm if math.isfinite(report.grad_norm) else None,
                "learning_rate": report.learning_rate,
                "tokens": progress.tokens,
                "supervised_tokens": progress.supervised_tokens,
                "tokens_per_second": round(tokens_per_second, 1),
                "peak_memory": peak_memory_bytes(),
                "zero_update_share": None if report.zero_update_share is None else round(report.zero_update_share, 6),
                "dead_adapters": report.dead_adapters,
                **({} if report.mean_rank is None else {"mean_rank": round(report.mean_rank, 4)}),
            }
        )
        self.display.show_step(
            progress.step,
            f"epoch {progress.step / self.steps_per_epoch:.2f}  loss {report.loss:.4f}  lr {report.learning_rate:.2e}  "
            f"grad norm {report.grad_norm:.2f}  {tokens_per_second:,.0f} {self.unit}/s  {_describe_peak()}",
        )

    def log_event(self, step: int, kind: str, message: str, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Log and print an event.

        Args:
            step: Number of steps done when it happened.
            kind: `skipped`, `loss_spike` or `out_of_memory`: its key in metrics.jsonl.
            message: What happened.
            rows: Rows of the data that it concerns, by source.
        """
        if not self.is_main:
            return
        self._write({"step": step, **self._epoch(step), kind: message} | ({} if rows is None else {"rows": rows}))
        about = "" if rows is None else f" Rows: {describe_rows(rows)}."
        self.announce([f"step {step:,}/{self.total_steps:,}  {message}{about}"])

    def log_evaluation(self, step: int, evaluations: Mapping[str, Evaluation]) -> None:
        """Log the evaluations after a step.

        Args:
            step: Number of steps done.
            evaluations: Evaluation of each set, by its name, which the names of its metrics begin with.
        """
        if not self.is_main or not evaluations:
            return
        values: dict[str, Any] = {"step": step, **self._epoch(step)}
        for name, each in evaluations.items():
            values |= {
                f"{name}_loss": each.loss,
                **({} if each.perplexity is None else {f"{name}_perplexity": each.perplexity}),
                **({f"{name}_supervised_tokens": each.num_supervised} if each.num_supervised else {}),
                **{f"{name}_{metric}": value for metric, value in each.metrics.items()},
                **({f"{name}_confusion": each.counts} if each.counts else {}),
            }
        self._write(values)
        self.display.show_event(step, "  ".join(_describe(name, each) for name, each in evaluations.items()))

    def log_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Log the samples after a step.

        Args:
            step: Number of steps done.
            samples: A `prompt`, an `answer` and maybe a `reference` each.
        """
        if not self.is_main:
            return
        self._samples.append({"step": step, **self._epoch(step), "samples": samples})
        self._tracking.log_samples(samples, step)
        for sample in samples:
            self.display.show_event(step, f"sample: {describe_sample(sample)}")

    def close(self) -> None:
        """Write what is left, end the progress line, and close the files."""
        try:
            self.write_out()
        except OSError as problem:
            self.announce([f"The last lines of metrics.jsonl or samples.jsonl can't be written: {problem}."])
        self.display.close()
        self._metrics.close()
        self._samples.close()

    def write_out(self) -> None:
        """Write the lines that could not be written when they were logged because the disk was full.

        Raises:
            OSError: It is still full.
        """
        self._metrics.write_out()
        self._samples.write_out()

    def _epoch(self, step: int) -> dict[str, float]:
        return {"epoch": round(step / self.steps_per_epoch, 6)}

    def _write(self, values: dict[str, Any]) -> None:
        self._metrics.append(values)  # a full disk need not end the run; the next save reports it
        self._tracking.log_numbers(values, values["step"])


def _describe(name: str, evaluation: Evaluation) -> str:
    values = {"loss": evaluation.loss, **evaluation.metrics}
    return ", ".join(f"{metric_label(f'{name}_{metric}')} {value:.4f}" for metric, value in values.items())


def describe_rows(rows: Mapping[str, Sequence[int]]) -> str:
    """Return the first rows of each source as text."""
    parts = []
    for source, numbers in rows.items():
        more = f" and {len(numbers) - SHOWN_ROWS} more" if len(numbers) > SHOWN_ROWS else ""
        parts.append(f"{', '.join(map(str, numbers[:SHOWN_ROWS]))}{more} of {source}")
    return "; ".join(parts)


def _describe_peak() -> str:
    """Return the peak memory, with what it is the peak of: predictions are those of a device, without a process."""
    return f"{'peak' if torch.cuda.is_available() else 'process peak'} {peak_memory_bytes() / 2**30:.2f} GiB"


def peak_memory_bytes() -> int:
    """Return the peak memory in bytes: of torch on the GPU, or without a GPU of this process on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
