"""How a run handles a step that fails: numbers that are not finite, memory that runs out, loss spikes."""

from collections.abc import Sequence
from dataclasses import replace

from qlora.checkpoint import InUse, RunDirectory
from qlora.errors import CheckpointError, ModelError
from qlora.training.loop import NonFinite, StepReport
from qlora.training.metrics import MetricsLog, describe_rows
from qlora.training.plan import Assembly
from qlora.training.progress import Progress
from qlora.training.relief import MemoryRelief
from qlora.training.replay import save_step

# Steps that may be skipped in a run: this number, or this share of all if that is more.
MAX_SKIPPED, MAX_SKIPPED_SHARE = 10, 0.01


class StepGuard:
    """Record steps that fail, and let the run continue if it can.

    Args:
        run: Directory of the run; steps to replay are saved in it.
        assembly: Parts of the run.
        progress: Progress of the run.
        log: Log of the run.
        in_use: What the run uses when the session starts.

    Attributes:
        in_use: What the run uses now; replaced when memory runs out.
    """

    def __init__(
        self, run: RunDirectory, assembly: Assembly, progress: Progress, log: MetricsLog, in_use: InUse
    ) -> None:
        self.in_use = in_use
        self._run, self._assembly, self._progress, self._log = run, assembly, progress, log
        self._relief = MemoryRelief(
            assembly.model, assembly.batches, progress, in_use.recompute,
            assembly.levels,
        )  # fmt: skip

    def on_nonfinite(self, found: NonFinite) -> None:
        """Save the step for replay; then skip it if the config says so.

        Raises:
            ModelError: The config stops at such a step, or too many steps were skipped.
        """
        assembly, rows = self._assembly, self._rows(found.suspects)
        saved = self._save(found, rows)
        message = f"{found.message} It trained on rows {describe_rows(rows)}. {saved}"
        if assembly.config.train.on_nonfinite == "stop":
            raise ModelError(f"{message} To continue without such steps, set train.on_nonfinite: skip.")
        most = max(MAX_SKIPPED, int(MAX_SKIPPED_SHARE * assembly.plan.total_steps))
        if self._progress.skipped >= most:
            raise ModelError(f"{message} {most} steps were skipped already, which is the limit.")
        numbers = f"skipped: the loss is {found.loss}, the gradient's norm {found.grad_norm}."
        self._log.log_event(found.step + 1, "skipped", numbers, rows)
        self._log.announce([saved])

    def on_out_of_memory(self, step: int) -> None:
        """Reduce the memory of a step, from 0, so that it can be retried.

        Raises:
            ModelError: It can't be reduced further.
        """
        change = self._relief.reduce_memory(step)
        weights_kept = self.in_use.weights_kept if self._relief.num_cached is None else self._relief.num_cached
        self.in_use = replace(
            self.in_use,
            recompute=self._relief.level,
            weights_kept=weights_kept,
            micro_batch_parts=self._progress.num_parts,
        )
        self._log.log_event(step + 1, "out_of_memory", f"memory ran out: {change}; the step is retried.")

    def note(self, report: StepReport) -> None:
        """Log a loss spike with the rows of its step."""
        if report.spike_above is not None:
            change = f"the loss jumped to {report.loss:.4f} from about {report.spike_above:.4f}."
            self._log.log_event(self._progress.step, "loss_spike", change, self._rows(report.examples))

    def _save(self, found: NonFinite, rows: dict[str, list[int]]) -> str:
        """Save a step for replay, and return how to replay it."""
        path = self._run.replay(found.step + 1)
        about = {
            "loss": found.loss,
            "grad_norm": found.grad_norm,
            "loss_scale": self._progress.loss_scale,
            "rows": rows,
            "label_weights": self._assembly.objective.label_weights,
        }
        try:
            if self._assembly.processes.is_first:
                save_step(path, self._assembly.loop_parts, found.step, self._progress.num_parts, about)
        except CheckpointError as problem:  # must not hide the error for which the step is saved
            return f"It could not be saved for replay: {problem}"
        return f"To see where it breaks: qlora train --replay {path}."

    def _rows(self, indices: Sequence[int]) -> dict[str, list[int]]:
        """Return the rows of the data that examples come from, by source."""
        datasets = self._assembly.plan.datasets
        return {datasets.reports[store].source: rows for store, rows in datasets.train.rows_of(indices).items()}
