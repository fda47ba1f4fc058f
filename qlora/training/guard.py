"""What a run does about a step that goes wrong: numbers not finite, memory that runs out, a loss that leaps."""

from collections.abc import Sequence

from qlora.checkpoint import RunDirectory
from qlora.errors import CheckpointError, ModelError
from qlora.training.assemble import Assembly
from qlora.training.loop import NonFinite, Progress, StepReport
from qlora.training.metrics import MetricsLog, describe_rows
from qlora.training.relief import MemoryRelief
from qlora.training.replay import save_step

# Steps that may be skipped in a run: so many, or a share of all if that is more.
MAX_SKIPPED, MAX_SKIPPED_SHARE = 10, 0.01


class StepGuard:
    """Tells and records what goes wrong, and lets the run go on where it can.

    Args:
        run: Its directory; steps to replay are kept in it.
        assembly: Of the run.
        progress: Of the run.
        log: Of the run.
    """

    def __init__(self, run: RunDirectory, assembly: Assembly, progress: Progress, log: MetricsLog) -> None:
        self._run, self._assembly, self._progress, self._log = run, assembly, progress, log
        in_use = assembly.plan.in_use
        self._relief = MemoryRelief(
            assembly.model, assembly.batches, progress, in_use["recompute"],
            assembly.config.model.recompute == "auto",
        )  # fmt: skip

    def on_nonfinite(self, found: NonFinite) -> None:
        """Keeps the step for replay; then the run stops, or skips it if it was told to.

        Raises:
            ModelError: The run stops.
        """
        assembly, rows = self._assembly, self._rows(found.suspects)
        kept = self._keep(found, rows)
        told = f"{found.message} Learnt from were rows {describe_rows(rows)}. {kept}"
        if assembly.config.train.on_nonfinite == "stop":
            raise ModelError(f"{told} To go on without such steps, set train.on_nonfinite: skip.")
        most = max(MAX_SKIPPED, int(MAX_SKIPPED_SHARE * assembly.plan.total_steps))
        if self._progress.skipped == most:
            raise ModelError(f"{told} {most} steps were skipped before it, and no more are.")
        numbers = f"skipped: the loss is {found.loss}, the gradient's norm {found.grad_norm}."
        self._log.log_event(found.step + 1, "skipped", numbers, rows)
        self._log.announce([kept])

    def on_out_of_memory(self, step: int) -> None:
        """Gives up what takes memory, so that the step can be repeated.

        Raises:
            ModelError: There is nothing left to give up.
        """
        told = self._relief.give_up(step)
        in_use = self._assembly.plan.in_use
        in_use["recompute"] = self._relief.level
        in_use["micro_batch_parts"] = self._progress.num_parts
        if self._relief.num_held is not None:
            in_use["weights_kept"] = self._relief.num_held
        self._log.log_event(step + 1, "out_of_memory", f"memory ran out: {told}; the step is repeated.")

    def note(self, report: StepReport) -> None:
        """Tells of a loss that is far above the usual."""
        if report.spike_above is not None:
            told = f"the loss leapt to {report.loss:.4f} from about {report.spike_above:.4f}."
            self._log.log_event(self._progress.step, "loss_spike", told, self._rows(report.examples))

    def _keep(self, found: NonFinite, rows: dict[str, list[int]]) -> str:
        """Keeps a step for replay; says how to see it again."""
        assembly, path = self._assembly, self._run.replay(found.step + 1)
        about = {
            "loss": found.loss,
            "grad_norm": found.grad_norm,
            "loss_scale": self._progress.loss_scale,
            "rows": rows,
        }
        flat, examples, plan = assembly.optimizer.flat, assembly.plan.datasets.train, assembly.batches
        try:
            if assembly.processes.is_first:
                save_step(path, flat, examples, plan, found.step, self._progress.num_parts, about)
        except CheckpointError as problem:  # what went wrong first is what is to be told
            return f"It is not kept for replay: {problem}"
        return f"To see where it breaks: qlora train --replay {path}."

    def _rows(self, indices: Sequence[int]) -> dict[str, list[int]]:
        """Rows of the data that examples come from, by source."""
        datasets = self._assembly.plan.datasets
        return {datasets.reports[store].source: rows for store, rows in datasets.train.rows_of(indices).items()}
