"""Assembly of a run's parts from its config, with all checks that are possible before the first step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora.checkpoint import InUse, MemoryUse, RunDirectory, read_origin
from qlora.config import DataSection, LoraSection, RunConfig, SourceSection
from qlora.data import BatchPlan, Datasets, collate
from qlora.errors import ConfigError, ModelError
from qlora.kernels import loss_path
from qlora.layers.placement import uneven_passes
from qlora.lora import RankBudget, ScoreHead, describe_experts, lora_layers, reads_images, train_rows
from qlora.memory.fit import fit_memory
from qlora.memory.place import check_weights, choose_weights
from qlora.model import (
    Isolation,
    Starts,
    adapter_spec,
    adapter_specs,
    base_files,
    build_skeleton,
    check_base,
    datasets_from_section,
    expert_specs,
    labels_from_config,
    load_for_training,
    load_processor,
    optimizer_from_section,
    read_config,
    resolve_compute_dtype,
    set_tokens,
    starts_of,
    take_inventory,
    unpackable_reason,
    weight_format,
    with_images,
)
from qlora.model.mergeable import check_mergeable
from qlora.model.null_space import check_no_experts
from qlora.model.quantization import with_linears
from qlora.model.reached import check_reached
from qlora.model.run_adapter import check_experts_as_trained
from qlora.model.score import check_image_size
from qlora.nf4 import dequantize_path
from qlora.objectives import objective_for_data, objective_from_section, training_loss
from qlora.out_of_memory import is_out_of_memory
from qlora.processes import Processes
from qlora.training.agreement import check_same
from qlora.training.auto_rate import resolve_rate
from qlora.training.best import check_metric, loss_metrics
from qlora.training.determinism import describe_determinism
from qlora.training.first_checks import check_fit, check_loaded, check_packing, pad_token_of
from qlora.training.plan import Assembly, RunPlan
from qlora.training.samples import Sampler, check_file
from qlora.training.schedule import resolve_total_steps
from qlora.training.scoring import Scorer


def assemble(config: RunConfig, processes: Processes, checkpoint: Path | None = None) -> Assembly:
    """Load base and data, and add adapters and optimizer.

    Args:
        config: Config of the run.
        processes: Processes of the run.
        checkpoint: Checkpoint that the run will continue from; None for step 0.

    Raises:
        QLoRAError: A check before the first step failed; the error is the same on every process.
    """
    section, model_section, objective = config.train, config.model, objective_from_section(config.train)
    with processes.raise_together():
        check_file(section.samples)
        check_weights(model_section, processes.world_size)
        files = base_files(model_section)
        weight_format(files, model_section.quantization)
        read_config(files, model_section.trust_remote_code)
        run = None if checkpoint is None else _run_of(checkpoint)
        starts = None if run is None else starts_of(config, run)
        unpacked_why = None if checkpoint is None else read_origin(checkpoint)["in_use"].get("unpacked_why")
        tokenizer = load_processor(files.folder, model_section.trust_remote_code)
        new_ids = set_tokens(config.data, tokenizer)
        # The data before the weights, so that errors in them are reported before tens of gigabytes are loaded; and what
        # config.json tells before the data.
        skeleton = build_skeleton(files, model_section.trust_remote_code, objective.loss.head)
        if reads_images(skeleton):
            check_image_size(files, skeleton, tokenizer)
        dtype = resolve_compute_dtype(model_section.compute_dtype, processes.device)
        check_base(model_section, files, skeleton, dtype)
        if run is not None and run.record.is_file():
            check_experts_as_trained(run, files, skeleton)
    datasets = _build_first(
        processes,
        lambda: datasets_from_section(
            config.data, tokenizer, section.seed, new_ids=new_ids, labels=labels_from_config(config, run)
        ),
    )
    # A continued run has what was computed from these in its starts.
    old = _old_examples(config, processes, tokenizer) if starts is None else None
    with processes.raise_together():
        if problems := objective.unsupported_reasons([*datasets.all_reports, *(old.reports if old else ())]):
            raise ConfigError("\n".join(problems))
        objective = objective_for_data(section, datasets)
        scorer = Scorer.from_section(
            config.eval, config.data, tokenizer, datasets, datasets.held_out, section.micro_batch_size
        )
        sampler = Sampler.from_section(section.samples, config.data, tokenizer, datasets, section.micro_batch_size)
        check_metric(section, [*loss_metrics(datasets.held_out, objective.loss), *scorer.names], scorer.unknown_names)
        head = objective.loss.head
        if head is not None:
            skeleton = build_skeleton(files, model_section.trust_remote_code, head)
        if reads_images(skeleton):
            head = None if head is None else replace(head, of_images=True)
        else:
            size = max(skeleton.get_input_embeddings().num_embeddings, new_ids.stop)
            if head is not None:
                head = replace(head, pad_token=pad_token_of(config, tokenizer, datasets, size))
            check_fit(skeleton, files, size, [datasets.train, *([old.train] if old else ())])
        # Before anything is loaded, names that match nothing are reported, and layers that could not be merged or would
        # get no gradient. A run that an older version began without these checks can still be continued.
        adapted = adapter_specs(with_linears(skeleton), config.lora)
        if checkpoint is None:
            check_mergeable(files, skeleton, adapted)
            check_reached(
                skeleton, config.lora, with_images(objective.loss, config.data, tokenizer), config.data.max_tokens
            )
        train_rows(skeleton, config.lora.modules_to_save)
        if section.keep is not None and section.keep.null_space is not None:
            check_no_experts(expert_specs(skeleton, config.lora))
        if config.data.packs and unpacked_why is None:
            unpacked_why = unpackable_reason(skeleton, config.data.max_seq_len)
            check_packing(config.data, unpacked_why)
        packed = config.data.packs and unpacked_why is None
    weights, weights_why = choose_weights(
        config, training_loss(section, objective.trained), processes, datasets.train.lengths.tolist(), packed
    )
    own_model = model_section.model_copy(update={"weights": weights})
    with processes.raise_together():
        model, starts, isolation, activations = _load_checked(
            config.model_copy(update={"model": own_model}), processes, datasets, new_ids, starts, old, head, packed
        )
        if isolation.mixed_reason is not None:
            packed, unpacked_why = False, isolation.mixed_reason
        if unpacked_why is not None:
            datasets.reports[0].notes.append(f"documents are not packed, because {unpacked_why}")
    # Before memory is fitted, because that exchanges a number between processes for every level. Each process has tried
    # its own kernels, and batches depend on what came out.
    check_same(
        processes,
        {f"contents of {name} (model.base)": digest[:12] for name, digest in files.fingerprint().items()}
        | {
            f"examples of {Path(report.source).name} (source {number})": report.digest[:12]
            for number, report in enumerate(datasets.all_reports, 1)
        }
        | {"documents are packed": packed, "attention": isolation.attention, "states": isolation.states},
    )
    batches = BatchPlan(
        datasets.train.lengths, section.micro_batch_size, section.gradient_accumulation_steps,
        config.data.max_seq_len if packed else None, section.seed,
        rank=processes.rank, world_size=processes.world_size, group_size=datasets.train.group_size,
    )  # fmt: skip
    total_steps = resolve_total_steps(section.epochs, section.max_steps, batches.steps_per_epoch)
    if section.warmup_steps is not None and section.warmup_steps >= total_steps:
        raise ConfigError(
            f"train.warmup_steps: {section.warmup_steps} should be below the run's {total_steps} steps, or the "
            "learning rate never gets to its peak; lower it, or set train.warmup_ratio."
        )
    section, why = resolve_rate(config, model.config)
    optimizer = optimizer_from_section(model, section)
    largest = collate([datasets.train[index] for index in batches.largest_micro_batch()], packed=packed)
    loss = training_loss(section, objective.trained)
    own = {"train": section, "data": config.data.model_copy(update={"packing": packed})}
    fit = fit_memory(config.model_copy(update=own), model, loss, largest.to(processes.device), processes)
    is_quantized = model_section.quantization == "nf4"
    dequantize, dequantize_why = dequantize_path(processes.device, model.dtype) if is_quantized else (None, None)
    loss_kernel, loss_why = loss_path(processes.device, model.dtype)  # after the trials of the loss
    in_use = InUse(
        device=str(processes.device),
        processes=processes.world_size,
        compute_dtype=str(model.dtype).removeprefix("torch."),
        attention=isolation.attention,
        activations=activations,
        dequantize=dequantize,
        recompute=fit.level,
        recompute_why=fit.why,
        tiled=fit.level == "offload+tiled",
        weights_kept=fit.num_cached,
        memory=MemoryUse(fit.available, fit.estimated, fit.measured, fit.by_kind),
        optimizer=section.optimizer,
        optimizer_state_paged=optimizer.is_paged,
        rounding=optimizer.rounding,
        micro_batch_parts=1,
        deterministic=describe_determinism(section.deterministic, processes.device),
        packing_fill=round(batches.fill, 4) if packed else None,
        learning_rate=section.peak,
        learning_rate_why=why,
        attention_why=isolation.attention_why,
        states=isolation.states,
        states_why=isolation.states_why,
        unpacked_why=unpacked_why,
        weights=weights,
        weights_why=weights_why,
        experts=describe_experts(model),
        micro_batches=processes.world_size * section.gradient_accumulation_steps,
        optimizer_state_why=optimizer.unpaged_why,
        dequantize_why=dequantize_why,
        loss=loss_kernel,
        loss_why=loss_why,
    )
    return Assembly(
        config=config,
        train=section,
        objective=objective,
        files=files,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        processes=processes,
        batches=batches,
        plan=RunPlan(total_steps, batches.steps_per_epoch, take_inventory(model), datasets, in_use),
        starts=starts,
        ranks=_rank_budget(config.lora, model, total_steps),
        scorer=scorer,
        sampler=sampler,
        head=head,
        levels=fit.levels,
    )


def _load_checked(
    config: RunConfig,
    processes: Processes,
    datasets: Datasets,
    new_ids: range,
    starts: Starts | None,
    old: Datasets | None,
    head: ScoreHead | None,
    packed: bool,
) -> tuple[Any, Starts, Isolation, str]:
    """Load the base with its adapters, in training mode.

    The loss, and the isolation of packed documents, are checked on a few tokens.

    Returns:
        The model, what its adapters start from, how it keeps packed documents apart, and the activations in use.

    Raises:
        ModelError: The model can't be trained, can't keep packed documents apart and `data.packing` is true, or memory
            ran out.
    """
    try:
        model, starts = load_for_training(
            config, processes.device, new_ids, starts, datasets.train, None if old is None else old.train,
            is_reference=objective_from_section(config.train).loss.has_reference, head=head, processes=processes,
        )  # fmt: skip
        with uneven_passes(model):  # so that a process that fails ends the others
            isolation, activations = check_loaded(config, model, datasets, head, packed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            "Memory ran out before the first step, when adapters were added or the loss was checked on a few tokens. "
            f"Stop other programs that take memory, set another model.weights, or use a smaller base. {error}"
        ) from error
    return model.train(), starts, isolation, activations


def _run_of(checkpoint: Path) -> RunDirectory:
    """Return the run of a checkpoint, or what is left of it."""
    run = RunDirectory.find(checkpoint)
    return RunDirectory(checkpoint.parent.parent) if run is None else run


def _rank_budget(section: LoraSection, model: Any, total_steps: int) -> RankBudget | None:
    """Return the budget of `lora.final_rank`; ranks by layer shrink by the same share as `lora.rank`.

    Layers that start from an adapter of a higher rank than the config's shrink from there.
    """
    if section.final_rank is None:
        return None
    layers = dict(lora_layers(model))
    asked = sum(spec.rank for spec in adapter_spec(section).by_layer(layers).values())
    started = sum(layer.spec.rank for layer in layers.values())
    share = min(1.0, section.final_rank / section.rank * asked / started)
    return RankBudget(list(layers.values()), share, total_steps)


def _old_examples(config: RunConfig, processes: Processes, tokenizer: Any) -> Datasets | None:
    """Return the examples of `train.keep.null_space` with their report; None if it is not set."""
    keep = config.train.keep
    if keep is None or keep.null_space is None:
        return None
    # Its rows are read by their own columns, like those of any file.
    plain = {key: DataSection.model_fields[key].get_default() for key in ("format", "columns", "roles", "max_rows")}
    own = {"train": [SourceSection(path=keep.null_space)], "eval": None, "retain": None}
    section = config.data.model_copy(update=plain | own)
    return _build_first(
        processes, lambda: datasets_from_section(section, tokenizer, config.train.seed, own_template=True)
    )


def _build_first(processes: Processes, build: Callable[[], Datasets]) -> Datasets:
    """Build data on the first process, then on the others, which read its cache."""
    with processes.raise_together():
        datasets = build() if processes.is_first else None
    with processes.raise_together():
        return build() if datasets is None else datasets
