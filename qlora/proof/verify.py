"""Verify an adapter or its merged model against the run, or the base: tensors, files and predictions."""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import adapter_digest, record_release
from qlora.config import load_config
from qlora.data import eval_batches
from qlora.data.tokens import TokenizedExample
from qlora.errors import CheckpointError, ConfigError, DataError, ExportError, ModelError
from qlora.export.gguf.adapter import FORMAT as ADAPTER_FORMAT
from qlora.export.held_out import held_out_examples
from qlora.export.merged import Merged, read_merged
from qlora.files import BaseFiles
from qlora.model import (
    SUPERVISED,
    AdapterSource,
    Loss,
    build_skeleton,
    end_token_ids,
    evaluate,
    labels_from_config,
    load_adapted,
    load_adapter_tokenizer,
    load_base,
    load_generation_config,
    open_source,
    resolve_device,
)
from qlora.model.run_adapter import check_expert_type
from qlora.objectives import release_loss
from qlora.pages import refresh_page
from qlora.proof.adapter import check_adapter_files, check_layers
from qlora.proof.clients import Verdict, check_clients
from qlora.proof.expected import ExpectedWeights
from qlora.proof.files import SAMPLE_TEXTS, check_config, check_head, check_scores, check_tokenizer, check_weight_files
from qlora.proof.gguf import check_gguf
from qlora.proof.gguf_adapter import check_gguf_adapter
from qlora.proof.predictions import MAX_KL, PROMPTS, Predictions, compare, fixed_examples, loss_noise, predict
from qlora.proof.scores import MAX_SCORE_DIFFERENCE, Scores, compare_scores, predict_scores
from qlora.proof.served import Served, check_installed, serve
from qlora.proof.tensors import WrittenFolder, check_tensors

# Difference of losses, in nats, above which two models don't match, besides what rounding of the predictions explains.
MAX_LOSS_DIFFERENCE = 0.01
NOT_COMPARED = (
    "The adapter was made elsewhere, so there is no run and no held-out data to compare it with: losses are those of "
    "fixed texts, and the base weights that it was trained on are not known."
)
# Number of examples for the comparison of losses.
NUM_EXAMPLES = 64


@dataclass(frozen=True, slots=True, repr=False)
class VerifyReport:
    """Comparison of the adapter model with the merged model; values that were not compared are None.

    Attributes:
        matches: Whether they match within the bounds.
        problems: The mismatches.
        onto: Base weights that were merged onto; None if the adapter was verified by itself.
        base_differs: Files of the base that differ from those used in training.
        clients: Whether other tools would load the adapter, by tool.
        served: Answers of the release in the clients that load its format, by client; empty if none was asked for. One
            that failed is not a mismatch.
        layers_checked: Number of adapted layers whose weights and outputs were computed a second time.
        max_layer_difference: Largest relative difference of these outputs.
        tensors_checked: Number of written tensors compared with a second computation, to half a unit in the last place.
        max_weight_difference: Largest difference of a written value from the expected one before rounding.
        opened_as: Class of transformers that the merged model was opened in; of a multimodal model, the whole of it.
        positions: Number of positions whose logits were compared, or of texts whose scores were.
        max_logit_difference: Largest difference over all positions and tokens, or of a score.
        mean_logit_difference: Mean difference over the same.
        mean_kl: KL(adapter ‖ merged), in nats per position.
        top1_agreement: Share of positions with the same most likely token.
        greedy_agreement: Share of greedy tokens after fixed prompts that are equal, up to the first that differs.
        adapter_loss: Loss of the adapter model on the held-out examples; on training examples if there are none.
        merged_loss: Loss of the merged model on the same examples.
        notes: Explanations of values that look like a mismatch but are not one.
    """

    matches: bool
    problems: list[str]
    onto: str | None
    base_differs: list[str]
    clients: dict[str, Verdict]
    served: dict[str, Served] = field(default_factory=dict)
    layers_checked: int | None = None
    max_layer_difference: float | None = None
    tensors_checked: int | None = None
    max_weight_difference: float | None = None
    opened_as: str | None = None
    positions: int | None = None
    max_logit_difference: float | None = None
    mean_logit_difference: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    greedy_agreement: float | None = None
    adapter_loss: float | None = None
    merged_loss: float | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        verdict = "matches the run" if self.matches else f"{len(self.problems)} mismatches: {self.problems[0]}"
        return f"<VerifyReport: {verdict}>"


def verify(
    run_dir: str | Path,
    out_dir: str | Path | None = None,
    device: str = "auto",
    base: str | None = None,
    in_clients: bool = False,
) -> VerifyReport:
    """Compare a merged model with its run; without a merged model, compare the run's adapter with the run.

    An adapter made elsewhere is compared with its own files and the base, and predictions on fixed texts.

    Args:
        run_dir: The run, one of its checkpoints, or a folder or hub id of a PEFT adapter made elsewhere.
        out_dir: A folder that :func:`qlora.merge` wrote. Tensors, hyperparameters and vocabulary of a GGUF file are
            compared, or the changes that an adapter in a GGUF file makes; its predictions only with `in_clients`.
        device: Device to run the models on, one after the other.
        base: Base of an adapter made elsewhere, a folder or hub id; None for the one that its config names.
        in_clients: Load the merged model in each installed client that reads its format (transformers and vLLM, or
            llama-cpp-python), and compare greedy answers with the run's.

    Raises:
        ExportError: The folder has no merged model, or no client that reads it is installed.
        QLoRAError: The run or its base can't be read.
    """
    source = open_source(run_dir, base)
    merged = None if out_dir is None else read_merged(Path(out_dir).expanduser())
    if in_clients and merged is None:
        raise ExportError("--clients (in_clients) loads a release; name its folder.")
    installed = check_installed(source, merged) if in_clients and merged is not None else []
    resolve_device(device)  # so that an unknown one is reported before the tensors are compared
    files = source.base_files()
    skeleton = build_skeleton(files, source.trust_remote_code, source.head, whole=True)
    base_differs = source.base_differs(files)
    problems = []
    if source.run is not None:
        if not base_differs:
            check_expert_type(source.run, files)
        problems += check_adapter_files(source.run)
    else:
        source.read()  # so that an adapter that can't be computed here is refused
    problems += _check_base(files, base_differs, [] if merged is None else merged.base_differs)
    if merged is None:
        found = _compare_layers(source, files, device, problems)
    elif merged.step not in (None, source.step):
        problems.append(
            f"it was merged at step {merged.step}, but the run's adapter is that of step {source.step}. Merge again, "
            f"or add --checkpoint {merged.step}."
        )
        found = {}
    elif merged.adapter not in (None, adapter_digest(source.folder)):
        problems.append(
            f"it was merged from an adapter other than {source.folder}: from another run, or from this run before it "
            "was started again. Merge again."
        )
        found = {}
    elif {*merged.base_differs} - {*base_differs}:
        found = {}  # the base that was merged onto is missing, so every tensor would differ
    elif merged.format == ADAPTER_FORMAT:
        found = _compare_gguf_adapter(source, merged, skeleton, problems)
    elif merged.gguf is not None:
        found = _compare_gguf(source, files, merged, skeleton, problems)
    else:
        found = _compare_folder(source, files, merged, skeleton, device=device, problems=problems)
    served = {}
    if merged is not None and problems:
        differs = "the release itself is not what the run trained"
        served = {engine.name: Served(engine.version, reason=differs) for engine in installed}
    elif merged is not None and installed:
        served = serve(source, merged, device, installed)
        problems += [problem for each in served.values() for problem in each.problems]
    report = VerifyReport(
        matches=not problems,
        problems=problems,
        onto=None if merged is None else merged.onto,
        base_differs=base_differs,
        clients=check_clients(
            source.folder,
            skeleton,
            not any(start.subtracted for start in source.starts().values()),
            source.base_files().rope_scaling,
        ),
        served=served,
        notes=_notes(source, problems, found),
        **found,
    )
    if source.run is not None:
        folder = None if merged is None else str(merged.folder)
        record_release(source.run, "verify", report.as_dict() | {"out_dir": folder, "step": source.step})
        refresh_page(source.run)
    return report


def _notes(source: AdapterSource, problems: list[str], found: dict[str, Any]) -> list[str]:
    """Name what can't be compared, and explain greedy answers that differ although everything matches."""
    notes = [] if source.run is not None else [NOT_COMPARED]
    if problems or found.get("greedy_agreement", 1.0) == 1.0:
        return notes
    return [
        *notes,
        "Some greedy answers differ although the distributions match: where two tokens are almost equally likely, "
        "rounding to the merged dtype decides between them, and the rest of the answer follows.",
    ]


def _check_base(base: BaseFiles, differs: list[str], taken: list[str]) -> list[str]:
    """Check that the base is the one used in training, or the other one that a merge was forced to use."""
    if {*differs} - {*taken}:
        return [f"{base.name} is not the base used in training: {', '.join(differs)} differ"]
    if {*taken} - {*differs}:
        return [
            f"it was merged onto a base other than the one used in training ({', '.join(taken)} differed), and "
            f"{base.name} is not that base, so the tensors were not compared"
        ]
    return []


def _compare_layers(source: AdapterSource, base: BaseFiles, device: str, problems: list[str]) -> dict[str, Any]:
    """Load the adapter, and compute its adapted layers a second time."""
    try:
        model, tokenizer = load_adapted(source, device)
        examples = _examples(source, tokenizer)
    except (CheckpointError, ConfigError, DataError) as error:  # the files were compared already
        problems.append(f"its outputs were not compared: {error}")
        return {}
    layers = check_layers(model, ExpectedWeights(source, base, "dequantized", model.device), examples)
    problems += layers.problems
    objective = _loss(source)
    loss = None if objective is None else evaluate(model, eval_batches(examples, 1), loss=objective).loss
    return {
        "layers_checked": layers.checked,
        "max_layer_difference": layers.max_difference,
        "adapter_loss": loss,
    }


def _loss(source: AdapterSource, is_other_base: bool = False) -> Loss | None:
    """Return the loss that models are compared by; None for scores of an adapter made elsewhere.

    Predictions of tokens are compared by their cross-entropy, unless the merge is onto base weights other than those of
    training: that is judged as `qlora merge --onto best` judges it.

    Args:
        source: The adapter.
        is_other_base: Whether the merge is onto other base weights.
    """
    if source.run is None:
        return SUPERVISED if source.head is None else None
    if source.head is None and not is_other_base:
        return SUPERVISED
    config = load_config(source.run.config)
    return release_loss(config.train, labels_from_config(config, source.run))


def _examples(source: AdapterSource, tokenizer: Any) -> Sequence[TokenizedExample]:
    """Return the examples that a model is run on: held-out ones of the run, or fixed texts."""
    if source.run is None:
        return fixed_examples(tokenizer, (*PROMPTS, *SAMPLE_TEXTS))
    return held_out_examples(source.run, tokenizer)[:NUM_EXAMPLES]


def _compare_gguf(
    source: AdapterSource, base: BaseFiles, merged: Merged, skeleton: Any, problems: list[str]
) -> dict[str, Any]:
    """Compare a GGUF file's tensors, hyperparameters and vocabulary."""
    assert merged.gguf is not None
    tokenizer = load_adapter_tokenizer(source)
    ends = end_token_ids(load_generation_config(base.folder), tokenizer)
    expected = _expected_weights(source, base, merged)
    try:
        check = check_gguf(merged.gguf, expected, merged.dtype, config=skeleton.config, tokenizer=tokenizer, ends=ends)
    except ExportError as error:
        problems.append(str(error))
        return {}
    written = BaseFiles(merged.folder, str(merged.folder))
    problems += check.problems + check_tokenizer(base, written, tokenizer, source)
    return {"tensors_checked": check.checked, "max_weight_difference": check.max_difference}


def _compare_gguf_adapter(source: AdapterSource, merged: Merged, skeleton: Any, problems: list[str]) -> dict[str, Any]:
    """Compare the changes of weights that an adapter in a GGUF file makes."""
    assert merged.gguf is not None
    try:
        check = check_gguf_adapter(merged.gguf, source.read(), skeleton.config)
    except ExportError as error:
        problems.append(str(error))
        return {}
    problems += check.problems
    return {"tensors_checked": check.checked, "max_weight_difference": check.max_difference}


def _compare_folder(
    source: AdapterSource, base: BaseFiles, merged: Merged, skeleton: Any, device: str, problems: list[str]
) -> dict[str, Any]:
    """Compare a folder of safetensors, and its predictions with the run's."""
    try:
        written = BaseFiles.resolve(str(merged.folder))
        merged_skeleton = build_skeleton(written, source.trust_remote_code, source.head)
    except ModelError as error:
        problems.append(str(error))
        return {}
    expected = _expected_weights(source, base, merged)
    tensors = check_tensors(expected, WrittenFolder(written, getattr(torch, merged.dtype)))
    problems += tensors.problems + check_weight_files(written)
    problems += check_config(base, written, merged.dtype, source.head)
    problems += check_head(skeleton, base, merged_skeleton, written)
    tokenizer = load_adapter_tokenizer(source)
    if source.head is not None:
        problems += check_scores(written, source.head, source.head.pad_id(tokenizer))
    problems += check_tokenizer(base, written, tokenizer, source)
    found = {"tensors_checked": tensors.checked, "max_weight_difference": tensors.max_difference}
    return found | _compare_predictions(source, written, merged, device, problems)


def _expected_weights(source: AdapterSource, base: BaseFiles, merged: Merged) -> ExpectedWeights:
    if merged.onto == "original":
        return ExpectedWeights(source, base, merged.onto, torch.device("cpu"))
    try:
        device = resolve_device(merged.device)
    except ModelError as error:
        raise ExportError(
            f"{merged.folder} was merged on {merged.device}, whose kernels are needed to quantize its weights a second "
            f"time; verify it there. {error}"
        ) from None
    return ExpectedWeights(source, base, merged.onto, device)


def _compare_predictions(
    source: AdapterSource, written: BaseFiles, merged: Merged, device: str, problems: list[str]
) -> dict[str, Any]:
    """Run both models, one after the other, and add mismatches to the problems."""
    quantization = "none" if merged.onto == "original" else "nf4"  # for an adapter made elsewhere
    try:
        model, tokenizer = load_adapted(source, device, quantization)
        examples = _examples(source, tokenizer)
    except (CheckpointError, ConfigError, DataError) as error:  # the tensors were compared already
        problems.append(f"its predictions were not compared: {error}")
        return {}

    is_other_base = merged.onto == "original" and source.run is not None
    loss = _loss(source, is_other_base)

    def measure(model: Any) -> Predictions | Scores:
        if source.head is not None:
            return predict_scores(model, examples, loss)
        assert loss is not None, "models that predict tokens have one"
        return predict(model, tokenizer, examples, loss)

    adapter = measure(model)
    del model
    gc.collect()
    try:
        model, _ = load_base(
            str(written.folder),
            "none",
            compute_dtype=merged.dtype,
            device=device,
            trust_remote_code=source.trust_remote_code,
            head=source.head,
            whole=True,
        )
    except ModelError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return {"adapter_loss": adapter.loss}
    found = {"opened_as": type(model).__name__, "adapter_loss": adapter.loss}
    if isinstance(adapter, Predictions):
        sizes = len(model.get_output_embeddings().weight), adapter.logits[0].shape[1]
        if sizes[0] != sizes[1]:
            problems.append(f"{written.folder} predicts {sizes[0]} tokens, the run {sizes[1]}")
            return found
    other = measure(model)
    if isinstance(adapter, Scores):
        assert isinstance(other, Scores)
        scores = compare_scores(adapter, other)
        if not is_other_base and not scores.share <= MAX_SCORE_DIFFERENCE:  # also true for NaN
            problems.append(f"scores differ by {scores.share:.2%} of their size, more than {MAX_SCORE_DIFFERENCE:.0%}")
        if adapter.loss is not None and other.loss is not None:
            problems += _loss_mismatches(is_other_base, adapter.loss, other.loss, scores.loss_noise)
        return found | scores.as_dict() | {"merged_loss": other.loss}
    assert isinstance(other, Predictions)
    distance = compare(adapter, other)
    if not is_other_base and not distance.mean_kl <= MAX_KL:
        problems.append(f"mean KL divergence {distance.mean_kl:.4g} is above {MAX_KL}")
    problems += _loss_mismatches(is_other_base, adapter.loss, other.loss, loss_noise(distance.mean_kl))
    return found | asdict(distance) | {"merged_loss": other.loss}


def _loss_mismatches(is_other_base: bool, adapter_loss: float, merged_loss: float, noise: float = 0.0) -> list[str]:
    """Return a line if the losses are further apart than rounding explains; NaN always is.

    Args:
        is_other_base: Whether the merge is onto base weights other than those of training.
        adapter_loss: Loss of the adapter's model.
        merged_loss: Loss of the merged model.
        noise: Difference that rounding of the predictions explains.
    """
    if is_other_base:
        # Onto base weights other than those of training the predictions differ; they must only not be worse.
        if merged_loss <= adapter_loss + MAX_LOSS_DIFFERENCE:
            return []
        return [
            f"loss {merged_loss:.4f} is worse than the adapter's {adapter_loss:.4f}; merge --onto dequantized or best"
        ]
    most = MAX_LOSS_DIFFERENCE + noise
    if not abs(adapter_loss - merged_loss) <= most:
        return [f"losses {adapter_loss:.4f} and {merged_loss:.4f} differ by more than {most:.2g}"]
    return []
