"""Types that several sections share, and their checks."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from qlora.config.sections.base import UNUSABLE
from qlora.dtypes import full_name


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `5GB` or `500MB` (powers of ten) or `24GiB` (powers of two).

    Raises:
        ValueError: The text has another form, or stands for zero bytes.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])(i?))?B?\s*", text, re.IGNORECASE)
    power = " KMGT".index((match[2] or " ").upper()) if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if not size:
        raise ValueError("should be a size such as 5GB or 500MB")
    return size


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `90s`, `10m` or `1.5h`.

    Raises:
        ValueError: The text has another form, or stands for no time.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([smh])\s*", text)
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise ValueError("should be a duration such as 90s, 10m or 2h")
    return seconds


def rate_factor(value: float | str, peak: float) -> float:
    """Return the factor on a peak learning rate that a rate of its own stands for.

    Args:
        value: A rate, or a factor as text: `16x`.
        peak: Peak learning rate.

    Raises:
        ValueError: The value is neither, or the rate is not between 0 and 1.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{0,18})?(?:[eE][+-]?\d{1,2})?)\s*x\s*", value)
        if match is None:
            raise ValueError(f"{value!r} should be a learning rate, or a factor such as 16x")
        value = float(match[1]) * peak
    if not 0 < value < 1:
        raise ValueError(f"a learning rate of {value:g} should be above 0 and below 1; a factor is written as 16x")
    return value / peak


def _check_size(value: str) -> str:
    parse_size(value)
    return value


def _check_path(value: str) -> str:
    if not value:
        raise ValueError("should name a file or folder")
    if UNUSABLE.search(value):
        return value  # reported by Section with the other texts
    try:
        os.lstat(Path(value).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        pass  # reported by the code that opens it
    except (OSError, RuntimeError) as error:  # name too long, home of an unknown user, no permission
        raise ValueError(f"can't be a path: {getattr(error, 'strerror', None) or error}") from None
    return value


def _check_share_or_steps(value: int | float | None) -> int | float | None:
    if isinstance(value, bool) or value is not None and (value <= 0 or (value > 1 and value != int(value))):
        raise ValueError("should be a number of steps, or a share of the run between 0 and 1")
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


def _check_targets(value: str | list[str]) -> str | list[str]:
    for each in (value,) if isinstance(value, str) else value:
        if each in ("all", "all_linear", "linear"):
            raise ValueError("should name layers; did you mean all-linear?")
    if not value:
        raise ValueError("should name a layer at least, or be all-linear")
    return value


def layer_indices(given: list[int | str]) -> list[int]:
    """Return the layers of a list of indices and ranges such as `8-15`, in order.

    Raises:
        ValueError: One is neither.
    """
    found: set[int] = set()
    for each in given:
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", str(each))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"{each!r} should be the index of a layer, or a range such as 8-15")
        found.update(range(first, last + 1))
    return sorted(found)


def _check_layers(value: list[int | str]) -> list[int | str]:
    if not layer_indices(value):
        raise ValueError("should name a layer at least; null adapts all")
    return value


def _column_names(value: object) -> object:
    """Return a mapping with column numbers as names."""
    if not isinstance(value, dict):
        return value
    return {ours: str(theirs) if type(theirs) is int else theirs for ours, theirs in value.items()}


def _label_text(value: object) -> str:
    if not (isinstance(value, str) and value.strip() or type(value) is int):
        raise ValueError(f"has {value!r:.80}, but labels and their words are text or whole numbers; put it in quotes")
    return str(value)


def _label_name(value: object) -> str:
    return _label_text(value).strip()  # as those of rows


def _label_names(value: object) -> object:
    """Return names and words as text, also those that YAML reads as numbers."""
    if isinstance(value, dict):
        return {_label_name(name): _label_text(word) for name, word in value.items()}
    return [_label_name(name) for name in value] if isinstance(value, list) else value


def _label_weights(value: object) -> object:
    """Return weights by the names of labels as text."""
    return {_label_name(name): weight for name, weight in value.items()} if isinstance(value, dict) else value


def _number_of_text(value: object) -> object:
    """Return the number that a text is, which YAML does not recognize without a dot: `5e-5`."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_layers(value: object) -> object:
    return [value] if isinstance(value, str) or type(value) is int else value


PathText = Annotated[str, AfterValidator(_check_path)]
Size = Annotated[str, AfterValidator(_check_size)]
Share = Annotated[float, Field(ge=0, lt=1)]
GroupRate = Annotated[float | str, BeforeValidator(_number_of_text, json_schema_input_type=float | str)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
# By a discriminator, so that an invalid value is one problem and not one for each member.
RateOrAuto = Annotated[
    Annotated[OpenShare, Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "auto" if value == "auto" else "number"),
]
ShareOrSteps = Annotated[int | float | None, AfterValidator(_check_share_or_steps)]
Count = Annotated[int, Field(ge=1, strict=True)]
RankOrAuto = Annotated[
    Annotated[int, Field(ge=0, strict=True), Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "auto" if value == "auto" else "number"),
]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
Alpha = Annotated[float, Field(gt=0)]
Targets = Annotated[str | list[str], AfterValidator(_check_targets)]
LayerIndices = Annotated[
    list[int | str],
    BeforeValidator(_as_layers, json_schema_input_type=int | str | list[int | str]),
    AfterValidator(_check_layers),
]
NewTokens = Annotated[list[str], AfterValidator(_check_new_tokens)]
Columns = Annotated[dict[str, str], BeforeValidator(_column_names, json_schema_input_type=dict[str, str | int])]
LabelNames = Annotated[
    Annotated[list[str], Field(min_length=1), Tag("names")]
    | Annotated[dict[str, str], Field(min_length=1), Tag("words")],
    Discriminator(lambda value: "words" if isinstance(value, dict) else "names"),
    BeforeValidator(_label_names, json_schema_input_type=list[str | int] | dict[str | int, str | int]),
]
ClassWeights = Annotated[
    Annotated[Literal["balanced"] | None, Tag("balanced")]
    | Annotated[dict[str, Annotated[float, Field(gt=0)]], Tag("weights")],
    Discriminator(lambda value: "weights" if isinstance(value, dict) else "balanced"),
    BeforeValidator(
        _label_weights,
        json_schema_input_type=Literal["balanced"] | dict[str | int, Annotated[float, Field(gt=0)]] | None,
    ),
]
Names = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
ComputeDtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    BeforeValidator(
        full_name,
        json_schema_input_type=Literal["auto", "bfloat16", "float16", "float32"] | Literal["bf16", "fp16", "fp32"],
    ),
]
AdapterDtype = Annotated[
    Literal["bfloat16", "float32"],
    BeforeValidator(full_name, json_schema_input_type=Literal["bfloat16", "float32"] | Literal["bf16", "fp32"]),
]
ExportDtype = Annotated[
    Literal["float16", "bfloat16", "float32"],
    BeforeValidator(
        full_name, json_schema_input_type=Literal["float16", "bfloat16", "float32"] | Literal["fp16", "bf16", "fp32"]
    ),
]
