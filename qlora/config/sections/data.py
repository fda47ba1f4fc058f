"""The section `data`, and a source in it: the rows and how they become examples."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from qlora.config.sections.base import Section
from qlora.config.sections.values import Columns, Count, LabelNames, NewTokens, PathText

Format = Literal[
    "auto", "alpaca", "sharegpt", "messages", "completion", "text", "tokenized", "preference", "chosen", "kto",
    "classification", "images", "oasst",
]  # fmt: skip


IMAGES = "images"


class SourceSection(Section):
    """One source of rows and how to read it. Keys that are absent here are taken from `data`."""

    path: PathText = Field(
        description="A file, a folder of files, or a dataset on the hub (owner/name, or owner/name:split).",
        examples=["data/train.jsonl"],
    )
    weight: float = Field(
        default=1,
        gt=0,
        le=100,
        description="How often an epoch sees the source's examples: 2 is twice, 0.5 a half of them, drawn by "
        "train.seed.",
        examples=[2],
    )
    split: str | None = Field(
        default=None,
        description="Split of a folder or of a dataset on the hub; null takes train.",
        examples=["train_sft"],
    )
    subset: str | None = Field(
        default=None,
        description="Subset of a dataset on the hub that has several.",
        examples=["wikitext-2-raw-v1"],
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a dataset on the hub.",
        examples=["v1.0"],
    )
    type: Literal["auto", "json", "jsonl", "csv", "tsv", "parquet", "arrow", "text", "lines"] = Field(
        default="auto",
        description="Type of a file, if its name does not show it. lines makes each line a row of text.",
        examples=["lines"],
    )
    encoding: str = Field(default="utf-8", description="Encoding of text files.", examples=["latin-1"])
    header: Literal["auto", True, False] = Field(
        default="auto",
        description="Whether the first line of a CSV or TSV names its columns. auto decides by the names; if it "
        "can't, set it.",
        examples=[False],
    )
    max_rows: Count | None = Field(
        default=None,
        description="Read only this many rows from the start; null takes data.max_rows.",
        examples=[10000],
    )
    format: Format | None = Field(
        default=None,
        description="Format of this source's rows; null takes data.format.",
        examples=["alpaca"],
    )
    columns: Columns | None = Field(
        default=None,
        description="Column names of this source, as data.columns; null takes data.columns.",
        examples=[{"instruction": "question", "output": "answer"}],
    )
    roles: dict[str, str] | None = Field(
        default=None,
        description="Speaker names of this source, as data.roles; null takes data.roles.",
        examples=[{"agent": "assistant"}],
    )


def _list_sources(value: object) -> object:
    """Return a path, a source or a list of them as a list of sources."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str | dict | SourceSection) for one in values):
        raise ValueError("should be a path, a source (path, weight, format, …) or a list of them")
    return [{"path": one} if isinstance(one, str) else one for one in values]


def _check_eval(value: object) -> object:
    """Return a share, a list of sources, or these by name."""
    if isinstance(value, dict) and value.keys().isdisjoint(SourceSection.model_fields):
        return _check_sets(value)
    if isinstance(value, str):
        try:
            value = float(value)  # YAML reads 2e-2, without a dot, as text
        except ValueError:
            return _list_sources(value)
    if isinstance(value, bool) or isinstance(value, int | float) and not 0 <= value < 1:
        raise ValueError("should be a file or dataset to evaluate on, or a share of the rows below 1")
    return value if value is None or isinstance(value, int | float) else _list_sources(value)


def _check_sets(sets: dict[object, object]) -> object:
    """Check the names of several sets and return what each of them is."""
    if not sets:
        raise ValueError("should name a set at least, as {main: data/eval.jsonl}; null holds out nothing")
    for name in sets:
        if not isinstance(name, str) or not SET_NAME.fullmatch(name):
            raise ValueError(f"has a set named {name!r:.80}; a name has letters, digits, _, - and dots")
    checked = {name: _check_eval(value) for name, value in sets.items()}
    if wrong := [name for name, value in checked.items() if not value or isinstance(value, dict)]:
        raise ValueError(f"has nothing in the set {wrong[0]}; name a file or dataset, or remove the set")
    if len(shares := [str(name) for name, value in checked.items() if isinstance(value, int | float)]) > 1:
        raise ValueError(f"has a share of the rows in {' and '.join(shares)}; only one set can have one")
    return checked


def _kind_of_eval(value: object) -> str:
    return "sets" if isinstance(value, dict) else "sources" if isinstance(value, list) else "share"


# A set's name is a part of its metrics' names.
SET_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
WrittenSources = str | SourceSection | list[str | SourceSection]
EvalShare = Annotated[float, Field(ge=0, lt=1)]
Sources = Annotated[list[SourceSection], BeforeValidator(_list_sources, json_schema_input_type=WrittenSources)]
EvalSet = Annotated[
    Annotated[list[SourceSection], Tag("sources")] | Annotated[float, Tag("share")], Discriminator(_kind_of_eval)
]
EvalSources = Annotated[
    Annotated[list[SourceSection], Tag("sources")]
    | Annotated[float | None, Tag("share")]
    | Annotated[dict[str, EvalSet], Tag("sets")],
    Discriminator(_kind_of_eval),
    BeforeValidator(
        _check_eval, json_schema_input_type=EvalShare | WrittenSources | dict[str, EvalShare | WrittenSources] | None
    ),
]


class DataSection(Section):
    """The rows to learn from and how they become examples."""

    train: Sources = Field(
        description="Rows to train on: a path, a source with keys of its own, or a list of them.",
        examples=["data/train.jsonl"],
    )
    eval: EvalSources = Field(
        default=None,
        description="Held-out rows: a share of the training rows, or sources as for data.train, or several of these by "
        "name, each of which is evaluated; null holds out none.",
        examples=[0.02],
    )
    retain: Sources | None = Field(
        default=None,
        description="Rows of an older task, as sources for data.train: their loss is measured at every evaluation, and "
        "they are never trained on. null measures none.",
        examples=["data/old-task.jsonl"],
    )
    format: Format = Field(
        default="auto",
        description="What the columns mean. auto detects it from the column names; qlora preview prints the result. "
        "images are classified by a base that reads images; they are never detected.",
        examples=["alpaca"],
    )
    columns: Columns = Field(
        default={},
        description="Column names of your data, each after the name that the format expects; role and content name the "
        "keys of a turn. Columns of a table without a header have numbers.",
        examples=[{"instruction": "question", "output": "answer"}],
    )
    roles: dict[str, str] = Field(
        default={},
        description="Speaker names of your data, each with its meaning: system, user, assistant or tool.",
        examples=[{"agent": "assistant", "caller": "user"}],
    )
    labels: LabelNames | None = Field(
        default=None,
        description="Labels of train.objective classify: their names in order, or the word that stands for each name "
        "in an answer. null takes those of the training rows, sorted.",
        examples=[{"0": "negative", "1": "positive"}],
    )
    max_rows: Count | None = Field(
        default=None,
        description="Read only this many rows from the start of each source; null reads all.",
        examples=[1000],
    )
    deduplicate: bool = Field(
        default=False,
        description="Leave out examples with the same tokens as an earlier one, and training examples that are held "
        "out.",
        examples=[True],
    )
    chat_template: PathText = Field(
        default="auto",
        description="Chat template: auto (the tokenizer's own, else alpaca), the name of a built-in one, or a jinja "
        "file. It is saved with the adapter and the merged model.",
        examples=["chatml"],
    )
    new_tokens: NewTokens = Field(
        default=[],
        description="Tokens added to the vocabulary; their rows of embedding and head are trained.",
        examples=[["<tool>", "</tool>"]],
    )
    special_tokens: dict[Literal["eos_token", "pad_token"], str] = Field(
        default={},
        description="The tokenizer's end and pad token: tokens that it has, or that data.new_tokens adds.",
        examples=[{"eos_token": "<|im_end|>"}],
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="Supervised tokens: every answer with its end token, the last answer only, or everything.",
        examples=["last"],
    )
    max_seq_len: int = Field(
        default=2048,
        ge=8,
        strict=True,
        description="Longest sequence, in tokens. Packed sequences have this length.",
        examples=[4096],
    )
    overlong: Literal["drop", "truncate", "split", "error"] = Field(
        default="drop",
        description="How documents longer than data.max_seq_len are handled. The report counts them.",
        examples=["truncate"],
    )
    packing: bool | Literal["auto"] = Field(
        default="auto",
        description="Put several documents into one sequence. They do not see each other; for a base that can't keep "
        "them apart, auto does not pack, and true is an error. Images are not packed.",
        examples=[False],
    )
    on_bad_row: Literal["error", "drop"] = Field(
        default="error",
        description="How rows are handled that can't be read or have nothing to learn.",
        examples=["drop"],
    )
    cache_dir: PathText | None = Field(
        default=None,
        description="Folder for tokenized data; null takes $XDG_CACHE_HOME/qlora/data or ~/.cache/qlora/data.",
        examples=["/scratch/qlora-data"],
    )

    @field_validator("retain")
    @classmethod
    def _check_retain(cls, value: list[SourceSection] | None, info: ValidationInfo) -> list[SourceSection] | None:
        sets = info.data.get("eval")  # absent if invalid itself
        if value and isinstance(sets, dict) and "retain" in sets:
            raise ValueError("measures rows as retain, and so does a set of data.eval; rename that set")
        return value

    @field_validator("roles", "chat_template", "new_tokens", "special_tokens")
    @classmethod
    def _check_texts_only(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if info.data.get("format") == IMAGES and value != cls.model_fields[name].get_default():
            raise ValueError("is for texts, but data.format is images; remove it")
        return value

    @field_validator("packing")
    @classmethod
    def _check_packing(cls, value: bool | str, info: ValidationInfo) -> bool | str:
        if info.data.get("format") != IMAGES:
            return value
        if value is True:
            raise ValueError("true is for texts, but data.format is images; remove it")
        return False

    @property
    def has_images(self) -> bool:
        """Whether the documents are images instead of texts."""
        return self.format == IMAGES

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of a document; an image counts as one."""
        return 1 if self.has_images else self.max_seq_len

    @property
    def packs(self) -> bool:
        """Whether documents are packed, if the base keeps them apart."""
        return self.packing is not False

    @property
    def eval_sets(self) -> dict[str, list[SourceSection] | float]:
        """What `eval` holds, by the name of the set in metrics: `eval` for the first, `eval_NAME` for others."""
        named = self.eval if isinstance(self.eval, dict) else {"": self.eval or 0.0}
        return {f"eval_{name}" if place else "eval": held for place, (name, held) in enumerate(named.items())}

    @property
    def measured(self) -> list[str]:
        """Names of the sets to evaluate on: those of `eval`, and `retain`."""
        return [name for name, held in self.eval_sets.items() if held] + ["retain"] * bool(self.retain)

    @property
    def sources(self) -> list[SourceSection]:
        """All sources, of training, evaluation and retained rows."""
        held = [self.train, *(self.eval_sets.values()), self.retain]
        return [source for sources in held if isinstance(sources, list) for source in sources]

    def each_source(self, change: Callable[[SourceSection], SourceSection]) -> "DataSection":
        """Return the section with every source changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(held) for name, held in value.items()}
            return [change(source) for source in value] if isinstance(value, list) else value

        return self.model_copy(update={key: changed(getattr(self, key)) for key in ("train", "eval", "retain")})
