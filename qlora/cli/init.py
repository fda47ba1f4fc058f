"""`qlora init`: starter configs."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.options import expand_home
from qlora.errors import ConfigError


def init(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name; without one they are listed.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Default: RECIPE.yaml", callback=expand_home)
    ] = None,
) -> None:
    """List the recipes, or write one as a commented starter config."""
    recipes = {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}
    if recipe is None:
        width = max(map(len, recipes))
        for name, path in recipes.items():
            print(f"{name:<{width}}  {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        print("\nWrite one with: qlora init RECIPE")
        return
    if recipe not in recipes:
        raise ConfigError(f"There is no recipe '{recipe}'; there are {', '.join(recipes)}.")
    target = Path(output or f"{recipe}.yaml")
    if target.exists():
        raise ConfigError(f"{target} exists already; name another file with -o.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(recipes[recipe].read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}.") from None
    print(f"Wrote {target}. Next: qlora preview {target}")


def recipe_folder() -> Path:
    """Where the recipes are: in the installed package, or in the checkout that it was installed from."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"
