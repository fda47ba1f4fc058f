"""Compare a release's answers in the programs that serve it with its run's."""

import errno
import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import wrap_adapter
from qlora.data import encode_prompt
from qlora.errors import ExportError
from qlora.export.gguf.adapter import FORMAT as ADAPTER_FORMAT
from qlora.export.gguf.model import write_gguf
from qlora.export.merged import Merged
from qlora.files.atomic import free_bytes, space_left
from qlora.files.shards import TensorLayout
from qlora.model import AdapterSource, BaseWeights, end_token_ids, load_adapted, load_base, resolve_device
from qlora.model.host_memory import return_freed_memory
from qlora.own_process import KilledProcessError
from qlora.proof.engines import CONTEXT, ENGINES, Engine, Prompt, Release, Reply, greedy
from qlora.proof.predictions import PROMPTS

MESSAGES = ("Hello! Who are you?", "Name three rivers, and say where each of them ends.")
# Difference of two tokens' logits, as a share of the deviation of all, up to which a client's arithmetic may choose
# either. For 16 and 32 bits it is twice the largest differences measured in docs/benchmarks/release.md. The coarse one
# is for bf16, and for weights of few bits, which clients multiply with activations in 8: 0.14 was measured there.
ROUNDING = {"float32": 0.02, "float16": 0.02}
COARSE_ROUNDING = 0.2


@dataclass(slots=True)
class Served:
    """A release's answers in one client.

    Attributes:
        version: Version of the client; None if it is not installed.
        prompts: Number of prompts that were answered.
        equal: Number of answers with the run's tokens.
        rounded: Number of answers that differ where rounding decides: the release's weights, computed by qlora, prefer
            the client's token too, or put both within the client's rounding.
        largest_lead: Largest lead of the run's token over the client's there, as a share of the deviation of the run's
            logits.
        problems: Answers and prompts that differ otherwise.
        reason: Why nothing was compared; empty if it was.
    """

    version: str | None = None
    prompts: int = 0
    equal: int = 0
    rounded: int = 0
    largest_lead: float = 0.0
    problems: list[str] = field(default_factory=list)
    reason: str = ""

    def __str__(self) -> str:
        if self.version is None:
            return self.reason
        if self.reason:
            return f"{self.version}: not compared: {self.reason}"
        if self.problems:
            return f"{self.version}: differs, see above"
        text = f"{self.version}: {self.equal} of {self.prompts} answers are the run's"
        if self.rounded:
            text += (
                f", {self.rounded} differ by rounding (the run's token led by at most {self.largest_lead:.2g} of the "
                "logits' deviation)"
            )
        return text


def check_installed(source: AdapterSource, merged: Merged) -> list[Engine]:
    """Return the installed clients that load a release.

    Raises:
        ExportError: None of them is installed, or the release does not predict tokens.
    """
    if source.head is not None:
        raise ExportError(f"--clients (in_clients) compares answers, and {source.path} scores what it reads; omit it.")
    engines = [engine for engine in ENGINES if merged.format in engine.formats]
    installed = [engine for engine in engines if engine.version is not None]
    if not installed:
        names = " or ".join(engine.name for engine in engines)
        raise ExportError(f"--clients (in_clients): no client of {merged.format} is installed: pip install {names}.")
    return installed


def serve(source: AdapterSource, merged: Merged, device: str, installed: Sequence[Engine]) -> dict[str, Served]:
    """Compare the greedy answers to a few prompts in each installed client with those of the run.

    A client has to make the same tokens of a prompt as training did. Where its first differing token is not the run's,
    the release's own weights, which were compared with the run's before, are run on the tokens so far.

    Args:
        source: The adapter.
        merged: The release.
        device: Device to run the models on.
        installed: Result of :func:`check_installed`.

    Returns:
        The result of each client that loads this format, by its name.

    Raises:
        ExportError: The temporary folder has no room for the base of an adapter in a GGUF file.
    """
    model, tokenizer = load_adapted(source, device, "none" if merged.onto == "original" else "nf4")
    prompts = [Prompt(text, is_message=False) for text in PROMPTS]
    if tokenizer.chat_template is not None and merged.format != ADAPTER_FORMAT:  # its base has a template of its own
        prompts += [Prompt(text, is_message=True) for text in MESSAGES]
    ends = {
        "eos_token_id": end_token_ids(model.generation_config, tokenizer),
        "pad_token_id": tokenizer.eos_token_id,
    }
    expected, chosen_from = [], []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt.messages) if prompt.is_message else tokenizer(prompt.text).input_ids
        answer, logits_of_run = greedy(model, ids, **ends)
        expected.append(Reply(ids, answer))
        chosen_from.append(logits_of_run)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    context = min(CONTEXT, positions)
    del model
    _free()
    served = {
        engine.name: Served(reason=f"not installed, so not run: pip install {engine.name}")
        for engine in ENGINES
        if merged.format in engine.formats
    }
    replies: dict[str, list[Reply]] = {}
    with _as_release(source, merged, str(resolve_device(device)), context) as release:
        for engine in installed:
            try:
                replies[engine.name] = engine.run(release, prompts)
                served[engine.name] = Served(engine.version, len(prompts))
            except Exception as error:  # of any kind, from a library that is not ours; it may lack a GPU, or memory
                message = " ".join(str(error).split())
                if not isinstance(error, ChildProcessError):  # which names the kind itself
                    message = f"{type(error).__name__}: {message}"
                if isinstance(error, KilledProcessError) and error.signal in (signal.SIGILL, signal.SIGSEGV):
                    message += engine.after_crash
                served[engine.name] = Served(engine.version, reason=f"it failed: {message}")
            _free()
    differences = {name: list(_differences(expected, found)) for name, found in replies.items()}
    logits = _LastLogits(lambda: _load_release(source, merged, device))
    for name, found in differences.items():
        served[name].equal = len(prompts) - len(found)
        for number, place in found:
            reply = replies[name][number]
            problem = _other_ids(expected[number], reply, place, tokenizer)
            if not problem and place is not None:
                tokens = expected[number].ids[place], reply.ids[place]
                lead = _lead(chosen_from[number][place], *tokens)
                kept = _lead(logits(expected[number].prompt_ids + expected[number].ids[:place]), *tokens)
                problem = _other_token(lead, kept, merged, tokenizer.convert_ids_to_tokens(tokens), place)
                served[name].largest_lead = max(served[name].largest_lead, lead)
            if problem:
                served[name].problems.append(f"{name} on {prompts[number].text!r}: {problem}")
            else:
                served[name].rounded += 1
    return served


class _LastLogits:
    """Logits of a model that is loaded when they are first asked for."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._model: Any = None

    @torch.no_grad()
    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after the last id, (vocabulary,) fp32 on the CPU."""
        if self._model is None:
            self._model = self._load()
        given = torch.tensor([list(ids)], device=self._model.device)
        return self._model(input_ids=given, use_cache=False).logits[0, -1].float().cpu()


def _differences(expected: Sequence[Reply], found: Sequence[Reply]) -> Iterator[tuple[int, int | None]]:
    """Yield the number of each differing reply, with the first differing place of its answer; None for its prompt."""
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one.prompt_ids != other.prompt_ids:
            yield number, None
        elif one.ids != other.ids:
            pairs = enumerate(zip(one.ids, other.ids, strict=False))
            yield number, next((place for place, (p, q) in pairs if p != q), min(len(one.ids), len(other.ids)))


def _other_ids(expected: Reply, found: Reply, place: int | None, tokenizer: Any) -> str:
    """Return how a reply differs that has another prompt or another length; empty if it has another token."""
    if place is None:
        return f"it feeds the tokens {_format_ids(found.prompt_ids)}, training fed {_format_ids(expected.prompt_ids)}"
    if place == len(found.ids):
        last = tokenizer.convert_ids_to_tokens(found.ids[-1:]) or ["the prompt"]
        return f"it ends the answer after {last[0]!r}, which does not end the run's"
    if place == len(expected.ids):
        return f"it goes on after {tokenizer.convert_ids_to_tokens(expected.ids[-1])!r}, which ends the run's answer"
    return ""


def _lead(logits: torch.Tensor, token: int, other: int) -> float:
    """Return how far a token is above another, as a share of the deviation of all logits."""
    return ((logits[token] - logits[other]) / logits.std()).item()


def _other_token(lead: float, kept: float, merged: Merged, tokens: Sequence[str], place: int) -> str:
    """Return what is wrong with another token than the run's; empty if rounding explains it.

    Args:
        lead: Lead of the run's token over the client's, in the run.
        kept: The same, with the release's weights computed here.
        merged: The release.
        tokens: The run's token and the client's.
        place: Place of the token in the answer.
    """
    is_plain = merged.dtype in ("float32", "float16", "bfloat16")
    most = ROUNDING.get(merged.dtype, COARSE_ROUNDING)
    what = f"token {place + 1} of the answer is {tokens[1]!r}, the run's is {tokens[0]!r}, which leads"
    if not kept <= most:
        return f"{what} by {kept:.2g} of the logits' deviation with the release's weights; rounding explains {most:g}"
    if is_plain and merged.onto == "dequantized" and not lead <= COARSE_ROUNDING:
        return f"{what} by {lead:.2g} of the logits' deviation in the run; rounding explains {COARSE_ROUNDING:g}"
    return ""


def _format_ids(ids: Sequence[int]) -> str:
    """Return the first ids, and the number of all if there are more."""
    return f"{list(ids)[:8]}" + (f"… ({len(ids)})" if len(ids) > 8 else "")


@contextmanager
def _as_release(source: AdapterSource, merged: Merged, device: str, context: int) -> Iterator[Release]:
    """Yield a release as clients load it; an adapter's with its base, written as GGUF until it has been run."""
    options: dict[str, Any] = {"device": device, "context": context, "trust_remote_code": source.trust_remote_code}
    if merged.format != ADAPTER_FORMAT:
        yield Release(merged.gguf or merged.folder, merged.dtype, **options)
        return
    weights, folder = BaseWeights(source.base_files()), source.base_files().folder
    layout = [TensorLayout(name, shape, torch.float32) for name, shape in weights.shapes.items()]
    needed = sum(entry.num_bytes for entry in layout) // 2  # vectors stay in fp32, but are small
    with tempfile.TemporaryDirectory() as written:
        base = Path(written) / "base-f16.gguf"
        try:
            if needed > free_bytes(base):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_gguf(folder, layout, lambda name: weights.read(name).float(), base)
        except OSError as problem:
            raise ExportError(
                f"The base can't be written as GGUF into {written} for llama.cpp: {problem}."
                f"{space_left(base, needed)} Set TMPDIR to a folder with more room."
            ) from problem
        yield Release(base, "float16", **options, adapter=merged.gguf)


def _load_release(source: AdapterSource, merged: Merged, device: str) -> Any:
    """Load the release's weights into a model here."""
    if merged.format == ADAPTER_FORMAT:
        model, _ = load_base(
            source.base, "none", compute_dtype="float16", device=device, trust_remote_code=source.trust_remote_code
        )
        wrap_adapter(model, source.read())
        return model.eval()
    is_plain = merged.dtype in ("float32", "float16", "bfloat16")
    model, _ = load_base(
        str(merged.gguf or merged.folder),
        "none",
        compute_dtype=merged.dtype if is_plain else "float16",
        device=device,
        trust_remote_code=source.trust_remote_code,
        whole=merged.gguf is None,
    )
    return model


def _free() -> None:
    """Free the memory of a model that is gone, for the next one, which may be in another process."""
    gc.collect()
    torch.cuda.empty_cache()
    return_freed_memory()
