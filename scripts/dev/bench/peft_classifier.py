"""Classification trained with PEFT on bitsandbytes' layers, on the texts of each step of a qlora run."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qlora.config import RunConfig
from qlora.data import LABEL, Batch, BatchPlan, Labels, TokenizedExample, collate
from qlora.data.batches import IGNORE_INDEX
from qlora.data.labels import BY_HEAD
from qlora.model import datasets_from_section, labels_from_config
from qlora.model.score import last_tokens
from qlora.training.schedule import learning_rate, resolve_total_steps

# Number of texts that go through the model at a time.
TEXTS = 8


def measure_peft(config: RunConfig) -> float:
    """Train a config's classification with PEFT, and return the share of its held-out rows that are predicted right.

    Adapters have the config's rank on all linear layers, and PEFT's own initial values and fp32; the optimizer is
    torch's AdamW, with the config's learning rates and gradient clipping.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.base)
    given = labels_from_config(config)
    datasets = datasets_from_section(config.data, tokenizer, config.train.seed, labels=given)
    section, labels = config.train, datasets.labels
    assert labels is not None
    assert isinstance(section.learning_rate, float)
    plan = BatchPlan(
        datasets.train.lengths, section.micro_batch_size, section.gradient_accumulation_steps,
        config.data.max_seq_len, section.seed,
    )  # fmt: skip
    steps = resolve_total_steps(section.epochs, section.max_steps, plan.steps_per_epoch)
    model = _build(config, labels)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=section.learning_rate, weight_decay=0.0)
    warmup = section.warmup_steps if section.warmup_steps is not None else round((section.warmup_ratio or 0) * steps)
    for step in range(steps):
        texts = [datasets.train[index] for index in plan.window(step)]
        for batch in _batches(texts):
            loss, _ = _loss_and_predicted(model, batch, labels)
            (loss / len(texts)).backward()
        if section.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
        rate = learning_rate(step, steps, section.learning_rate, section.lr_scheduler, warmup)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in _batches([*datasets.eval]):
            _, predicted = _loss_and_predicted(model, batch, labels)
            right += int((predicted == batch.values[LABEL]).sum())
    return right / len(datasets.eval)


def _build(config: RunConfig, labels: Labels) -> Any:
    """Load the base with bitsandbytes' layers and PEFT's adapters; a head of scores is trained in full."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    torch.manual_seed(config.train.seed)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["score", "lm_head"],
    )  # fmt: skip
    given: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": settings, "device_map": {"": "cpu"}}
    by_head = labels.by == BY_HEAD
    if by_head:
        base = config.model.base
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels.names), **given)
    else:
        model = AutoModelForCausalLM.from_pretrained(config.model.base, **given)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else evaluation repacks the weights in place
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    adapters = LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear",
        modules_to_save=["score"] if by_head else None, task_type="SEQ_CLS" if by_head else "CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, adapters).train()


def _batches(texts: Sequence[TokenizedExample]) -> list[Batch]:
    """Return batches of a few texts of about one length."""
    ordered = sorted(texts, key=len)
    return [collate(ordered[start : start + TEXTS]) for start in range(0, len(ordered), TEXTS)]


def _loss_and_predicted(model: Any, batch: Batch, labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the texts' losses, and the number of each one's label."""
    whole = model.base_model.model
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    hidden = whole.model(**inputs).last_hidden_state
    if labels.by == BY_HEAD:
        states = hidden.flatten(0, 1)[last_tokens(batch)]
        scores = whole.score(states.to(next(whole.score.parameters()).dtype)).float()
        return F.cross_entropy(scores, batch.values[LABEL].long(), reduction="sum"), scores.argmax(dim=1)
    rows, columns = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    logits = whole.lm_head(hidden[rows, columns]).float()
    loss = F.cross_entropy(logits, batch.labels[rows, columns], reduction="sum")
    first = torch.searchsorted(rows, torch.arange(len(batch.lengths)))
    return loss, logits[first + labels.offset][:, list(labels.deciding)].argmax(dim=1)
