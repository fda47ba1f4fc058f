"""The architectures to check, and a process for each, so that one that crashes or hangs ends alone."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

from scripts.dev.support import checks

# Models of images and text whose text part is tuned, beside those that transformers also has as causal models.
WITH_IMAGES = (
    "aya_vision", "gemma3", "glm4v", "idefics3", "internvl", "llava", "llava_next", "mistral3", "mllama", "paligemma",
    "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip


@cache
def architectures() -> dict[str, str]:
    """Return the name of the auto class of each model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with_images = dict.fromkeys(WITH_IMAGES, "AutoModelForImageTextToText")
    return dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM") | with_images


def check_all(
    names: Sequence[str], tokenizer: Path, jobs: int = 1, limit: int = 240
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check architectures, each in a process of its own; yield their names with the findings as they end.

    Args:
        names: Model types.
        tokenizer: Folder of the tokenizer.
        jobs: Number of processes at a time.
        limit: Seconds after which a process is ended.
    """
    _import_once()
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(check_one, name, tokenizer, limit): name for name in names}
        for done in as_completed(pending):
            yield pending[done], done.result()


def check_one(name: str, tokenizer: Path, limit: int) -> dict[str, Any]:
    """Check one architecture in a process of its own; return the findings."""
    with tempfile.TemporaryDirectory(prefix="support-") as folder:
        child = multiprocessing.get_context("fork").Process(target=_child, args=(name, tokenizer, Path(folder)))
        child.start()
        child.join(limit)
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            return {checks.FAILED: f"took longer than {limit} s", "wrong": [checks.FAILED]}
        result = Path(folder) / "result.json"
        if not result.is_file():
            return {checks.FAILED: f"the process ended with {child.exitcode}", "wrong": [checks.FAILED]}
        text = result.read_text(encoding="utf-8").replace(f"{folder}/base", name).replace(f"{folder}/", "")
        return json.loads(text)


def _child(name: str, tokenizer: Path, folder: Path) -> None:
    """Check one architecture, and leave the findings in the folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    sys.stderr = sys.stdout = (folder / "output.txt").open("w", encoding="utf-8")
    try:
        found = checks.check(
            transformers.CONFIG_MAPPING[name], getattr(transformers, architectures()[name]), tokenizer, folder
        )
    except Exception:
        found = {checks.FAILED: traceback.format_exc(limit=-2), "wrong": [checks.FAILED]}
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")


def _import_once() -> None:
    """Import what every process needs before they are forked."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers
    import transformers.integrations.bitsandbytes  # noqa: F401

    import qlora.proof
    import qlora.training  # noqa: F401

    transformers.logging.set_verbosity_error()
