"""What a config may say: the sections, their types, defaults and ranges."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qlora.dtypes import full_name
from qlora.errors import find_secrets

# NUL, and halves of characters, which no file can be named by.
UNUSABLE = re.compile("[\0\ud800-\udfff]")


class Section(BaseModel):
    """A frozen group of keys; an unknown one is an error, and so is a secret: a config is kept with its run."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_texts(cls, value: object) -> object:
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str)]
        if any(map(UNUSABLE.search, texts)):
            raise ValueError("holds a character that no name and no text can have")
        kinds = [kind for text in texts for kind in find_secrets(text)]
        if kinds:
            raise ValueError(f"holds {kinds[0]}, which would be kept with the run; log in with hf auth login instead")
        return value


def _check_size(value: str) -> str:
    parse_size(value)
    return value


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `500MB` (powers of ten) or `24GiB` (of two).

    Raises:
        ValueError: It has another form.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])(i?))?B?\s*", text, re.IGNORECASE)
    power = " KMGT".index((match[2] or " ").upper()) if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if not size:
        raise ValueError("should be a size such as 5GB or 500MB")
    return size


def _check_path(value: str) -> str:
    if not value:
        raise ValueError("should name a file or folder")
    if UNUSABLE.search(value):
        return value  # told with the other texts
    try:
        os.lstat(Path(value).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever needs it tells
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that no user has, no rights
        raise ValueError(f"can't be a path: {getattr(error, 'strerror', None) or error}") from None
    return value


def _check_share_or_steps(value: int | float | None) -> int | float | None:
    if isinstance(value, bool) or value is not None and (value <= 0 or (value > 1 and value != int(value))):
        raise ValueError("should be a number of steps, or a share of the run between 0 and 1")
    return value


def _list_sources(value: object) -> object:
    """A path, a source or a list of them, as a list of sources."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str | dict | SourceSection) for one in values):
        raise ValueError("should be a path, a source (path, weight, format, …) or a list of them")
    return [{"path": one} if isinstance(one, str) else one for one in values]


def _check_eval(value: object) -> object:
    if isinstance(value, str):
        try:
            value = float(value)  # YAML takes 2e-2, without a dot, for text
        except ValueError:
            return _list_sources(value)
    if isinstance(value, bool) or isinstance(value, int | float) and not 0 <= value < 1:
        raise ValueError("should be a file or data set to evaluate on, or a share of the rows below 1")
    return value if value is None or isinstance(value, int | float) else _list_sources(value)


def _check_targets(value: str | list[str]) -> str | list[str]:
    if not value:
        raise ValueError("should name a layer at least, or be all-linear")
    return value


def _check_pattern(value: str) -> str:
    try:
        re.compile(f"({value})")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"should be a regular expression: {error}") from None
    return value


def _check_new_tokens(value: list[str]) -> list[str]:
    if not all(token.strip() for token in value) or len(set(value)) < len(value):
        raise ValueError("should name each token once, and none that is empty or a space")
    return value


def _name_columns(value: object) -> object:
    """A mapping whose columns may be given by number, with their names."""
    if not isinstance(value, dict):
        return value
    return {ours: str(theirs) if type(theirs) is int else theirs for ours, theirs in value.items()}


Format = Literal[
    "auto", "alpaca", "sharegpt", "messages", "completion", "text", "tokenized", "preference", "chosen", "kto",
    "classification", "oasst",
]  # fmt: skip
Dtype = BeforeValidator(full_name)
PathText = Annotated[str, AfterValidator(_check_path)]
ShareOrSteps = Annotated[int | float | None, AfterValidator(_check_share_or_steps)]
Size = Annotated[str, AfterValidator(_check_size)]
Targets = Annotated[str | list[str], AfterValidator(_check_targets)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
Rank = Annotated[int, Field(ge=1, strict=True)]
Alpha = Annotated[float, Field(gt=0)]
NewTokens = Annotated[list[str], AfterValidator(_check_new_tokens)]
Columns = Annotated[dict[str, str], BeforeValidator(_name_columns)]
MaxRows = Annotated[int | None, Field(ge=1, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ModelSection(Section):
    """The base model and how it is held."""

    base: PathText
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Literal["nf4", "none"] = "nf4"
    double_quant: bool = True
    compute_dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], Dtype] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    weight_cache: Literal["auto", "none"] = "auto"
    recompute: Literal["auto", "none", "mlp", "attention", "full", "offload", "offload+tiled"] = "auto"


class LoraSection(Section):
    """The adapters."""

    rank: Rank = 16
    alpha: Alpha = 32
    rank_pattern: dict[Pattern, Rank] = {}
    alpha_pattern: dict[Pattern, Alpha] = {}
    dropout: Share = 0.0
    targets: Targets = "all-linear"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rslora: bool = False
    dtype: Annotated[Literal["bfloat16", "float32"], Dtype] = "bfloat16"
    form: Literal["auto", "separate", "folded"] = "auto"
    modules_to_save: list[str] = []

    @model_validator(mode="after")
    def _check_form(self) -> "LoraSection":
        if self.form == "folded" and self.dropout:
            raise ValueError(
                f"form: folded has no input of its own to drop, so dropout {self.dropout:g} can't be had with it; "
                "set lora.form: auto or lora.dropout: 0"
            )
        return self


class SourceSection(Section):
    """Rows somewhere, and how to read them; what is not said here is taken from `data`."""

    path: PathText
    weight: Annotated[float, Field(gt=0, le=100)] = 1
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    type: Literal["auto", "json", "jsonl", "csv", "tsv", "parquet", "arrow", "text", "lines"] = "auto"
    encoding: str = "utf-8"
    header: Literal["auto", True, False] = "auto"
    max_rows: MaxRows = None
    format: Format | None = None
    columns: Columns | None = None
    roles: dict[str, str] | None = None


Sources = Annotated[list[SourceSection], BeforeValidator(_list_sources)]
EvalSources = Annotated[
    Annotated[list[SourceSection], Tag("sources")] | Annotated[float | None, Tag("share")],
    Discriminator(lambda value: "sources" if isinstance(value, list) else "share"),
    BeforeValidator(_check_eval),
]


class DataSection(Section):
    """The rows to learn from, and what becomes of them."""

    train: Sources
    eval: EvalSources = None
    format: Format = "auto"
    columns: Columns = {}
    roles: dict[str, str] = {}
    max_rows: MaxRows = None
    deduplicate: bool = False
    chat_template: PathText = "auto"
    new_tokens: NewTokens = []
    special_tokens: dict[Literal["eos_token", "pad_token"], str] = {}
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    max_seq_len: Annotated[int, Field(ge=8, strict=True)] = 2048
    overlong: Literal["drop", "truncate", "split", "error"] = "drop"
    packing: bool = True
    on_bad_row: Literal["error", "drop"] = "error"
    cache_dir: PathText | None = None


class TrainSection(Section):
    """The run."""

    objective: Literal["sft"] = "sft"
    output_dir: PathText
    epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: Annotated[int | None, Field(ge=1, strict=True)] = None
    micro_batch_size: Annotated[int, Field(ge=1, strict=True)] = 1
    gradient_accumulation_steps: Annotated[int, Field(ge=1, strict=True)] = 16
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    min_learning_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    embedding_learning_rate: Annotated[float | None, Field(gt=0, lt=1)] = None
    warmup_ratio: Share = 0.03
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_32bit"] = "paged_adamw_8bit"
    betas: tuple[Share, Share] = (0.9, 0.999)
    rounding: Literal["stochastic", "master"] = "stochastic"
    max_grad_norm: Annotated[float | None, Field(gt=0)] = 0.3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    deterministic: bool = False
    seed: Annotated[int, Field(ge=0, lt=1 << 63, strict=True)] = 0
    log_every: Annotated[int, Field(ge=1, strict=True)] = 1
    eval_every: ShareOrSteps = 0.25
    save_every: ShareOrSteps = 200
    keep_checkpoints: Annotated[int, Field(ge=1, strict=True)] = 2
    trackers: list[str] = []

    @field_validator("min_learning_rate")
    @classmethod
    def _check_minimum(cls, value: float, info: ValidationInfo) -> float:
        peak = info.data.get("learning_rate")  # absent if it is wrong itself
        if peak is not None and value > peak:
            raise ValueError(f"is above train.learning_rate ({peak:g}); lower it")
        return value


class ExportSection(Section):
    """The merged weights."""

    dtype: Annotated[Literal["float16", "bfloat16", "float32"], Dtype] = "float16"
    onto: Literal["dequantized", "original", "best"] = "dequantized"
    max_shard_size: Size = "5GB"


class RunConfig(Section):
    """A whole run: one YAML file."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection
    export: ExportSection = ExportSection()

    @field_validator("train")
    @classmethod
    def _check_embedding_rate(cls, value: TrainSection, info: ValidationInfo) -> TrainSection:
        data, lora = info.data.get("data"), info.data.get("lora")  # absent if wrong themselves
        trains_rows = data is None or lora is None or data.new_tokens or lora.modules_to_save
        if value.embedding_learning_rate is not None and not trains_rows:
            raise ValueError(
                "embedding_learning_rate is set, but no embedding or head is trained; set lora.modules_to_save or "
                "data.new_tokens, or remove it"
            )
        return value
