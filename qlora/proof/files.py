"""Verify a merged folder's files other than tensors: index, config, tokenizer, chat template and end tokens."""

from collections.abc import Set
from typing import Any

import torch

from qlora.data import ImageProcessor
from qlora.data.images import PROCESSOR_FILE
from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.files.json_files import parse_object
from qlora.files.stored import row_blocks
from qlora.lora import ScoreHead, input_embedding, output_head, stored_head
from qlora.model import AdapterSource, BaseWeights, end_token_ids, load_generation_config, load_processor
from qlora.model.names import embedding_and_head_tensors, names_in_files
from qlora.model.tokenizer import GENERATION_FILE

# Prose, code, numbers, spaces, scripts and symbols on which tokenizers differ.
SAMPLE_TEXTS = (
    "Hello, world! It's the 3rd of May, 12:30.",
    "  two spaces,\ttab,\n\nlines\r\nand a trailing one ",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x ** 2}\n",
    "Grüße, naïve café — “quotes” … 100 €",
    "你好，世界。こんにちは 안녕하세요 Привет مرحبا",
    "🙂👍🏽 ∑ ≤ \u200b\ufeff\u0301e",
    "<s></s><|im_start|>user\n<|im_end|><|eot_id|><unk>[INST]",
)

# Keys of a config that a merge may change (verified elsewhere), and keys without effect.
MERGED_KEYS = {"dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "vocab_size"}
# Keys that a head of scores changes.
HEAD_KEYS = {"architectures", "id2label", "label2id", "num_labels", "problem_type", "pad_token_id"}
IDLE_KEYS = {"transformers_version", "_name_or_path"}


def check_weight_files(written: BaseFiles) -> list[str]:
    """Check that loading by the index and loading all files give the same tensors.

    Returns:
        A line for each mismatch.
    """
    own = {path.name for path in written.weight_files}
    others = sorted({path.name for path in written.folder.glob("*.safetensors")} - own)
    problems = [f"{name} is not a file of the model, and may be loaded with it or instead of it" for name in others]
    index = written.folder / "model.safetensors.index.json"
    if index.is_file():
        places = parse_object(index.read_bytes())["weight_map"]
        wrong = sorted(name for name, path in written.tensors.items() if places.get(name) != path.name)
        wrong += sorted({*places} - {*written.tensors})
        if wrong:
            problems.append(f"{index.name} names the wrong file for {len(wrong)} tensors; the first is {wrong[0]}")
    return problems


def check_config(base: BaseFiles, written: BaseFiles, dtype: str, head: ScoreHead | None = None) -> list[str]:
    """Check that config.json describes the base's architecture.

    The comparison of predictions could miss a difference, since a window or a scaling of positions affects only long
    texts.

    Args:
        base: Files of the base.
        written: The merged folder.
        dtype: Dtype of the merge.
        head: Head that scores documents, in place of the base's.

    Returns:
        A line for each mismatch.
    """
    changed = MERGED_KEYS if head is None else MERGED_KEYS | HEAD_KEYS
    expected, found = (_described(each.config, changed) for each in (base, written))
    problems = [
        f"config.json has {key}: {found.get(key)!r:.80}, the base {expected.get(key)!r:.80}"
        for key in sorted({*expected, *found})
        if expected.get(key) != found.get(key)
    ]
    own = written.config.get("dtype", written.config.get("torch_dtype"))
    return problems if own == dtype else [*problems, f"config.json has dtype: {own!r}, the weights are {dtype}"]


def check_scores(written: BaseFiles, head: ScoreHead, pad_id: int | None) -> list[str]:
    """Check that config.json describes a model that scores documents as its run did.

    Args:
        written: The merged folder.
        head: Head of the run.
        pad_id: Id of the run's padding token, before which transformers reads the scores.

    Returns:
        A line for each mismatch.
    """
    found = stored_head(written.config)
    if found is None:
        return [f"config.json has architectures: {written.config.get('architectures')!r:.80}, which score no documents"]
    return [
        f"config.json has {key}: {own!r:.80}, the run {wanted!r:.80}"
        for key, own, wanted in (
            (
                "id2label",
                found.config()["id2label"],
                head.config()["id2label"],
            ),  # a head may name its labels LABEL_0, …
            ("problem_type", found.problem_type, head.problem_type),
            ("pad_token_id", written.config.get("pad_token_id"), pad_id),
        )
        if own != wanted
    ]


def check_head(base: Any, base_files: BaseFiles, merged: Any, written: BaseFiles) -> list[str]:
    """Check that config and files agree on whether the output head is tied, and that it is tied as in the base.

    Args:
        base: Skeleton of the base.
        base_files: Files of the base.
        merged: Skeleton of the merged model.
        written: The merged folder.

    Returns:
        A line for each mismatch.
    """
    problems, is_tied, head = [], _is_tied(merged), _own_head(merged, written)
    if is_tied and head is not None:
        problems.append(f"config.json ties the head to the embeddings, but the files have a different one in {head}")
    if not is_tied and head is None and output_head(merged) is not None:
        problems.append("config.json does not tie the head to the embeddings, but the files have no weights for it")
    # transformers does not tie a head whose stored values differ, even if the base's config says so.
    if is_tied != (_is_tied(base) and _own_head(base, base_files) is None):
        change = "ties the head to the embeddings" if is_tied else "does not tie the head to the embeddings"
        problems.append(f"config.json {change}, unlike the base (tie_word_embeddings)")
    return problems


def check_tokenizer(base: BaseFiles, written: BaseFiles, expected: Any, source: AdapterSource) -> list[str]:
    """Check that the folder's tokenizer has the adapter's ids, chat template and special tokens.

    Of a model of images, the settings of the image processor are compared.

    Args:
        base: Files of the base.
        written: The merged folder.
        expected: Tokenizer of the adapter.
        source: The adapter and its base.

    Returns:
        A line for each mismatch.
    """
    try:
        tokenizer = load_processor(written.folder, source.trust_remote_code)
        if isinstance(expected, ImageProcessor):
            return [] if _same_settings(tokenizer, expected) else [f"{PROCESSOR_FILE} differs from the run's"]
        problems = _check_end_tokens(base, written, expected)
        if source.sets_pad_token:
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
        problems.append("the chat template differs from the run's")
    return problems


def _same_settings(found: Any, expected: ImageProcessor) -> bool:
    return isinstance(found, ImageProcessor) and found.settings() == expected.settings()


def _check_end_tokens(base: BaseFiles, written: BaseFiles, tokenizer: Any) -> list[str]:
    """Check that generation ends at the end tokens of the base and of training."""
    if not (written.folder / GENERATION_FILE).is_file():
        return [f"{GENERATION_FILE} is missing"]
    own = load_generation_config(base.folder)
    ids = load_generation_config(written.folder).eos_token_id
    found, wanted = {*(ids if isinstance(ids, list) else [ids])} - {None}, {*end_token_ids(own, tokenizer)}
    lost = [f"{GENERATION_FILE} lacks the end token {_show(tokenizer, id_)}" for id_ in sorted(wanted - found)]
    return lost + [f"{GENERATION_FILE} ends at {_show(tokenizer, id_)}" for id_ in sorted(found - wanted)]


def _check_pad_token(written: BaseFiles, tokenizer: Any) -> list[str]:
    """Check that generation uses the padding token that the config sets."""
    found = load_generation_config(written.folder).pad_token_id
    wanted = tokenizer.pad_token_id
    return [] if found == wanted else [f"{GENERATION_FILE} has pad_token_id {found}, not {_show(tokenizer, wanted)}"]


def _described(config: dict[str, Any], changed: Set[str]) -> dict[str, Any]:
    """Return the keys of a config that describe the architecture; a multimodal one has sections with more.

    Args:
        config: The config.
        changed: Keys that a merge may change.
    """
    return {
        key: _described(value, changed) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in changed | IDLE_KEYS
    }


def _is_tied(skeleton: Any) -> bool:
    head, embeddings = output_head(skeleton), input_embedding(skeleton)
    return head is not None and embeddings is not None and head.weight is embeddings.weight


def _own_head(skeleton: Any, files: BaseFiles) -> str | None:
    """Return the name of the head's tensor, or of the first one that it is made of.

    None if there is none, or if it equals the embeddings of a tied model.
    """
    stored = BaseWeights(files)
    embeddings, head = embedding_and_head_tensors(skeleton, stored.shapes)
    if head is None:
        _, converted = names_in_files(skeleton, stored.shapes)
        names = (name for name, module in skeleton.named_modules() if module is output_head(skeleton))
        return next((converted[f"{name}.weight"][0] for name in names if f"{name}.weight" in converted), None)
    if head is None or embeddings is None or not _is_tied(skeleton):
        return head
    is_same = stored.shapes[head] == stored.shapes[embeddings] and all(
        torch.equal(stored.read(head, rows), stored.read(embeddings, rows)) for rows in row_blocks(stored.shapes[head])
    )
    return None if is_same else head


def _show(tokenizer: Any, token_id: int) -> str:
    return f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r})"
