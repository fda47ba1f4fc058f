"""The merged model held against the adapter model: tensors, files, and what the two predict."""

import gc
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import BaseFiles, RunDirectory, read_adapter_config
from qlora.config import ExportSection, load_config
from qlora.errors import ExportError, ModelError
from qlora.export.clients import Verdict, check_clients
from qlora.export.held_out import held_out_examples
from qlora.export.merge import REPORT_FILE
from qlora.export.verify_files import check_head, check_tokenizer
from qlora.export.verify_predictions import compare, predict
from qlora.export.verify_tensors import ExpectedWeights, check_tensors, true_scaling
from qlora.export.weights import adapter_scaling
from qlora.model import build_skeleton, load_base, load_run, load_tokenizer, resolve_device

# Mean KL divergence and difference of losses, in nats, above which two models are not the same: ten times
# what bf16 against fp16 arithmetic was seen to make.
MAX_KL = 0.01
MAX_LOSS_DIFFERENCE = 0.01
# Examples that the losses are compared on.
NUM_EXAMPLES = 64


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How far apart adapter model and merged model are; what they predict is None where the folder can't be loaded.

    Attributes:
        matches: Whether they are the same within the bounds.
        problems: Why not.
        onto: The base weights that were merged into.
        base_differs: Files of the base that are not those trained on.
        clients: Whether other tools would load the adapter itself.
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
    onto: str
    base_differs: list[str]
    clients: dict[str, Verdict]
    tensors_checked: int = 0
    max_weight_difference: float | None = None
    positions: int = 0
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


def verify(run_dir: str | Path, out_dir: str | Path, device: str = "auto") -> VerifyReport:
    """Compares a merged folder with the run that it came from.

    Args:
        run_dir: The run.
        out_dir: What :func:`qlora.merge` wrote.
        device: To run both models on, one after the other.

    Raises:
        ExportError: The folder is no merged model.
        QLoRAError: The run, its base or its data can't be read.
    """
    run, out_dir = RunDirectory.open(run_dir), Path(out_dir).expanduser()
    settings, merge_report = _read_report(out_dir)
    resolve_device(device)  # told now rather than after the tensors
    model = load_config(run.config).model
    base = BaseFiles.resolve(model.base, model.revision, model.trust_remote_code)
    skeleton = build_skeleton(base, model.trust_remote_code)
    base_differs = base.differing(run.read_record()["base"]["files"])
    problems = _check_origins(run, base, base_differs, merge_report)
    found: dict[str, Any] = {}
    try:
        written = BaseFiles.resolve(str(out_dir))
        merged_skeleton = build_skeleton(written, model.trust_remote_code)
    except ModelError as error:
        problems.append(str(error))
    else:
        on = resolve_device(merge_report.get("device", "cpu"))
        tensors = check_tensors(ExpectedWeights(run, base, settings.onto, on), written, getattr(torch, settings.dtype))
        problems += tensors.problems + check_head(skeleton, base, merged_skeleton, written)
        problems += check_tokenizer(base, written, load_tokenizer(run.adapter, model.trust_remote_code))
        found = {"tensors_checked": tensors.checked, "max_weight_difference": tensors.max_difference}
        found |= _compare_predictions(run, written, settings, device, problems)
    return VerifyReport(
        matches=not problems,
        problems=problems,
        onto=settings.onto,
        base_differs=base_differs,
        clients=check_clients(run.adapter, skeleton),
        **found,
    )


def _read_report(out_dir: Path) -> tuple[ExportSection, dict[str, Any]]:
    """What merge said of a folder: its dtype and base weights, and all of it."""
    path = out_dir / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return ExportSection(dtype=report["dtype"], onto=report["onto"]), report
    except FileNotFoundError:
        raise ExportError(f"{out_dir} was not written by qlora merge: it has no {REPORT_FILE}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is damaged: {error!r}") from None


def _check_origins(
    run: RunDirectory, base: BaseFiles, base_differs: list[str], merge_report: dict[str, Any]
) -> list[str]:
    """Whether base and adapter are those of the run."""
    problems, taken = [], merge_report.get("base_differs", [])
    if {*base_differs} - {*taken}:
        problems.append(f"{base.name} is not the base that was trained on: {', '.join(base_differs)} differ")
    elif {*taken} - {*base_differs}:
        problems.append(f"what was merged into is not the base that was trained on: {', '.join(taken)} differed")
    own, saved = true_scaling(load_config(run.config).lora), adapter_scaling(read_adapter_config(run.adapter))
    if not math.isclose(own, saved):
        problems.append(f"{run.adapter} has a scaling of {saved:g}, the run trained with {own:g}")
    return problems


def _compare_predictions(
    run: RunDirectory, written: BaseFiles, settings: ExportSection, device: str, problems: list[str]
) -> dict[str, Any]:
    """Runs both models, one after the other; adds what is apart to the problems."""
    config = load_config(run.config)
    model, tokenizer = load_run(run.path, device)
    examples = held_out_examples(config, tokenizer)[:NUM_EXAMPLES]
    adapter = predict(model, tokenizer, examples)
    del model
    gc.collect()
    try:
        model, _ = load_base(str(written.folder), "none", compute_dtype=settings.dtype, device=device)
    except ModelError as error:
        problems.append(str(error))
        return {"adapter_loss": adapter.loss}
    merged = predict(model, tokenizer, examples)
    distance = compare(adapter, merged)
    problems += _apart(settings.onto, distance.mean_kl, adapter.loss, merged.loss)
    return asdict(distance) | {"adapter_loss": adapter.loss, "merged_loss": merged.loss}


def _apart(onto: str, mean_kl: float, adapter_loss: float, merged_loss: float) -> list[str]:
    """What speaks against the two being the same; the comparisons are false for NaN."""
    if onto == "original":
        # On other base weights than it was trained on the model is another; it must only not be worse.
        is_as_good = merged_loss <= adapter_loss + MAX_LOSS_DIFFERENCE
        return [] if is_as_good else [f"loss {merged_loss:.4f} is worse than the adapter's {adapter_loss:.4f}"]
    problems = []
    if not mean_kl <= MAX_KL:
        problems.append(f"mean KL divergence {mean_kl:.4g} is above {MAX_KL}")
    if not abs(adapter_loss - merged_loss) <= MAX_LOSS_DIFFERENCE:
        problems.append(f"losses {adapter_loss:.4f} and {merged_loss:.4f} differ by more than {MAX_LOSS_DIFFERENCE}")
    return problems
