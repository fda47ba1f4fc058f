"""The samples of a run as its page shows them: the answers to each prompt, by step."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from qlora.errors import without_secrets

# What the page shows: prompts, steps (the first, the last, and others evenly spread), characters of a text.
MOST_PROMPTS, MOST_STEPS, MOST_CHARACTERS = 12, 21, 2000

Key: TypeAlias = tuple[str, str, int]


def samples_by_prompt(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the steps of samples, and each prompt's answer at each of them, None where it has none.

    Args:
        lines: Lines of samples.jsonl. Their prompts differ if the config was changed between sessions; those of the
            last line come first.
    """
    count = min(MOST_STEPS, len(lines))
    shown = [lines[place * (len(lines) - 1) // max(1, count - 1)] for place in range(count)]
    by_line = [_by_key(line.get("samples", [])) for line in shown]
    prompts: dict[Key, Mapping[str, Any]] = {}
    for samples in reversed(by_line):
        for key, sample in samples.items():
            prompts.setdefault(key, sample)
    return {
        "count": len(prompts),
        "steps": [line["step"] for line in shown],
        "prompts": [
            {
                "prompt": _clipped(sample.get("prompt")),
                "reference": _clipped(sample.get("reference")),
                "answers": [_clipped(samples.get(key, {}).get("answer")) for samples in by_line],
            }
            for key, sample in list(prompts.items())[:MOST_PROMPTS]
        ],
    }


def _by_key(samples: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """Return the samples of a line by prompt, reference, and the number of equal ones before."""
    found: dict[Key, Mapping[str, Any]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for sample in samples:
        text = str(sample.get("prompt")), str(sample.get("reference"))
        found[*text, seen[text]] = sample
        seen[text] += 1
    return found


def _clipped(text: Any) -> str | None:
    if text is None:
        return None
    text = without_secrets(str(text))  # a secret that is clipped is not recognized any more
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
