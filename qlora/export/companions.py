"""Files of a release next to its weights: config, tokenizer, merge report and model card."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora.data import ImageProcessor
from qlora.errors import ExportError
from qlora.export.card import write_adapter_card, write_card
from qlora.export.weights import MergedWeights
from qlora.files.json_files import read_object
from qlora.lora import ScoreHead
from qlora.model import LABELS_FILE, AdapterSource, end_token_ids, load_adapter_tokenizer, load_generation_config
from qlora.model.tokenizer import GENERATION_FILE

REPORT_FILE = "merge_report.json"
# Files of the base that a release has as they are. Image, video and audio processors keep their settings in
# preprocessor_config.json, video_preprocessor_config.json and processor_config.json.
COPIED = ("tokenizer.model", "*processor_config.json", "LICENSE*", "NOTICE*")
# Where processors kept the chat template before it was a file of its own.
PROCESSOR_TEMPLATE, PROCESSOR_FILE = "chat_template.json", "processor_config.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Called with the bytes written so far and the total.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport:
    """The result of a merge.

    Attributes:
        out_dir: The folder with the merged model.
        run_dir: The run, or the folder of an adapter made elsewhere.
        step: Step of the run that the adapter was trained for; None for an adapter made elsewhere.
        adapter: SHA-256 of the adapter's tensors file.
        dtype: Dtype of the merged weights.
        onto: Base weights that were merged onto, `dequantized` or `original`.
        losses: With `onto="best"`, loss by base weights on the run's held-out examples; on training examples if the
            run has no held-out ones, which the notes then say.
        merged: Number of layers that an adapter was merged into: all that the run adapted.
        tensors: Number of tensors written.
        num_bytes: Bytes of the tensors.
        continued_bytes: Bytes of the tensors that an interrupted merge wrote earlier.
        device: Device that computed the merge.
        base_differs: With `force`, files of the base that differ from those used in training.
        seconds: Duration of the merge in seconds.
        notes: Ways in which the written model may differ from the trained one.
        format: `safetensors`, `gguf`, or `lora-gguf`, which is the adapter alone.
    """

    out_dir: str
    run_dir: str
    step: int | None
    adapter: str
    dtype: str
    onto: str
    losses: dict[str, float] | None
    merged: int
    tensors: int
    num_bytes: int
    continued_bytes: int
    device: str
    base_differs: list[str]
    seconds: float
    notes: list[str] = field(default_factory=list)
    format: str = "safetensors"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<MergeReport: {self.merged} layers merged onto {self.onto} weights in {self.dtype}, {self.out_dir}>"


def write_companions(folder: Path, weights: MergedWeights, dtype: str) -> None:
    """Write config, tokenizer with its chat template or image processor, and generation config next to the weights."""
    config = _with_dtype(weights.files.config, dtype)
    config.pop("quantization_config", None)
    config.setdefault("torch_dtype" if "torch_dtype" in config else "dtype", dtype)
    if weights.num_embeddings is not None:
        _set_vocab_size(config, weights.num_embeddings)
    if weights.has_own_head:
        # transformers also uses a stored head that differs from the embedding without this; other tools don't.
        config["tie_word_embeddings"] = False
    source = weights.source
    tokenizer = load_adapter_tokenizer(source)
    if source.head is not None:
        config.pop("problem_type", None)  # of the base's own head
        config |= _describe_head(config, source.head, weights.architecture, source.head.pad_id(tokenizer))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if source.run is not None and source.run.final_adapter.is_dir():
        _copy_tokenizer(source.run.final_adapter, folder)
    else:
        tokenizer.save_pretrained(folder)
    if source.run is not None and source.run.labels.is_file():  # what qlora predict reads
        shutil.copyfile(source.run.labels, folder / LABELS_FILE)
    for pattern in (*COPIED, *(["*.py"] if source.trust_remote_code else [])):
        for path in filter(Path.is_file, weights.files.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    if isinstance(tokenizer, ImageProcessor):
        return  # nothing is generated
    _write_template_of_processor(weights.files.folder, folder, tokenizer.chat_template)

    generation = load_generation_config(weights.files.folder)
    generation.eos_token_id = end_token_ids(generation, tokenizer)
    if source.sets_pad_token:
        generation.pad_token_id = tokenizer.pad_token_id
    # save_pretrained refuses a temperature without do_sample, which many published models have.
    generation.to_json_file(folder / GENERATION_FILE, keys_to_pop=["compile_config"])


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config with another dtype wherever it names one, in its sections too."""
    return {
        key: dtype if key in ("dtype", "torch_dtype") and value is not None
        else _with_dtype(value, dtype) if isinstance(value, dict)
        else value
        for key, value in config.items()
    }  # fmt: skip


def _write_template_of_processor(base: Path, folder: Path, template: Any) -> None:
    """Write the run's chat template wherever the base's processor keeps one, so that none contradicts it.

    Args:
        base: Folder of the base.
        folder: Folder of the release.
        template: The tokenizer's chat template, or several by name.
    """
    if (base / PROCESSOR_TEMPLATE).is_file() and isinstance(template, str):
        text = json.dumps({"chat_template": template}, indent=2, ensure_ascii=False)
        (folder / PROCESSOR_TEMPLATE).write_text(text + "\n", encoding="utf-8")
    settings = folder / PROCESSOR_FILE
    if settings.is_file() and "chat_template" in (own := read_object(settings, ExportError, "download the base again")):
        settings.write_text(json.dumps(own | {"chat_template": template}, indent=2) + "\n", encoding="utf-8")


def _describe_head(config: Mapping[str, Any], head: ScoreHead, architecture: str, pad_id: int | None) -> dict[str, Any]:
    """Return the keys of a config that differ in a model that scores documents.

    Args:
        config: Config of the base.
        head: Head of the model.
        architecture: Name of its class.
        pad_id: Id of the padding token, before which transformers reads the scores.
    """
    keys: dict[str, Any] = {"architectures": [architecture], **head.config(), "pad_token_id": pad_id}
    del keys["num_labels"]  # follows from the labels, and transformers does not write it
    text = config.get("text_config")
    if isinstance(text, dict):
        keys["text_config"] = text | {"pad_token_id": pad_id}
    return {key: value for key, value in keys.items() if value is not None}


def _copy_tokenizer(adapter: Path, folder: Path) -> None:
    for path in adapter.iterdir():
        if path.is_dir():  # several chat templates
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)  # left by an interrupted merge
        elif path.name not in ADAPTER_FILES:
            shutil.copyfile(path, folder / path.name)


def _set_vocab_size(config: dict[str, Any], size: int) -> None:
    """Set the number of rows of embedding and head, which models with images keep in a section of their config."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = text | {"vocab_size": size}
    if "vocab_size" in config or not isinstance(text, dict):
        config["vocab_size"] = size


def write_report_and_card(folder: Path, report: MergeReport, source: AdapterSource, base_folder: Path) -> None:
    """Write a release's report and model card, without paths of this machine."""
    name = Path(report.out_dir).name
    released = report.as_dict() | {"out_dir": name, "run_dir": source.path.name}
    (folder / REPORT_FILE).write_text(json.dumps(released, indent=2) + "\n", encoding="utf-8")
    if source.run is None:
        write_adapter_card(folder, name, source, base_folder, released)
    else:
        write_card(folder, name, source.run, base_folder, released)
