"""Conversations, templates and real tokenizers for the tests of this folder."""

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora.data.encode import Encoded, ExampleEncoder
from qlora.data.examples import Conversation, Example
from qlora.data.template import apply_template
from qlora.data.tokens import TokenizedExample
from qlora.errors import DataError
from tests.tiny import make_tokenizer

TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"
WITHOUT_END = TURN + "{% endfor %}" + PROMPT
REWRITING = (
    TURN.replace("m.content", "'<gone>' if m.role == 'assistant' and not loop.last else m.content")
    + "{{ eos_token }}{% endfor %}"
    + PROMPT
)
CALL_ID = "abcdefgh1"
FUNCTION = {
    "name": "weather",
    "description": "Tells it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": CALL_ID, "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
# What looks like a control token in a template; a real tokenizer of its family has each as a special token.
CONTROL = re.compile(
    r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|\[/?[A-Z_]+\]|\[gMASK\]|<\|[a-z_]+>|<[a-z_]+\|>"
    r"|<(?:start_of_turn|end_of_turn|end_of_utterance|sep|sop|eop|seed:[a-z:_]+)>"
)


def words(rng: Random, alphabet: str = "abc XYZ.\né漢🙂") -> str:
    return "".join(rng.choices(alphabet, k=rng.randrange(1, 30)))


def phrase(rng: Random) -> str:
    """Words with no blank at either end, which templates may cut off.

    The last is ASCII: where a generation mark ends in a character of several tokens, transformers marks the first only.
    """
    said = rng.choices(["alpha", "beta,", "delta.", "(eta)", "12", "é漢🙂"], k=rng.randrange(3, 9))
    return " ".join([*said, rng.choice(["theta", "iota."])])


def turns(*contents: str) -> list[dict[str, Any]]:
    """Contents said by user and assistant in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def chat(rng: Random, kind: str) -> Conversation:
    """A random conversation: single, multi, system, reasoning or tools."""
    if kind == "tools":
        called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        result = {"role": "tool", "name": "weather", "tool_call_id": CALL_ID, "content": phrase(rng)}
        question, *rest = turns(phrase(rng), phrase(rng), phrase(rng), phrase(rng))
        return Conversation([question, called, result, *rest], TOOLS)
    messages = turns(*(phrase(rng) for _ in range(2 if kind == "single" else 6)))
    if kind == "reasoning":
        messages = [
            turn | ({"reasoning_content": phrase(rng)} if turn["role"] == "assistant" else {}) for turn in messages
        ]
    return Conversation([{"role": "system", "content": f"Obey {phrase(rng)}"}] * (kind == "system") + messages)


def answers(conversation: Conversation) -> list[int]:
    return [turn for turn, message in enumerate(conversation.messages) if message["role"] == "assistant"]


def encoder(template: str = "alpaca", loss_on: str = "assistant", add_bos: bool = True) -> ExampleEncoder:
    tokenizer = make_tokenizer(add_bos)
    if template in ("alpaca", "chatml"):
        apply_template(tokenizer, template)
    else:
        tokenizer.chat_template = template
    return ExampleEncoder(tokenizer, loss_on)


def encode(encoder: ExampleEncoder, example: Example) -> Encoded:
    """One example; an error is raised."""
    (result,) = encoder.encode([example])
    if isinstance(result, DataError):
        raise result
    return result


def stretches(example: TokenizedExample) -> list[tuple[int, int]]:
    """Where its supervised stretches begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], example.loss_mask.astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def supervised_texts(encoder: ExampleEncoder, example: TokenizedExample) -> list[str]:
    """The supervised stretches of an example, decoded."""
    return [encoder.tokenizer.decode(example.input_ids[begin:end]) for begin, end in stretches(example)]


@cache
def _load(folder: Path) -> tuple[Any, Any]:
    if folder.name == "gpt2":
        model = models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(Tokenizer(model), trim=False))
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        return tokenizer, None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, tokenizer.chat_template


def real_tokenizer(realdata: Path, name: str) -> Any:
    """A tokenizer of the real data, with its own template."""
    tokenizer, tokenizer.chat_template = _load(realdata / "tokenizers" / name)
    return tokenizer


@cache
def trimming_gpt2(realdata: Path) -> Any:
    """GPT-2's tokenizer with spans that leave out the blanks of its tokens, as Llama-3's do."""
    inner = Tokenizer.from_str(real_tokenizer(realdata, "gpt2").backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(inner, trim=True), eos_token="<|endoftext|>")


def _byte_level(tokenizer: Tokenizer, trim: bool) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return tokenizer


def family_tokenizer(realdata: Path, path: Path) -> Any:
    """A real tokenizer that knows the control tokens of a template, with the template in place."""
    return tokenizer_for(realdata, path.read_text(encoding="utf-8"))


def tokenizer_for(realdata: Path, text: str) -> Any:
    """The same, by the template's text."""
    inner = Tokenizer.from_str(real_tokenizer(realdata, "minimind").backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|endoftext|>")
    controls = [AddedToken(token, special=True, normalized=False) for token in sorted(set(CONTROL.findall(text)))]
    tokenizer.add_tokens(controls, special_tokens=True)
    tokenizer.chat_template = text
    return tokenizer
