"""A run's adapter, or what was merged from it, held against the run: tensors, files, and what they predict."""

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import RunDirectory, adapter_digest
from qlora.config import load_config
from qlora.data import eval_batches
from qlora.errors import CheckpointError, DataError, ExportError, ModelError
from qlora.export.held_out import held_out_examples
from qlora.export.merged import Merged, read_merged
from qlora.files import BaseFiles
from qlora.model import (
    build_skeleton,
    end_token_ids,
    evaluate,
    load_base,
    load_generation_config,
    load_run,
    load_run_tokenizer,
    resolve_device,
)
from qlora.proof.adapter import check_adapter_files, check_layers
from qlora.proof.clients import Verdict, check_clients
from qlora.proof.expected import ExpectedWeights
from qlora.proof.files import check_config, check_head, check_tokenizer, check_weight_files
from qlora.proof.gguf import check_gguf
from qlora.proof.predictions import compare, predict
from qlora.proof.tensors import WrittenFolder, check_tensors

# Mean KL divergence and difference of losses, in nats, above which two models are not the same: ten times
# what bf16 against fp16 arithmetic was seen to make.
MAX_KL = 0.01
MAX_LOSS_DIFFERENCE = 0.01
# Examples that the losses are compared on.
NUM_EXAMPLES = 64


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How far apart adapter model and merged model are; None is what was not or could not be compared.

    Attributes:
        matches: Whether they are the same within the bounds.
        problems: Why not.
        onto: The base weights that were merged into; None where the adapter was verified by itself.
        base_differs: Files of the base that are not those trained on.
        clients: Whether other tools would load the adapter itself.
        layers_checked: Adapted layers whose outputs were computed a second time, from weights that were too.
        max_layer_difference: Of these outputs, in shares of them.
        tensors_checked: Written tensors compared with a second computation, within half a unit of the last place.
        max_weight_difference: Of a written value from the one before rounding.
        positions: Whose logits were compared.
        max_logit_difference: Over all positions and tokens.
        mean_logit_difference: Over the same.
        mean_kl: KL(adapter ‖ merged), nats per position.
        top1_agreement: Share of positions with the same likeliest token.
        greedy_agreement: Share of the tokens that both put after fixed prompts, until the first that differs.
        adapter_loss: On held-out examples, or without those on training examples.
        merged_loss: On the same.
    """

    matches: bool
    problems: list[str]
    onto: str | None
    base_differs: list[str]
    clients: dict[str, Verdict]
    layers_checked: int | None = None
    max_layer_difference: float | None = None
    tensors_checked: int | None = None
    max_weight_difference: float | None = None
    positions: int | None = None
    max_logit_difference: float | None = None
    mean_logit_difference: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    greedy_agreement: float | None = None
    adapter_loss: float | None = None
    merged_loss: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def verify(run_dir: str | Path, out_dir: str | Path | None = None, device: str = "auto") -> VerifyReport:
    """Compares what was merged with the run that it came from; without it, the run's adapter with the run.

    Args:
        run_dir: The run, or one of its checkpoints.
        out_dir: What :func:`qlora.merge` wrote. A GGUF file's tensors, sizes and vocabulary are compared; what it
            predicts is llama.cpp's to say.
        device: To run models on, one after the other.

    Raises:
        ExportError: The folder holds nothing merged.
        QLoRAError: The run or its base can't be read.
    """
    run = RunDirectory.open(run_dir)
    merged = None if out_dir is None else read_merged(Path(out_dir).expanduser())
    resolve_device(device)  # told now rather than after the tensors
    model = load_config(run.config).model
    base = BaseFiles.resolve(model.base, model.revision, model.trust_remote_code)
    skeleton = build_skeleton(base, model.trust_remote_code)
    base_differs = base.differing(run.read_record().base.files)
    problems = check_adapter_files(run)
    problems += _check_base(base, base_differs, [] if merged is None else merged.base_differs)
    if merged is None:
        found = _compare_layers(run, base, device, problems)
    elif merged.step not in (None, run.step):
        problems.append(f"it was merged at step {merged.step}, but the run is at step {run.step}. Merge again.")
        found = {}
    elif merged.adapter not in (None, adapter_digest(run.adapter)):
        problems.append(
            f"merged from another adapter than {run.adapter}: of another run, or of this one before it was started "
            "over; merge again"
        )
        found = {}
    elif {*merged.base_differs} - {*base_differs}:
        found = {}  # the base that was merged into is not here, and from another all would differ
    elif merged.gguf is not None:
        found = _compare_gguf(run, base, merged, skeleton, problems)
    else:
        found = _compare_folder(run, base, merged, skeleton, device, problems)
    return VerifyReport(
        matches=not problems,
        problems=problems,
        onto=None if merged is None else merged.onto,
        base_differs=base_differs,
        clients=check_clients(run.adapter, skeleton),
        **found,
    )


def _check_base(base: BaseFiles, differs: list[str], taken: list[str]) -> list[str]:
    """Whether the base is the one trained on, or else the other one that merge was forced to take."""
    if {*differs} - {*taken}:
        return [f"{base.name} is not the base that was trained on: {', '.join(differs)} differ"]
    if {*taken} - {*differs}:
        return [
            f"merged into another base than the one trained on ({', '.join(taken)} differed), and {base.name} is not "
            "that base; so the tensors were not compared"
        ]
    return []


def _compare_layers(run: RunDirectory, base: BaseFiles, device: str, problems: list[str]) -> dict[str, Any]:
    """Loads the run, and computes its adapted layers a second time."""
    try:
        model, tokenizer = load_run(run.adapter, device)
        examples = held_out_examples(load_config(run.config), tokenizer)[:NUM_EXAMPLES]
    except (CheckpointError, DataError) as error:  # its files were compared all the same
        problems.append(f"what it computes was not compared: {error}")
        return {}
    layers = check_layers(model, ExpectedWeights(run, base, "dequantized", model.device), examples)
    problems += layers.problems
    loss = evaluate(model, eval_batches(examples, 1)).loss
    return {
        "layers_checked": layers.checked,
        "max_layer_difference": layers.max_difference,
        "adapter_loss": loss,
    }


def _compare_gguf(
    run: RunDirectory, base: BaseFiles, merged: Merged, skeleton: Any, problems: list[str]
) -> dict[str, Any]:
    """Reads a GGUF file back."""
    assert merged.gguf is not None
    config = load_config(run.config)
    tokenizer = load_run_tokenizer(run)
    ends = end_token_ids(load_generation_config(base.folder), tokenizer)
    expected = _expected_weights(run, base, merged)
    try:
        check = check_gguf(merged.gguf, expected, merged.dtype, skeleton.config, tokenizer, ends)
    except ExportError as error:
        problems.append(str(error))
        return {}
    written = BaseFiles(merged.folder, str(merged.folder))
    problems += check.problems + check_tokenizer(base, written, tokenizer, config)
    return {"tensors_checked": check.checked, "max_weight_difference": check.max_difference}


def _compare_folder(
    run: RunDirectory, base: BaseFiles, merged: Merged, skeleton: Any, device: str, problems: list[str]
) -> dict[str, Any]:
    """Reads a folder of safetensors back, and runs it and the run."""
    config = load_config(run.config)
    try:
        written = BaseFiles.resolve(str(merged.folder))
        merged_skeleton = build_skeleton(written, config.model.trust_remote_code)
    except ModelError as error:
        problems.append(str(error))
        return {}
    expected = _expected_weights(run, base, merged)
    tensors = check_tensors(expected, WrittenFolder(written, getattr(torch, merged.dtype)))
    problems += tensors.problems + check_weight_files(written)
    problems += check_config(base, written, merged.dtype) + check_head(skeleton, base, merged_skeleton, written)
    tokenizer = load_run_tokenizer(run)
    problems += check_tokenizer(base, written, tokenizer, config)
    found = {"tensors_checked": tensors.checked, "max_weight_difference": tensors.max_difference}
    return found | _compare_predictions(run, written, merged, device, problems)


def _expected_weights(run: RunDirectory, base: BaseFiles, merged: Merged) -> ExpectedWeights:
    if merged.onto == "original":
        return ExpectedWeights(run, base, merged.onto, torch.device("cpu"))
    try:
        device = resolve_device(merged.device)
    except ModelError as error:
        raise ExportError(
            f"{merged.folder} was merged on {merged.device}, whose kernels are needed to quantize its weights a second "
            f"time; verify it there. {error}"
        ) from None
    return ExpectedWeights(run, base, merged.onto, device)


def _compare_predictions(
    run: RunDirectory, written: BaseFiles, merged: Merged, device: str, problems: list[str]
) -> dict[str, Any]:
    """Runs both models, one after the other; adds what is apart to the problems."""
    config = load_config(run.config)
    try:
        model, tokenizer = load_run(run.adapter, device)
        examples = held_out_examples(config, tokenizer)[:NUM_EXAMPLES]
    except (CheckpointError, DataError) as error:  # the tensors were compared all the same
        problems.append(f"what it predicts was not compared: {error}")
        return {}
    adapter = predict(model, tokenizer, examples)
    del model
    gc.collect()
    try:
        model, _ = load_base(
            str(written.folder),
            "none",
            compute_dtype=merged.dtype,
            device=device,
            trust_remote_code=config.model.trust_remote_code,
        )
    except ModelError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return {"adapter_loss": adapter.loss}
    sizes = len(model.get_output_embeddings().weight), adapter.logits[0].shape[1]
    if sizes[0] != sizes[1]:
        problems.append(f"{written.folder} predicts {sizes[0]} tokens, the run {sizes[1]}")
        return {"adapter_loss": adapter.loss}
    other = predict(model, tokenizer, examples)
    distance = compare(adapter, other)
    problems += _apart(merged.onto, distance.mean_kl, adapter.loss, other.loss)
    return asdict(distance) | {"adapter_loss": adapter.loss, "merged_loss": other.loss}


def _apart(onto: str, mean_kl: float, adapter_loss: float, merged_loss: float) -> list[str]:
    """What speaks against the two being the same; the comparisons are false for NaN."""
    if onto == "original":
        # On other base weights than it was trained on the model is another; it must only not be worse.
        is_as_good = merged_loss <= adapter_loss + MAX_LOSS_DIFFERENCE
        told = (
            f"loss {merged_loss:.4f} is worse than the adapter's {adapter_loss:.4f}; merge --onto dequantized or best"
        )
        return [] if is_as_good else [told]
    problems = []
    if not mean_kl <= MAX_KL:
        problems.append(f"mean KL divergence {mean_kl:.4g} is above {MAX_KL}")
    if not abs(adapter_loss - merged_loss) <= MAX_LOSS_DIFFERENCE:
        problems.append(f"losses {adapter_loss:.4f} and {merged_loss:.4f} differ by more than {MAX_LOSS_DIFFERENCE}")
    return problems
