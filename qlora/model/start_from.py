"""Starting from an adapter: it is continued, with more components if wanted, or kept below a new one."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from qlora.checkpoint import PeftAdapter, RunDirectory
from qlora.config import RunConfig
from qlora.errors import ConfigError
from qlora.files import BaseFiles
from qlora.lora import AdapterSpec, LayerStart, ScoreHead, StoredAdapter, StoredExperts
from qlora.lora.head import SCORES
from qlora.lora.linear import draw
from qlora.model.source import AdapterSource, open_source
from qlora.model.starts import Starts


def open_start(config: RunConfig) -> AdapterSource:
    """Find the adapter that a config starts from.

    Raises:
        CheckpointError: There is none, or its run has not finished.
        ConfigError: Its run trained it on other files of the base.
    """
    path = config.lora.start_from
    assert path is not None
    source = open_source(path, None if RunDirectory.find(path) is not None else config.model.base)
    model = config.model
    if differing := source.base_differs(BaseFiles.resolve(model.base, model.revision, model.trust_remote_code)):
        raise ConfigError(
            f"lora.start_from: {path} was trained on {source.base}, and model.base ({model.base}) has other files "
            f"({', '.join(differing)}); set model.base to the same, or train without lora.start_from."
        )
    return source


def starts_from_adapter(
    config: RunConfig,
    source: AdapterSource,
    adapter: PeftAdapter,
    specs: Mapping[str, AdapterSpec],
    experts: Mapping[str, AdapterSpec],
    head: ScoreHead | None = None,
) -> Starts:
    """Return what the layers and experts of a config start from, if that is an adapter.

    Its update stays the same: where the new scaling is another one, B is multiplied by their ratio and rounded once to
    the dtype of the factors. A layer that has a lower rank than the config asks for gets more components, with A drawn
    from the seed and B zero; one that has a higher rank keeps it.

    Args:
        config: Config of the run.
        source: The adapter that it starts from.
        adapter: What that holds.
        specs: Specs of the adapted layers by the config.
        experts: Specs of the adapted stacks of experts by the config.
        head: Head of scores that the config trains; it starts from the adapter's, if that has one.

    Raises:
        ConfigError: The config leaves out layers of the adapter, or can't represent it; names all problems.
    """
    section = config.lora
    problems = []
    if absent := sorted({*adapter.layers} - {*specs}):
        problems.append(
            f"it adapts {len(absent)} layers that lora.targets, lora.layers and lora.exclude leave out "
            f"({', '.join(absent[:3])}{' …' * (len(absent) > 3)})"
        )
    if absent := sorted({*adapter.experts} - {*experts}):
        problems.append(
            f"it adapts {len(absent)} stacks of experts that lora.expert_rank, lora.targets, lora.layers and "
            f"lora.exclude leave out ({', '.join(absent[:3])}{' …' * (len(absent) > 3)})"
        )
    if adapter.experts and section.stack:
        problems.append(
            "it adapts experts, whose updates can't be kept below another adapter; remove lora.stack, or merge it and "
            "set model.base to the merged folder"
        )
    has_magnitude = any(stored.magnitude is not None for stored in adapter.layers.values())
    if has_magnitude and section.stack:
        problems.append("it is a DoRA adapter, whose row scale can't be kept below another adapter; remove lora.stack")
    elif has_magnitude and section.kind != "dora":
        problems.append(f"it is a DoRA adapter; set lora.kind: dora instead of {section.kind}")
    if source.head is not None and (head is None or not source.head.scores_the_same(head)):
        problems.append(_other_scores(source.head, head, config.train.objective))
    rows = [name for name in adapter.rows if name not in SCORES]
    if rows and section.stack:
        problems.append(f"it has trained rows of {', '.join(rows)}, which can't be stacked; remove lora.stack")
    if rows and not (section.modules_to_save or config.data.new_tokens):
        problems.append(
            f"it has trained rows of {', '.join(rows)}; set lora.modules_to_save or data.new_tokens as for it"
        )
    if section.kind == "rows" and not section.stack and not all(map(_is_rows, adapter.layers.values())):
        problems.append("it was not trained with lora.kind: rows; set lora.kind: lora, or lora.stack: true")
    if section.kind == "rows" and not section.stack:
        own = {name: len(each.A) for name, each in adapter.layers.items() if name in specs}
        fewer = {rank for name, rank in own.items() if rank < specs[name].rank}
        if fewer:
            problems.append(f"it has {min(fewer)} rows, and continues with these; set lora.rank: {min(fewer)}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"lora.start_from: {section.start_from} can't be continued by this config:\n{lines}")
    earlier = source.starts()
    generator = torch.Generator().manual_seed(config.train.seed)
    starts = {}
    for name, spec in specs.items():
        kept = earlier.get(name, LayerStart())
        start = LayerStart(subtracted=kept.subtracted, first=kept.first, codes=kept.codes)
        stored = adapter.layers.get(name)
        if stored is not None:
            start = _below(stored, start) if section.stack else _continued(stored, spec, start, generator)
        starts[name] = start
    for name, stored_experts in adapter.experts.items():
        A, B = _grown(stored_experts, experts[name], generator)
        starts[name] = LayerStart(A=A, B=B)
    return starts


def _other_scores(stored: ScoreHead, own: ScoreHead | None, objective: str) -> str:
    """Return how the scores of an adapter differ from those that a config trains."""
    count = stored.num_labels
    if own is None or own.num_labels != count or not set(stored.labels) ^ set(own.labels):
        same = own is not None and own.num_labels == count
        order = f"it has the labels {', '.join(stored.labels)} in this order; set data.labels to it"
        scores = f"it gives texts {count} score{'s' * (count > 1)}, unlike train.objective: {objective} here"
        return order if same else scores
    missing, new = (", ".join(sorted(names)) for names in (
        set(stored.labels) - set(own.labels), set(own.labels) - set(stored.labels),
    ))  # fmt: skip
    return (
        f"it scores the labels {missing}, where this config has {new}; rename the labels of the rows, or remove "
        "lora.start_from"
    )


def _below(stored: StoredAdapter, start: LayerStart) -> LayerStart:
    return replace(start, frozen=stored.delta)


def _continued(stored: StoredAdapter, spec: AdapterSpec, start: LayerStart, generator: torch.Generator) -> LayerStart:
    if spec.kind == "rows":
        return replace(start, rows=stored.scaling * stored.A.float(), index=stored.B.argmax(0))
    A, B = _grown(stored, spec, generator)
    return replace(start, A=A, B=B, magnitude=stored.magnitude)


def _grown(
    stored: StoredAdapter | StoredExperts, spec: AdapterSpec, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of an adapter with a spec's scaling and at least its rank, of a layer or of each expert."""
    A, B = stored.A.float(), stored.B.float() * (stored.scaling / spec.scaling)
    *experts, rank, in_features = A.shape
    more = spec.rank - rank
    if more > 0:
        drawn = [draw(spec.init, spec.rank, in_features, generator)[:more] for _ in range(math.prod(experts))]
        A = torch.cat([A, torch.stack(drawn).view(*experts, more, in_features)], dim=-2)
        B = torch.cat([B, B.new_zeros(*B.shape[:-1], more)], dim=-1)
    return A.to(spec.dtype), B.to(spec.dtype)


def _is_rows(stored: StoredAdapter) -> bool:
    """Return whether B selects rows: a single one in each column."""
    B = stored.B
    return bool(((B == 0) | (B == 1)).all() and (B.sum(0) == 1).all())
