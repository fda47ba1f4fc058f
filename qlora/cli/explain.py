"""`qlora explain`: the reference of a config's keys."""

from dataclasses import asdict
from typing import Annotated

import typer

from qlora.cli.options import AsJson
from qlora.cli.report import as_json_text
from qlora.errors import ConfigError


def explain(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A key, a section, or a key of another trainer; default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show type, default, range, meaning and example of a key, or of a whole section."""
    from qlora.config.convert.names import NAMES
    from qlora.config.pages import describe
    from qlora.config.reference import find_keys, list_keys

    ours = NAMES.get(key or "", key)
    if ours is not None and ours.startswith("the option"):
        raise ConfigError(f"{key} is {ours} of qlora train, not a key of a config.")
    keys = list_keys() if ours is None else find_keys(ours)
    if as_json:
        print(as_json_text({found.name: asdict(found) for found in keys}))
    elif key is None:
        width = max(len(found.name) for found in keys)
        for found in keys:
            print(f"{found.name:<{width}}  {found.meaning.partition('. ')[0].rstrip('.')}.")
    else:
        print("\n\n".join(map(describe, keys)))
