"""The samples of a run as its page shows them: the answers to each prompt, by step."""

from collections.abc import Mapping, Sequence
from typing import Any

# What the page shows: prompts, steps (the first, the last, and others evenly spread), characters of a text.
MOST_PROMPTS, MOST_STEPS, MOST_CHARACTERS = 12, 21, 2000


def samples_by_prompt(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the steps of samples, and each prompt's answer at each of them, None where it has none.

    Args:
        lines: Lines of samples.jsonl. Their prompts differ if the config was changed between sessions; those of the
            last line come first.
    """
    count = min(MOST_STEPS, len(lines))
    shown = [lines[place * (len(lines) - 1) // max(1, count - 1)] for place in range(count)]
    prompts: dict[str, dict[str, Any]] = {}
    for line in reversed(shown):
        for sample in line.get("samples", []):
            prompts.setdefault(str(sample.get("prompt")), dict(sample))
    answers = [
        {str(sample.get("prompt")): sample.get("answer") for sample in line.get("samples", [])} for line in shown
    ]
    return {
        "count": len(prompts),
        "steps": [line["step"] for line in shown],
        "prompts": [
            {
                "prompt": _clipped(text),
                "reference": _clipped(sample.get("reference")),
                "answers": [_clipped(each.get(text)) for each in answers],
            }
            for text, sample in list(prompts.items())[:MOST_PROMPTS]
        ],
    }


def _clipped(text: Any) -> str | None:
    if text is None:
        return None
    text = str(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
