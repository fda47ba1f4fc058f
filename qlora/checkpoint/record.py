"""A run's record, run.json: its origin, the values in use, and its status."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from qlora.errors import CheckpointError
from qlora.files.json_files import read_object
from qlora.lora import ScoreHead

Steps = Annotated[int, Field(gt=0, lt=1 << 63)]
ComputeDtype = Annotated[str, Field(pattern="^(bfloat16|float16|float32)$")]


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """The base that a run trains.

    Attributes:
        name: Folder or hub id.
        revision: Revision that the config asks for.
        commit: Commit on the hub; None for a folder.
        files: SHA-256 of each file.
    """

    name: str
    revision: str | None
    commit: str | None
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the base is quantized.

    Attributes:
        kind: `nf4`, or `none`.
        double_quant: Whether the statistics are quantized too.
        block_size: Number of elements per block; None if nothing is quantized.
        from_4bit_checkpoint: Whether the base's files have 4-bit weights.
        experts: Type of the codes of a mixture's experts, `nf4`, or `mxfp4` if they were published in it; None if there
            are none in 4 bits.
    """

    kind: str
    double_quant: bool
    block_size: int | None
    from_4bit_checkpoint: bool
    experts: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory of a run's largest micro-batch, in bytes.

    Attributes:
        available: Bytes that the run may take.
        estimated: Predicted bytes; None if they are not known.
        measured: Measured bytes; None if the micro-batch was not tried.
        by_kind: Predicted bytes of weights, adapters, activations and others; None in records of qlora 0.1.0.
    """

    available: int
    estimated: int | None
    measured: int | None
    by_kind: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class InUse:
    """Values that a run uses where the config says `auto` or leaves the choice open.

    Attributes:
        device: Device of the first process.
        processes: Number of processes.
        compute_dtype: Compute dtype.
        attention: Attention implementation.
        activations: Implementation of norms, gated products and the rotations of self-attention, and why.
        dequantize: Implementation of dequantization; None if nothing is quantized. In records of qlora 0.1.0, the
            reason is part of it.
        dequantize_why: Reason for it; None in records of earlier versions, and if nothing is quantized.
        recompute: Level of recomputation.
        recompute_why: Reason for the level.
        tiled: Whether MLPs are computed in tiles, which changes the rounding.
        weights_kept: Number of dequantized weights that are cached.
        memory: Memory of the largest micro-batch.
        optimizer: Optimizer.
        optimizer_state_paged: Whether its state is paged.
        optimizer_state_why: Why it is not, although the optimizer pages; None in records of qlora 0.1.0.
        rounding: How updates are rounded to the parameters' dtype.
        micro_batch_parts: Number of parts that each micro-batch is computed in.
        deterministic: How far the run's bytes are reproducible; None if the config does not ask for it.
        packing_fill: Share of the packed sequences that is filled with tokens; None without packing.
        learning_rate: Peak learning rate; None in records of qlora 0.1.0.
        learning_rate_why: How it was computed; None if the config gives it.
        attention_why: Why attention spans all documents of a row; None if it does not, or the config selects it. In
            records of qlora 0.1.0, the reason is part of `attention`.
        states: How packed sequences are computed by each class of layers that carry a state from token to token: with
            the `borders` of documents, or by `documents`, one at a time; None if there are none.
        states_why: Why some compute one document at a time.
        unpacked_why: Why documents are not packed, although the config asks for it where it is possible.
        weights: Where the 4-bit weights of the layers are: `device`, `sharded` over the processes, or `host`.
        weights_why: Reason for it; None in records of qlora 0.1.0.
        experts: How experts are computed, and why; None if none are in 4 bits or adapted.
        micro_batches: Number of micro-batches of a step, over all processes; None in records of earlier versions.
        loss: Implementation of the cross-entropy of a frozen head; None in records of qlora 0.1.0, which computed it in
            plain torch.
        loss_why: Reason for it.
    """

    device: str
    processes: int
    compute_dtype: ComputeDtype
    attention: str
    activations: str
    dequantize: str | None
    recompute: str
    recompute_why: str
    tiled: bool
    weights_kept: int
    memory: MemoryUse
    optimizer: str
    optimizer_state_paged: bool
    rounding: str
    micro_batch_parts: int
    deterministic: str | None
    packing_fill: float | None
    learning_rate: float | None = None
    learning_rate_why: str | None = None
    attention_why: str | None = None
    states: dict[str, str] | None = None
    states_why: str | None = None
    unpacked_why: str | None = None
    weights: str = "device"
    weights_why: str | None = None
    experts: str | None = None
    micro_batches: int | None = None
    optimizer_state_why: str | None = None
    dequantize_why: str | None = None
    loss: str | None = None
    loss_why: str | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """A model's parameters: quantized, adapted, or neither.

    Attributes:
        num_parameters: Number of the base's parameters, each counted once.
        num_trained: Number of trained parameters, in adapters and in rows trained in full.
        quantized_share: Share of the base's linear and expert weights, without embedding and head, that are in 4 bits.
        adapted_share: Share of these weights that are in layers with an adapter.
        base_bytes: Bytes of the base, without embeddings and heads whose rows are all trained.
        quantized: Names of the quantized layers.
        unquantized: Names of all parameters that are not quantized.
        trained_rows: Index of the first row trained in full and one past the last, by the module's name.
        shared_rows: Whether embedding and head are tied, and so are their trained rows.
        adapted: Names of the layers with an adapter.
        adapted_experts: Ranks of the adapters of stacks of experts, by their names.
        read_directly: Names of the linear layers that are neither quantized nor adapted, because the model's code reads
            their weights instead of calling them.
    """

    num_parameters: int
    num_trained: int
    quantized_share: float
    adapted_share: float
    base_bytes: int
    quantized: list[str]
    unquantized: list[str]
    trained_rows: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]]
    shared_rows: bool
    adapted: list[str]
    adapted_experts: dict[str, int] = field(default_factory=dict)
    read_directly: list[str] = field(default_factory=list)

    def describe_rows(self) -> str:
        """Return a description of the rows trained in full; empty if there are none."""
        if not self.trained_rows:
            return ""
        rows = [f"{stop - start} rows of {name}" for name, (start, stop) in self.trained_rows.items()]
        return f" (including {', '.join(rows)}{', which share their weight' if self.shared_rows else ''})"

    def describe_direct(self) -> str:
        """Return a sentence about the layers whose weights are read; empty if there are none."""
        if not self.read_directly:
            return ""
        kinds = Counter(name.rpartition(".")[2] for name in self.read_directly)
        return (
            f"Left in 16 bits without an adapter, because the model's code reads their weights: "
            f"{', '.join(f'{count} × {kind}' for kind, count in kinds.items())}."
        )


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """Number of examples that a run trains and is evaluated on."""

    train: int
    eval: int


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation of a run, whose checkpoint is kept.

    Attributes:
        metric: Name of the metric that evaluations are compared by.
        value: Its value.
        step: Number of optimizer steps done.
    """

    metric: str
    value: float
    step: Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The contents of run.json.

    Attributes:
        versions: Versions of Python and packages.
        hardware: Processor and GPUs.
        seed: Seed of the run.
        base: Base model.
        quantization: How it is quantized.
        total_steps: Number of optimizer steps of the run.
        in_use: What the run uses.
        continued_from: Checkpoint that the last session continued from.
        started_from: Checkpoint of another run that this run started from.
        final_step: Step of the final adapter of a finished run that is being extended.
        parameters: Parameters of the model.
        data: Data report of each source as JSON values. Its keys differ between versions; `source` and `digest` are
            always present.
        examples: Number of examples.
        held_out: Number of examples of each set that is evaluated, by its name in metrics.
        retain: Data report of each source of retained rows.
        head: Head of scores of whole documents; None for the head over the vocabulary.
        status: `running`, `interrupted` or `finished`.
        steps: Number of optimizer steps done; None while the run is running.
        best: The best evaluation, if its checkpoint is kept (`train.keep_best`).
        stopped_early: Step at which the run last stopped early; None if it never did.
    """

    versions: dict[str, str]
    hardware: dict[str, Any]
    seed: int
    base: BaseRecord
    quantization: Quantization
    total_steps: Steps
    in_use: InUse
    continued_from: str | None
    started_from: str | None = None
    final_step: Steps | None = None
    parameters: Inventory
    data: list[dict[str, Any]]
    examples: ExampleCounts
    held_out: dict[str, int] = field(default_factory=dict)
    retain: list[dict[str, Any]] = field(default_factory=list)
    head: ScoreHead | None = None
    status: Literal["running", "interrupted", "finished"]
    steps: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    best: Best | None = None
    stopped_early: Steps | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished."""
        return self.status == "finished"

    def as_dict(self) -> dict[str, Any]:
        """Return the values in the form of run.json."""
        values = asdict(self)
        if self.steps is None:
            del values["steps"]
        return values


READER = TypeAdapter(RunRecord)


def read_record(path: Path) -> RunRecord:
    """Read a run.json, of this version or an older one.

    Raises:
        CheckpointError: The file is damaged, or lacks a key that qlora 0.1.0 already wrote.
    """
    values = read_object(path, CheckpointError, "it was not written by qlora train")
    try:
        # Through JSON, because in strict mode pydantic builds dataclasses from dicts only when it parses.
        record = READER.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems = {".".join(map(str, each["loc"])): each["type"] == "missing" for each in error.errors()}
        missing = [key for key, is_missing in problems.items() if is_missing]
        problem = f" lacks {', '.join(missing)}" if missing else f": invalid value of {', '.join(problems)}"
        raise CheckpointError(f"{path}{problem}; it was not written by qlora train.") from None
    is_wrong = {
        "quantization.block_size": record.parameters.quantized and record.quantization.block_size is None,
        "data": not all(isinstance(each.get(key), str) for each in record.data for key in ("source", "digest")),
        "steps": record.is_finished and record.steps is None,
    }
    if wrong := [key for key, problem in is_wrong.items() if problem]:
        raise CheckpointError(f"{path}: invalid value of {', '.join(wrong)}; it was not written by qlora train.")
    return record
