"""docs/support.md: a row for each architecture, in a table for each way that its checks can end."""

from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from scripts.dev.support import checks

NUMBERS = ("base", "step 0", "packed", "merged", "verify", "PEFT")
# Of an error of transformers, which may list all of its classes.
MOST_CHARACTERS = 240
TRAINED, REFUSED, OPEN, NOT_RUN = "Trained", "Refused", "Open", "Not run"
HEAD = """# Supported architectures

Architectures of transformers that have a causal language model, or whose text part can be trained, each tried with a
tiny random model: trained for two steps in fp32, merged, verified, and read by PEFT. The page is written by

```bash
python -m scripts.dev.support              # every row
python -m scripts.dev.support llama qwen3  # these rows
```

{versions}. {counts}

A tiny random model shows whether the code is right for an architecture, not how well its models learn. An architecture
without a row has not been checked yet.
"""
ABOUT = {
    TRAINED: f"""- **in 4 bits**, **adapted**: shares of the weights of linear layers and experts, without the output
  head. What is missing stays in 16 bits, or has no adapter.
- **base**: logits of the base as qlora loads it, compared with transformers on weights that bitsandbytes quantized.
- **step 0**: largest change of a logit by adapters before the first step.
- **packed**: loss of documents packed into one sequence, compared with their losses one by one; or that they are not
  packed, because the architecture would let them change each other.
- **merged**: logits of the merged folder, loaded by transformers alone, compared with the run's.
- **verify**: what `qlora verify` says of the merged folder.
- **PEFT**: logits of the adapter, loaded by PEFT onto the same weights, compared with the run's.

Differences are relative to the largest logit. Bounds: {checks.LOGITS:g}, {checks.LOSSES:g} for losses, and 0 at step 0.

| architecture | class | in 4 bits | adapted | base | step 0 | packed | merged | verify | PEFT |
|---|---|---|---|---|---|---|---|---|---|""",
    REFUSED: """qlora says so before the first step, or before it writes anything.

| architecture | message |
|---|---|""",
    OPEN: """These have a finding outside of its bounds, or an error without a sentence of qlora's.

| architecture | finding |
|---|---|""",
    NOT_RUN: """No tiny model of these could be built or run by transformers alone, from the defaults of their configs.

| architecture | why |
|---|---|""",
}  # fmt: skip


def row_of(name: str, found: dict[str, Any]) -> tuple[str, str]:
    """Return the section that an architecture's row belongs to, and the row."""
    if checks.NOT_RUN in found:
        return NOT_RUN, _line(name, shorten(found[checks.NOT_RUN], MOST_CHARACTERS, placeholder=" …"))
    if found["wrong"]:
        return OPEN, _line(name, "; ".join(_finding(each, found) for each in found["wrong"]))
    if checks.REFUSED in found:
        return REFUSED, _line(name, found[checks.REFUSED])
    shares = [f"{found[key]:.0%}" for key in ("in 4 bits", "adapted")]
    return TRAINED, _line(name, found["class"], *shares, *(_cell(key, found.get(key, "")) for key in NUMBERS))


def read_rows(path: Path) -> dict[str, tuple[str, str]]:
    """Return the rows of a page by architecture, each with its section."""
    rows: dict[str, tuple[str, str]] = {}
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith("| architecture |"):
            rows[line.split(" | ")[0][2:]] = section, line
    return rows


def write_page(path: Path, rows: dict[str, tuple[str, str]]) -> None:
    """Write the page, with the rows of each section in the order of the alphabet."""
    lines = {kind: [rows[name][1] for name in sorted(rows) if rows[name][0] == kind] for kind in ABOUT}
    counts = f"Of {len(rows)} architectures, " + ", ".join(
        f"{len(lines[kind])} {words}"
        for kind, words in {
            TRAINED: "are trained", REFUSED: "are refused", OPEN: "have an open finding", NOT_RUN: "were not run",
        }.items()
    )  # fmt: skip
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes", "peft"))
    text = HEAD.format(versions=versions, counts=f"{counts}.")
    for kind, about in ABOUT.items():
        if lines[kind]:
            text += "\n".join(["", f"## {kind}", "", about, *lines[kind], ""])
    path.write_text(text, encoding="utf-8")


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _cell(key: str, value: Any) -> str:
    if isinstance(value, str):
        return "not packed" if key == "packed" else value
    return "0" if value == 0 else f"{value:.0e}"


def _finding(name: str, found: dict[str, Any]) -> str:
    value = found.get(name)
    return name if value is None else f"{name}: {value if isinstance(value, str) else f'{value:.2g}'}"
