"""A tokenizer in a GGUF file: tokens, their types, merges or scores, and special ids."""

import json
import re
from dataclasses import dataclass
from typing import Any

from qlora.data import answer_end_id
from qlora.errors import ExportError

SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNMERGED_SCORE = -1000.0
NUM_ENDS = 3  # eos, eot, eom
OTHER_WAY = "Merge to a folder and give that to llama.cpp's convert_hf_to_gguf.py; see docs/release.md."

_GPT2 = "a regex of its own"
_DIGITS = "single digits"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names (src/llama-vocab.cpp) by how text is split, and by whether a piece that is a token itself skips
# the merges.
PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as a GGUF file describes it.

    Attributes:
        model: `gpt2` for BPE over bytes, `llama` for SentencePiece's BPE.
        pre: Name of how text is split before the merges.
        tokens: One for each row of the embedding.
        types: llama.cpp's number for the kind of each token.
        merges: Merges, for `gpt2`.
        scores: Scores, for `llama`: tokens with higher scores are merged first.
        special: Ids by name: bos, eos, eot, eom, unk, pad.
        adds: Whether bos and eos are added around a text, and a space in front.
        template: The chat template, or several by name.
        notes: Where llama.cpp's tokens differ from the tokenizer's.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    adds: dict[str, bool]
    template: str | dict[str, str] | None
    notes: list[str]

    def add_to(self, writer: Any) -> None:
        """Add the tokenizer to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_token_scores(self.scores)
        for name, token_id in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token_id)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        writer.add_add_space_prefix(self.adds["space"])
        if isinstance(self.template, dict):
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.template.items()])
        elif self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(tokenizer: Any, num_rows: int, end_token_ids: list[int], bos_token_id: int | None) -> Vocabulary:
    """Read a tokenizer of transformers.

    Args:
        tokenizer: A fast tokenizer, which has a tokenizer.json.
        num_rows: Rows of the embedding; ids without a token get placeholders.
        end_token_ids: All ids that end an answer.
        bos_token_id: The id in the model's config, for tokenizers that have none.

    Raises:
        ExportError: llama.cpp has no equivalent tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} has no tokenizer.json, so it can't be written as GGUF.")
    description = json.loads(backend.to_str())
    model, added = description["model"], {token["id"]: token for token in description["added_tokens"]}
    if model["type"] != "BPE":
        raise ExportError(f"The tokenizer is {model['type']}; GGUF export supports BPE only. {OTHER_WAY}")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    texts = {token_id: text for text, token_id in model["vocab"].items()}
    texts |= {token_id: token["content"] for token_id, token in added.items()}
    if max(texts) >= num_rows:
        raise ExportError(f"The tokenizer has ids up to {max(texts)}, the embedding {num_rows} rows.")

    is_sentencepiece = bool(model.get("byte_fallback"))
    if is_sentencepiece:
        _check_spaces_alone(description)
    pre = "default" if is_sentencepiece else _pre_tokenizer_name(description)
    tokens = [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(num_rows)]
    types = [_token_type(token_id, texts, added, model.get("unk_token")) for token_id in range(num_rows)]
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    before, after = whole[:start], whole[start + len(bare) :]
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else bos_token_id
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[] if is_sentencepiece else [" ".join(merge) for merge in merges],
        scores=_scores(tokens, merges) if is_sentencepiece else [],
        special=_special_ids(tokenizer, bos, end_token_ids, is_sentencepiece),
        adds={
            "bos": before[:1] == [bos] and bos is not None,
            "eos": after[-1:] == [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None,
            "space": tokens[bare[0]].startswith(SPACE),
        },
        template=tokenizer.chat_template,
        notes=_notes(tokenizer, description, is_sentencepiece, end_token_ids),
    )


def _check_spaces_alone(description: dict[str, Any]) -> None:
    """Check that text is not split and only spaces are changed before the merges, as in llama.cpp.

    Raises:
        ExportError: More is changed, so llama.cpp's tokens would differ from those of training.
    """
    parts = (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
    steps = [step for key, inner in parts if (whole := description[key]) for step in whole.get(inner, [whole])]
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "▁"} | {"type": "Metaspace", "replacement": "▁", "split": False}:
                continue
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                continue
        raise ExportError(
            f"The tokenizer changes or splits text in a way that llama.cpp's SentencePiece does not: "
            f"{json.dumps(step)}. {OTHER_WAY}"
        )


def _pre_tokenizer_name(description: dict[str, Any]) -> str:
    """Return llama.cpp's name for splitting text in the same way.

    Raises:
        ExportError: There is none; with another one, llama.cpp's tokens would differ from those of training.
    """
    steps = description["pre_tokenizer"] or {}
    parts = [_splitting(step) for step in steps.get("pretokenizers", [steps])]
    key = (tuple(part for part in parts if part), bool(description["model"].get("ignore_merges")))
    normalizer = (description["normalizer"] or {}).get("type")
    if key not in PRE_TOKENIZERS or normalizer not in (None, "NFC"):
        raise ExportError(
            f"llama.cpp has no known name for how the tokenizer splits text "
            f"(normalizer {normalizer}, {' then '.join(key[0]) or 'no split'}, ignore_merges {key[1]}). {OTHER_WAY}"
        )
    return PRE_TOKENIZERS[key]


def _splitting(step: dict[str, Any]) -> str:
    """Return how a step splits text; empty if it does not."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _GPT2 if use_regex else ""
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return regex
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
    return json.dumps(step)


def _token_type(token_id: int, texts: dict[int, str], added: dict[int, dict[str, Any]], unknown: str | None) -> int:
    from gguf import TokenType

    if token_id not in texts:
        return int(TokenType.UNUSED)
    if unknown is not None and texts[token_id] == unknown:
        return int(TokenType.UNKNOWN)
    if token_id in added:
        return int(TokenType.CONTROL if added[token_id]["special"] else TokenType.USER_DEFINED)
    return int(TokenType.BYTE if BYTE_TOKEN.fullmatch(texts[token_id]) else TokenType.NORMAL)


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return SentencePiece's scores; a tokenizer.json lists the pairs in the order of their results' scores."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge), len(ranks))
    return [float(-ranks[token]) if token in ranks else UNMERGED_SCORE for token in tokens]


def _notes(tokenizer: Any, description: dict[str, Any], is_sentencepiece: bool, ends: list[int]) -> list[str]:
    notes = []
    normalizer = (description["normalizer"] or {}).get("type")
    if normalizer == "NFC":
        notes.append("llama.cpp does not normalize text to NFC first")
    if is_sentencepiece and tokenizer.eos_token is not None:
        first = tokenizer("a", add_special_tokens=False).input_ids
        after_special = tokenizer(f"{tokenizer.eos_token}a", add_special_tokens=False).input_ids[1:]
        if first != after_special:
            notes.append("llama.cpp adds a space after a special token, the tokenizer does not")
    if len(ends) > NUM_ENDS:
        notes.append(f"{NUM_ENDS} of the {len(ends)} tokens that end an answer are written; GGUF has no room for more")
    return notes


def _special_ids(tokenizer: Any, bos: int | None, ends: list[int], with_unknown: bool) -> dict[str, int]:
    """Return ids by GGUF's names, which include three for tokens that end an answer."""
    eos = tokenizer.eos_token_id
    ids = {"bos": bos, "eos": eos, "pad": tokenizer.pad_token_id}
    trained = answer_end_id(tokenizer)  # comes first
    others = sorted({*ends} - {eos}, key=lambda token_id: (token_id != trained, token_id))
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    if with_unknown:
        ids["unk"] = tokenizer.unk_token_id
    return {name: token_id for name, token_id in ids.items() if token_id is not None}
