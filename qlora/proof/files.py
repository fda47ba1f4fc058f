"""What lies beside a merged model's tensors: index, config, tokenizer, template, end tokens; held against the run's."""

from typing import Any

import torch

from qlora.config import RunConfig
from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.files.json_files import parse_object
from qlora.files.stored import StoredTensors, row_blocks
from qlora.model import end_token_ids, load_generation_config, load_tokenizer
from qlora.model.names import embedding_and_head_tensors
from qlora.model.tokenizer import GENERATION_FILE

# Prose, code, numbers, spaces, scripts and signs that tokenizers part ways on.
SAMPLE_TEXTS = (
    "Hello, world! It's the 3rd of May, 12:30.",
    "  two spaces,\ttab,\n\nlines\r\nand a trailing one ",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x ** 2}\n",
    "Grüße, naïve café — “quotes” … 100 €",
    "你好，世界。こんにちは 안녕하세요 Привет مرحبا",
    "🙂👍🏽 ∑ ≤ \u200b\ufeff\u0301e",
    "<s></s><|im_start|>user\n<|im_end|><|eot_id|><unk>[INST]",
)

# Of a config, what a merge may change (and other checks see), and what changes nothing.
MERGED_KEYS = {"dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "vocab_size"}
IDLE_KEYS = {"transformers_version", "_name_or_path"}


def check_weight_files(written: BaseFiles) -> list[str]:
    """Whether whoever loads the folder finds the same tensors, be it by its index or by the files that there are."""
    own = {path.name for path in written.weight_files}
    others = sorted({path.name for path in written.folder.glob("*.safetensors")} - own)
    problems = [f"{name} is no file of the model, and may be loaded in its place or with it" for name in others]
    index = written.folder / "model.safetensors.index.json"
    if index.is_file():
        places = parse_object(index.read_bytes())["weight_map"]
        wrong = sorted(name for name, path in written.tensors.items() if places.get(name) != path.name)
        wrong += sorted({*places} - {*written.tensors})
        if wrong:
            problems.append(f"{index.name} names the wrong file for {len(wrong)} tensors, the first is {wrong[0]}")
    return problems


def check_config(base: BaseFiles, written: BaseFiles, dtype: str) -> list[str]:
    """Whether config.json describes the base; a window or a scaling of positions would show in long texts alone.

    Args:
        base: Its files.
        written: The merged folder.
        dtype: Of the merge.
    """
    expected, found = _described(base.config), _described(written.config)
    problems = [
        f"config.json has {key}: {found.get(key)!r:.80}, the base {expected.get(key)!r:.80}"
        for key in sorted({*expected, *found})
        if expected.get(key) != found.get(key)
    ]
    own = written.config.get("dtype", written.config.get("torch_dtype"))
    return problems if own == dtype else [*problems, f"config.json has dtype: {own!r}, the weights are {dtype}"]


def check_head(base: Any, base_files: BaseFiles, merged: Any, written: BaseFiles) -> list[str]:
    """Whether config and files agree on the output head, shared with the embeddings or of its own, as the base has it.

    Args:
        base: The base's architecture, without weights.
        base_files: Its files.
        merged: The architecture of the merged folder.
        written: That folder.
    """
    problems, is_tied, head = [], _is_tied(merged), _own_head(merged, written)
    if is_tied and head is not None:
        problems.append(f"config.json ties the head to the embeddings, and the files hold another in {head}")
    if not is_tied and head is None and merged.get_output_embeddings() is not None:
        problems.append("config.json gives the head weights of its own, and the files hold none")
    # transformers ties no head that the files hold other values of, whatever the base's config says.
    if is_tied != (_is_tied(base) and _own_head(base, base_files) is None):
        change = "ties the head to the embeddings" if is_tied else "gives the head weights of its own"
        problems.append(f"config.json {change}, and the base does not (tie_word_embeddings)")
    return problems


def check_tokenizer(base: BaseFiles, written: BaseFiles, expected: Any, config: RunConfig) -> list[str]:
    """Check that the folder's tokenizer gives the run's ids, and that template and special tokens are the run's.

    Args:
        base: The base's files.
        written: The merged folder.
        expected: The run's tokenizer.
        config: The run's config.
    """
    try:
        tokenizer = load_tokenizer(written.folder, config.model.trust_remote_code)
        problems = _check_end_tokens(base, written, expected)
        if "pad_token" in config.data.special_tokens:
            problems += _check_pad_token(written, expected)
    except ModelError as error:
        return [str(error)]
    for text in (*SAMPLE_TEXTS, "".join(expected.get_added_vocab())):
        if tokenizer(text).input_ids != expected(text).input_ids:
            problems.append(f"the tokenizer gives other ids for {text!r}")
            break
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, kind) != getattr(expected, kind):
            problems.append(f"the tokenizer's {kind} is {getattr(tokenizer, kind)}, not {getattr(expected, kind)}")
    if tokenizer.chat_template != expected.chat_template:
        problems.append("the chat template is another")
    return problems


def _check_end_tokens(base: BaseFiles, written: BaseFiles, tokenizer: Any) -> list[str]:
    """Whether generation ends where the base's did, and where training taught it to."""
    if not (written.folder / GENERATION_FILE).is_file():
        return [f"{GENERATION_FILE} is missing"]
    own = load_generation_config(base.folder)
    ids = load_generation_config(written.folder).eos_token_id
    found, wanted = {*(ids if isinstance(ids, list) else [ids])} - {None}, {*end_token_ids(own, tokenizer)}
    lost = [f"{GENERATION_FILE} lacks the end token {_show(tokenizer, id_)}" for id_ in sorted(wanted - found)]
    return lost + [f"{GENERATION_FILE} ends at {_show(tokenizer, id_)}" for id_ in sorted(found - wanted)]


def _check_pad_token(written: BaseFiles, tokenizer: Any) -> list[str]:
    """Check that generation pads with the token that the config sets."""
    found = load_generation_config(written.folder).pad_token_id
    wanted = tokenizer.pad_token_id
    return [] if found == wanted else [f"{GENERATION_FILE} has pad_token_id {found}, not {_show(tokenizer, wanted)}"]


def _described(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of the architecture; of a model with images, in a part of it too."""
    return {
        key: _described(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in MERGED_KEYS | IDLE_KEYS
    }


def _is_tied(skeleton: Any) -> bool:
    head, embeddings = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def _own_head(skeleton: Any, files: BaseFiles) -> str | None:
    """The tensor that holds the head, unless it holds the embeddings once more."""
    embeddings, head = embedding_and_head_tensors(skeleton, files.tensors)
    if head is None or embeddings is None or not _is_tied(skeleton):
        return head
    stored = StoredTensors(files.headers)
    is_same = stored.shape(head) == stored.shape(embeddings) and all(
        torch.equal(stored.read(head, rows), stored.read(embeddings, rows)) for rows in row_blocks(stored.shape(head))
    )
    return None if is_same else head


def _show(tokenizer: Any, token_id: int) -> str:
    return f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r})"
