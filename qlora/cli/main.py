"""The `qlora` command: its verbs, and the exit codes of errors."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qlora.about import __version__, unsupported_reason
from qlora.cli.chat import chat
from qlora.cli.doctor import doctor
from qlora.cli.estimate import estimate
from qlora.cli.evaluate import evaluate
from qlora.cli.examples import examples_of
from qlora.cli.explain import explain
from qlora.cli.generate import generate
from qlora.cli.init import init
from qlora.cli.merge import merge
from qlora.cli.predict import predict
from qlora.cli.preview import preview
from qlora.cli.quantize import quantize
from qlora.cli.run_report import report
from qlora.cli.stopping import Terminated, raising_on_sigterm
from qlora.cli.train import train
from qlora.cli.tune import tune
from qlora.cli.verify import verify
from qlora.errors import ConfigError, QLoRAError, plain_message

FAILED, WRONG_USE = 1, 2


def _print_version(asked: bool) -> None:
    if asked:
        print(f"qlora {__version__}")
        raise typer.Exit


class Verbs(TyperGroup):
    """Group of verbs that removes pydantic's wording from usage errors, and names the value."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that the command line names."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from pydantic import ValidationError  # as typer does, so that `qlora --help` stays fast

            if isinstance(error.__cause__, ValidationError):
                given = error.__cause__.errors()[0]["input"]
                error.message = error.message.replace("Input should", f"{given!r:.200} should")
            error.message = plain_message(error.message)
            raise


app = typer.Typer(
    cls=Verbs,
    help="Fine-tune language models in 4 bits on one GPU, and release merged weights that are verified.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Handle the options before the verb."""


VERBS: dict[str, Callable[..., Any]] = {
    "init": init,
    "explain": explain,
    "preview": preview,
    "estimate": estimate,
    "tune": tune,
    "train": train,
    "report": report,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "predict": predict,
    "merge": merge,
    "verify": verify,
    "quantize": quantize,
    "doctor": doctor,
}
for _name, _verb in VERBS.items():
    app.command(_name, epilog=examples_of(_name))(_verb)


def main() -> None:
    """Run a verb; a user's mistake becomes a message and an exit code, without a traceback."""
    quiet_libraries()
    try:
        if reason := unsupported_reason():
            raise QLoRAError(reason)
        with raising_on_sigterm():
            app()
    except Terminated:
        print("Stopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except QLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE if isinstance(error, ConfigError) else FAILED)


def quiet_libraries() -> None:
    """Keep libraries' warnings off the screen, unless the user set their verbosity."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
