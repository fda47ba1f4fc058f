"""A preview as one self-contained HTML page."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from qlora.errors import DataError


def write_page(path: Path, result: Any, config: str) -> None:
    """Write a preview as HTML.

    Args:
        path: The file.
        result: A :class:`qlora.training.Preview`.
        config: The config's name, for the title.

    Raises:
        DataError: The file can't be written.
    """
    from jinja2 import Environment

    from qlora.data import split_shared

    source = files("qlora.cli").joinpath("preview.html.jinja").read_text(encoding="utf-8")
    # All text comes from data, so all of it is escaped.
    page = (
        Environment(autoescape=True)
        .from_string(source)
        .render(result=result, config=Path(config).name, split_shared=split_shared)
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--html {path}: can't be written: {error.strerror or error}.") from None
