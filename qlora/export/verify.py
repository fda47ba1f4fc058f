"""The merged model held against the adapter model: tensor by tensor, and by what they predict."""

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora.checkpoint import BaseFiles, RunDirectory
from qlora.config import ExportSection, load_config
from qlora.data import ExampleSet, eval_batches
from qlora.errors import ExportError
from qlora.export.merge import REPORT_FILE, cast_checked
from qlora.export.weights import MergedWeights
from qlora.model import datasets_from_section, evaluate, load_base, load_run

# Mean KL divergence and difference of losses, in nats, above which two models are not the same: ten times
# what bf16 against fp16 arithmetic was seen to make.
MAX_KL = 0.01
MAX_LOSS_DIFFERENCE = 0.01
# Positions whose whole distributions are compared; 512 of a 128k vocabulary are 256 MiB.
NUM_POSITIONS = 512
# Examples that the losses are compared on.
NUM_EXAMPLES = 64


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How far apart adapter model and merged model are.

    Attributes:
        matches: Whether they are the same within the bounds.
        problems: Why not.
        tensors_checked: Written tensors compared with a new computation, bit for bit.
        max_logit_difference: Over all positions and tokens.
        mean_kl: KL(adapter ‖ merged), nats per position.
        top1_agreement: Share of positions with the same likeliest token.
        adapter_loss: On held-out examples, or without those on training examples.
        merged_loss: On the same.
        positions: Compared.
    """

    matches: bool
    problems: list[str]
    tensors_checked: int
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    adapter_loss: float
    merged_loss: float
    positions: int

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
    written = _read_report(out_dir)
    problems, tensors_checked = _compare_tensors(run, out_dir, written)

    adapter_model, tokenizer = load_run(run_dir, device)
    config = load_config(run.config)
    datasets = datasets_from_section(config.data, tokenizer, config.train.seed, own_template=True)
    examples = (datasets.eval or datasets.train)[:NUM_EXAMPLES]
    adapter_logits, adapter_loss = _predictions(adapter_model, examples)
    del adapter_model
    gc.collect()
    merged_model, merged_tokenizer = load_base(
        str(out_dir), quantization="none", compute_dtype=written["dtype"], device=device
    )
    if merged_tokenizer.chat_template != tokenizer.chat_template:
        problems.append("the chat template is another")
    merged_logits, merged_loss = _predictions(merged_model, examples)

    log_p, log_q = adapter_logits.log_softmax(-1), merged_logits.log_softmax(-1)
    mean_kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    problems += _compare_predictions(written["onto"], mean_kl, adapter_loss, merged_loss)
    return VerifyReport(
        matches=not problems,
        problems=problems,
        tensors_checked=tensors_checked,
        max_logit_difference=(adapter_logits - merged_logits).abs().max().item(),
        mean_kl=mean_kl,
        top1_agreement=(log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item(),
        adapter_loss=adapter_loss,
        merged_loss=merged_loss,
        positions=len(log_p),
    )


def _read_report(out_dir: Path) -> dict[str, Any]:
    path = out_dir / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return ExportSection(dtype=report["dtype"], onto=report["onto"]).model_dump()
    except FileNotFoundError:
        raise ExportError(f"{out_dir} was not written by qlora merge: it has no {REPORT_FILE}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is damaged: {error!r}") from None


def _compare_tensors(run: RunDirectory, out_dir: Path, written: dict[str, Any]) -> tuple[list[str], int]:
    """Computes every merged tensor anew and compares it with the file's."""
    weights, files = MergedWeights(run, written["onto"]), BaseFiles.resolve(str(out_dir))
    layout = weights.layout(getattr(torch, written["dtype"]))
    names = {entry.name for entry in layout}
    problems = [f"tensor {name} is in only one of the two" for name in sorted(names ^ {*files.tensors})]
    for entry in layout:
        if entry.name in files.tensors:
            with safe_open(files.tensors[entry.name], framework="pt") as file:
                found = file.get_tensor(entry.name)
            expected = cast_checked(entry.name, weights.tensor(entry.name), entry.dtype)
            if found.dtype != entry.dtype or not torch.equal(found, expected):
                problems.append(f"tensor {entry.name} is not base + scaling·B·A")
    return problems, len(layout)


def _compare_predictions(onto: str, mean_kl: float, adapter_loss: float, merged_loss: float) -> list[str]:
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


@torch.no_grad()
def _predictions(model: Any, examples: ExampleSet) -> tuple[torch.Tensor, float]:
    """Logits of the first positions, (positions, vocabulary) in fp32 on the CPU, and the loss of all examples."""
    logits: list[torch.Tensor] = []
    missing = NUM_POSITIONS
    for example in examples:
        if missing <= 0:
            break
        ids = torch.from_numpy(example.input_ids[:missing]).long()[None].to(model.device)
        logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
        missing -= ids.shape[1]
    return torch.cat(logits), evaluate(model, eval_batches(examples, 1)).loss
