"""`qlora train`: train a run, or continue it."""

import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import AsJson, ConfigFile, Overrides, expand_home
from qlora.cli.report import as_json_text, show_report
from qlora.cli.stopping import stopping_with


def train(
    config: ConfigFile = "",
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|PATH",
            help="auto continues the run in output_dir; a path starts from that checkpoint or run.",
            callback=expand_home,
        ),
    ] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; a run in output_dir is kept under another name.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load everything, train and write nothing.")] = False,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Rerun a saved step that had non-finite values; nothing is trained.",
            callback=expand_home,
        ),
    ] = None,
    report_file: Annotated[
        str | None,
        typer.Option("--report", metavar="FILE", help="Also write the report as JSON to a file.", callback=expand_home),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train; continues an unfinished run of the same output_dir."""
    if report_file is not None and (dry_run or replay is not None):
        raise typer.BadParameter(
            "--dry-run and --replay train nothing to report or merge; use them with qlora train, without --report."
        )

    from qlora.config import load_config

    if not config:
        if replay is None:
            raise typer.BadParameter("a YAML file is needed; qlora init writes one.", param_hint="CONFIG")
        config = str(Path(replay).parent.parent / "config.yaml")  # of the run that saved the step
    settings = load_config(config, overrides or ())
    import_libraries()

    if replay is not None:
        from qlora.training import replay as replay_step

        report = replay_step(settings, replay)
        show_report(report.as_dict(), as_json, f"Step {report.step}, replayed: {report.describe()}")
        raise typer.Exit(0 if report.is_finite else 1)

    from qlora.files import write_text
    from qlora.training import plan_run
    from qlora.training import train as run_training

    is_first = os.environ.get("RANK", "0") == "0"  # one report for all processes of a launcher
    if dry_run:
        plan = plan_run(settings, resume, fresh)
        if is_first:
            show_report(_describe(plan), as_json, "\n".join([f"{config}: nothing was written", *plan.notes]))
        return
    with stopping_with("Nothing was trained in this session. Run the same command to start again."):
        result = run_training(settings, resume, fresh=fresh, show_progress=True)
    if is_first:
        values = result.as_dict()
        if report_file is not None:
            write_text(Path(report_file), as_json_text(values) + "\n")
        if not as_json:
            from qlora.checkpoint import metric_label

            values["losses"] = " → ".join(f"{loss:.4f}" for loss in (*result.losses[:1], *result.losses[-1:]))
            del values["eval_losses"], values["eval_metrics"], values["evaluations"]
            for name, by_step in result.evaluations.items():
                values[metric_label(name)] = {f"step {step:,}": f"{value:.4f}" for step, value in by_step.items()}
            values["page"] = str(result.run_dir / "report.html")
            del values["signal"]  # the exit code has it, and the title the notes
            values["notes"] = []
            if result.status == "finished":
                ask = "" if settings.train.has_scores else f"qlora chat {result.run_dir}, or "
                values["notes"] = [f"Next: {ask}qlora merge {result.run_dir} -o DIR"]
        show_report(values, as_json, "\n".join([f"Run {result.status}.", *result.notes]))
    if result.status == "interrupted":
        raise typer.Exit(128 + (result.signal or signal.SIGINT))


def _describe(plan: Any) -> dict[str, Any]:
    inventory = plan.inventory
    return {
        "total_steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "train_examples": len(plan.datasets.train),
        "eval_examples": len(plan.datasets.eval),
        "held_out": {name: len(examples) for name, examples in plan.datasets.held_out.items()},
        "data": [report.summary() for report in plan.datasets.all_reports],
        "base_parameters": inventory.num_parameters,
        "trained_parameters": inventory.num_trained,
        "quantized_share": inventory.quantized_share,
        "adapted_share": inventory.adapted_share,
        "base_bytes": inventory.base_bytes,
        **asdict(plan.in_use),
        "notes": plan.notes,
    }
