"""A config and rows that Python code passes: a file, a dict or a RunConfig, and rows in memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora.config import RunConfig, load_config
from qlora.config.sections.data import IMAGES
from qlora.data import store_rows
from qlora.errors import ConfigError

IMAGE = "image"


def as_config(
    config: RunConfig | str | Path | Mapping[str, Any], rows: Iterable[Mapping[str, Any]] | None = None
) -> RunConfig:
    """Return a config, with its training data replaced by rows if any are given.

    Args:
        config: A config, or a YAML file or sections that :func:`qlora.load_config` reads. With rows, sections need no
            `data.train`.
        rows: Rows in memory; they are written to a file in the cache of tokenized data. Relative paths of images count
            from the current folder.

    Raises:
        ConfigError: The config is wrong.
        DataError: A row can't be written as JSON, or the cache can't be written.
    """
    if rows is None:
        return config if isinstance(config, RunConfig) else load_config(config)
    if isinstance(config, Mapping):
        data = config.get("data") or {}
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"data: {data!r:.80} should be a section with keys; the rows take the place of data.train."
            )
        columns = data.get("columns") or {}
        image = columns.get(IMAGE, IMAGE) if isinstance(columns, Mapping) else IMAGE
        path = store_rows(rows, data.get("cache_dir"), image if data.get("format") == IMAGES else None)
        return load_config({**config, "data": {**data, "train": str(path)}})
    loaded = config if isinstance(config, RunConfig) else load_config(config)
    values = loaded.model_dump()
    image = loaded.data.columns.get(IMAGE, IMAGE) if loaded.data.has_images else None
    values["data"]["train"] = str(store_rows(rows, loaded.data.cache_dir, image))
    return RunConfig.model_validate(values)
