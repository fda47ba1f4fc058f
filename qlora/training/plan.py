"""The parts of a run before it is started, and its plan."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.checkpoint import InUse, Inventory
from qlora.config import RunConfig, TrainSection
from qlora.data import BatchPlan, Datasets
from qlora.files import BaseFiles
from qlora.lora import RankBudget, ScoreHead
from qlora.model import Starts
from qlora.model.formats import notes_on_format
from qlora.objectives import Objective, training_loss
from qlora.optim import FlatOptimizer
from qlora.processes import Processes
from qlora.training.loop import LoopParts
from qlora.training.samples import Sampler
from qlora.training.scoring import Scorer


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Plan of a run, complete before its first step.

    Attributes:
        total_steps: Number of optimizer steps of the whole run.
        steps_per_epoch: Number of optimizer steps that see every example once.
        inventory: Parameters of the model: quantized, adapted, or neither.
        datasets: Training, held-out and retained examples.
        in_use: Devices, dtypes, kernels and levels that the run uses at its start.
        notes: What a user should know before the first step.
    """

    total_steps: int
    steps_per_epoch: int
    inventory: Inventory
    datasets: Datasets
    in_use: InUse
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return a line on the model, one on the optimizer and one on memory, for people."""
        inventory, in_use = self.inventory, self.in_use
        direct = inventory.describe_direct()
        model = (
            f"{inventory.num_parameters:,} parameters, {inventory.quantized_share:.1%} of linear and expert weights in "
            f"4 bits{self._weights()}; training {inventory.num_trained:,}{inventory.describe_rows()} for "
            f"{self.total_steps} steps on {in_use.device} in {in_use.compute_dtype}{direct and f'. {direct}'}"
        )
        memory = (
            f"  activation checkpointing: {in_use.recompute} ({in_use.recompute_why}); {in_use.weights_kept} "
            "dequantized weights cached"
        )
        return "\n".join(
            [model, f"  optimizer {in_use.optimizer}, state {self._paging()}{self._learning_rate()}", memory]
        )

    def _weights(self) -> str:
        """Return where the weights of the layers are, and the reason, if that is not the device."""
        place = {"sharded": "split over the processes", "host": "in host memory"}.get(self.in_use.weights)
        return "" if place is None else f", {place} ({self.in_use.weights_why})"

    def _paging(self) -> str:
        """Return whether the optimizer's state is paged, and why it is not if it should be."""
        if self.in_use.optimizer_state_paged:
            return "paged"
        why = self.in_use.optimizer_state_why
        return "not paged" if why is None else f"not paged ({why})"

    def _learning_rate(self) -> str:
        """Return the learning rate and its reason, if the config does not give it."""
        why = self.in_use.learning_rate_why
        return "" if why is None else f"; learning rate {self.in_use.learning_rate:g} ({why})"


@dataclass(frozen=True, slots=True)
class Assembly:
    """A run's parts before it is started.

    Attributes:
        config: Config of the run.
        train: Its training section, with a number as learning rate.
        objective: Objective that is trained for.
        files: Files of the base.
        model: Model with adapters, in training mode.
        tokenizer: Tokenizer with the run's chat template and new tokens; of a model of images its image processor.
        optimizer: Optimizer over the trained parameters.
        processes: Processes of the run.
        batches: Plan of the examples of each step.
        plan: Plan of the run.
        starts: What the adapters start from, as far as that does not follow from the seed.
        ranks: Budget of the adapters' components, if `lora.final_rank` shrinks it.
        scorer: Questions that are asked at every evaluation, with the metrics of their answers.
        sampler: Prompts that are answered at intervals, to be looked at.
        head: Head of scores of whole documents, if the objective trains one.
        levels: Levels of recomputation that the run may change to when memory runs out.
    """

    config: RunConfig
    train: TrainSection
    objective: Objective
    files: BaseFiles
    model: Any
    tokenizer: Any
    optimizer: FlatOptimizer
    processes: Processes
    batches: BatchPlan
    plan: RunPlan
    starts: Starts
    ranks: RankBudget | None
    scorer: Scorer
    sampler: Sampler
    head: ScoreHead | None
    levels: Sequence[str]

    @property
    def notes(self) -> list[str]:
        """What a user should know about the questions, the prompts and the base."""
        return [*self.scorer.notes, *self.sampler.notes, *notes_on_format(self.files, self.config.model.quantization)]

    @property
    def loop_parts(self) -> LoopParts:
        """The parts that every step uses."""
        return LoopParts(
            model=self.model,
            optimizer=self.optimizer,
            loss=training_loss(self.config.train, self.objective.trained),
            examples=self.plan.datasets.train,
            batches=self.batches,
            processes=self.processes,
            ranks=self.ranks,
        )
