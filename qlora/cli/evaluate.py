"""`qlora eval`: supervised loss of a run, or of the base that a config starts from."""

from typing import Annotated

import typer

from qlora.cli.options import AsJson, Device, expand_home
from qlora.cli.report import show_report


def evaluate(
    target: Annotated[
        str,
        typer.Argument(metavar="CONFIG|RUN", help="A config's base, or a run with its adapter.", callback=expand_home),
    ],
    data: Annotated[
        str | None, typer.Option(help="A file to evaluate on, in place of the config's.", callback=expand_home)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 4,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Loss and perplexity per supervised token, and bits per byte."""
    from qlora.checkpoint import RunDirectory
    from qlora.config import SourceSection, load_config
    from qlora.data import eval_batches, set_special_tokens, supervised_bytes
    from qlora.errors import ConfigError
    from qlora.model import base_from_section, datasets_from_section, load_run
    from qlora.model import evaluate as run_evaluation

    run = RunDirectory.find(target)
    config = load_config(target if run is None else run.config)
    model, tokenizer = base_from_section(config.model, device) if run is None else load_run(target, device)
    section = config.data
    if run is None:  # its base, without the tokens that training adds
        own = {key: token for key, token in section.special_tokens.items() if token not in section.new_tokens}
        set_special_tokens(tokenizer, own)
    if data is not None:
        # Every row of the file counts, however few of its own the run was trained on.
        whole_file = {"train": [SourceSection(path=data)], "eval": None, "max_rows": None, "deduplicate": False}
        section = section.model_copy(update=whole_file)
    datasets = datasets_from_section(section, tokenizer, config.train.seed, own_template=run is not None)
    examples = datasets.train if data is not None else datasets.eval
    if not len(examples):
        raise ConfigError(f"{target}: data.eval holds out no example; name a file with --data.")
    result = run_evaluation(model, eval_batches(examples, batch_size))
    num_bytes = supervised_bytes(tokenizer, examples)
    is_plain = result.total_weight == result.num_supervised  # of weighted tokens there are no bits
    report = {
        "model": config.model.base if run is None else f"{config.model.base} with the adapter of {target}",
        "examples": len(examples),
        "supervised_tokens": result.num_supervised,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits / num_bytes if num_bytes and is_plain else None,
    }
    show_report(report, as_json)
