"""`qlora init`: starter configs, configs of other trainers converted, and the schema of a config."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.options import expand_home
from qlora.errors import ConfigError


def init(
    recipe: Annotated[str | None, typer.Argument(help="Name of a recipe; without it, recipes are listed.")] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Default: RECIPE.yaml, or my.yaml for --from.", callback=expand_home
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Convert a config of axolotl, LLaMA-Factory, TRL or unsloth: YAML, or a script with a command line.",
            callback=expand_home,
        ),
    ] = None,
    every_key: Annotated[bool, typer.Option("--all", help="Write a config with every key, commented.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Write a JSON Schema of a config, for editors.")] = False,
) -> None:
    """List the recipes, or write a commented config."""
    if sum(map(bool, (recipe, source, every_key, schema))) > 1:
        raise typer.BadParameter("a recipe, --from, --all and --schema exclude each other.")
    if source is not None:
        _convert(Path(source), Path(output or "my.yaml"))
    elif every_key:
        from qlora.config.pages import full_config

        _write(Path(output or "all.yaml"), full_config())
    elif schema:
        from qlora.config.pages import schema_text

        target = Path(output or "qlora.schema.json")
        _write(
            target,
            schema_text(),
            f"Editors read it from a config's first line: # yaml-language-server: $schema={target}",
        )
    elif recipe is None:
        _list_recipes()
    else:
        recipes = _recipes()
        if recipe not in recipes:
            raise ConfigError(f"Unknown recipe '{recipe}'; choose one of {', '.join(recipes)}.")
        _write(Path(output or f"{recipe}.yaml"), recipes[recipe].read_text(encoding="utf-8"))


def recipe_folder() -> Path:
    """Return the folder of the recipes: in the installed package, or in its source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def _recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def _list_recipes() -> None:
    recipes = _recipes()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        print(f"{name:<{width}}  {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    print("\nWrite one with: qlora init RECIPE")


def _convert(source: Path, target: Path) -> None:
    from qlora.config.convert import convert_file

    template = target.with_suffix(".jinja")
    conversion = convert_file(source, str(template))
    draft = conversion.draft
    _check_free(target)
    if draft.template is not None:
        _write(template, draft.template, "")
    _write(target, conversion.text, "")
    print(f"Converted {source}, a config of {draft.trainer}.")
    if draft.warnings:
        print("\nCheck these first:")
        for warning in draft.warnings:
            print(f"  - {warning}")
    print("\n".join(["", *conversion.summary, ""]))
    print(f"Next: qlora preview {target}")


def _check_free(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} already exists; name another file with -o.")


def _write(target: Path, text: str, next_step: str | None = None) -> None:
    _check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}.") from None
    print(f"Wrote {target}. {f'Next: qlora preview {target}' if next_step is None else next_step}".rstrip())
