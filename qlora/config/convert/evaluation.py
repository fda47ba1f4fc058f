"""Translation of keys on what is evaluated: early stopping, the best checkpoint, and metrics of answers."""

from qlora.config.convert import values
from qlora.config.convert.draft import OFF, Draft
from qlora.config.sections.evaluation import ANSWER_METRICS

# TRL's names of metrics of preferences.
PREFERENCE_METRICS = {"rewards/accuracies": "reward_accuracy", "rewards/margins": "reward_margin"}
NOTHING_HELD_OUT = "it compares evaluations, and nothing is held out"
# Other trainers' names of metrics of answers.
METRICS = {"sacrebleu": "bleu", "rouge": "chrf", **{name: name for name in ANSWER_METRICS}}


def translate_evaluation(draft: Draft) -> None:
    """Translate what is evaluated; held-out rows and intervals are in the draft already."""
    is_evaluated = bool(draft.values.get("data.eval")) and draft.values.get("train.eval_every", 1) is not None
    stopping = ("early_stopping_patience", "early_stopping_steps", "load_best_model_at_end", "metric_for_best_model")
    if not is_evaluated:
        for name in stopping:
            if draft.peek(name) not in OFF:
                draft.drop(name, NOTHING_HELD_OUT)
        return
    metrics = _metrics(draft)
    key, given = draft.take_named("early_stopping_patience", "early_stopping_steps")
    patience = values.number(given)
    delta = values.number(draft.take("early_stopping_threshold"))
    given = draft.take("metric_for_best_model")
    metric = _metric_name(draft, given, metrics)
    is_kept = values.flag(draft.take("load_best_model_at_end"))
    if patience:
        options = {"metric": metric, "patience": int(patience), "min_delta": delta}
        chosen = {key: value for key, value in options.items() if value}
        draft.set("train.early_stopping", chosen, key)
    elif is_kept:
        draft.set(
            "train.keep_best",
            True if metric == "eval_loss" else metric,
            ", ".join(["load_best_model_at_end", *["metric_for_best_model"] * (given is not None)]),
        )


def _metrics(draft: Draft) -> list[str]:
    """Translate metrics of generated answers; return ours."""
    asked = values.names(draft.take("eval_causal_lm_metrics")) or ["sacrebleu", "chrf"]
    name = "do_causal_lm_eval"
    if not values.flag(draft.take(name)):
        name, asked = "predict_with_generate", ["bleu", "rouge"]
        if not values.flag(draft.take(name)):
            return []
    found = list(dict.fromkeys(METRICS[each] for each in asked if each in METRICS))
    if missing := [each for each in asked if each not in METRICS or each == "rouge"]:
        draft.warn(f"{name}: {', '.join(missing)} is not available; eval.metrics are {', '.join(found) or 'none'}.")
    if found:
        draft.set("eval.metrics", found, name)
        length = values.number(draft.take("eval_max_new_tokens", "eval_table_max_new_tokens", "max_new_tokens"))
        if length:
            draft.set("eval.max_new_tokens", int(length), "longest answer")
    return found


def _metric_name(draft: Draft, given: object, metrics: list[str]) -> str:
    """Return our name of the metric that the best checkpoint is chosen by."""
    name = str(given or "loss").removeprefix("eval_")
    sets = draft.values["data.eval"]
    others = [f"{each}_loss" for each in list(sets)[1:]] if isinstance(sets, dict) else []
    if name in ("loss", *others):
        return f"eval_{name}"
    if METRICS.get(name) in metrics:
        return f"eval_{METRICS[name]}"
    if name in PREFERENCE_METRICS and draft.values.get("train.objective", "sft") not in ("sft", "classify"):
        return f"eval_{PREFERENCE_METRICS[name]}"
    draft.warn(f"metric_for_best_model: {given} is not evaluated here; the best checkpoint is chosen by eval_loss.")
    return "eval_loss"
