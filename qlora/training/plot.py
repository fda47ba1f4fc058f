"""The loss curve of a run, and its confusion matrix, as images."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from qlora.checkpoint import evaluation_metrics, metric_label
from qlora.pages import Points, smoothed

# Markers and colours of the sets' losses: the first is that of the held-out rows.
STYLES = [f"{marker}-C{colour}" for colour, marker in enumerate("osD^vP", 1)]
# Number of labels up to which counts are written into a confusion matrix.
WRITTEN_LABELS = 20


def draw_losses(metrics: Sequence[dict[str, Any]], target: Path, title: str = "", ylabel: str = "loss") -> bool:
    """Draw training loss, smoothed training loss, the loss on each set and the learning rate over the steps as a PNG.

    Args:
        metrics: Lines of metrics.jsonl.
        target: Path of the PNG.
        title: Title of the image.
        ylabel: What the losses are.

    Returns:
        Whether it was drawn: matplotlib is an optional dependency, and the disk may be full.
    """
    if (figure := _figure()) is None:
        return False
    training, rates = (_points(metrics, key) for key in ("loss", "learning_rate"))
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.3, label="training")
        axes.plot(*zip(*smoothed(training), strict=True), color="tab:blue", label="training, smoothed")
    losses = {key: losses for key, losses in evaluation_metrics(metrics).items() if key.endswith("_loss")}
    for (key, points), style in zip(losses.items(), cycle(STYLES)):
        axes.plot(*zip(*points.items(), strict=True), style, label=metric_label(key))
    axes.set(title=title, xlabel="step", ylabel=ylabel, ylim=(0, None))
    axes.grid(alpha=0.3)
    lines = axes.get_lines()
    if rates:
        rate_axes = axes.twinx()
        rate_axes.plot(*zip(*rates, strict=True), "--", color="tab:gray", linewidth=1, label="learning rate")
        rate_axes.set(ylabel="learning rate", ylim=(0, None))
        rate_axes.ticklabel_format(axis="y", scilimits=(0, 0))  # short labels, for which there is room
        lines = [*lines, *rate_axes.get_lines()]
    axes.legend(handles=lines)
    return _save(figure, target)


def draw_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], target: Path, title: str = "") -> bool:
    """Draw the number of texts by label and predicted label as a PNG, each row shaded by its own share.

    Args:
        matrix: (labels, labels), texts by their label and the predicted one.
        names: Names of the labels.
        target: Path of the PNG.
        title: Title of the image.

    Returns:
        Whether it was drawn, see :func:`draw_losses`.
    """
    if (figure := _figure(long_labels=True)) is None:
        return False
    size = max(4.5, 0.3 * len(names) + 2)
    figure.set_size_inches(size + 0.5, size)
    axes = figure.subplots()
    shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90)
    axes.set_yticks(places, names)
    axes.set(title=title, xlabel="predicted", ylabel="label")
    if len(names) <= WRITTEN_LABELS:
        for row in places:
            for column in places:
                color = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, f"{matrix[row][column]:,}", ha="center", va="center", color=color)
    return _save(figure, target)


def draw_rates(trials: Mapping[float, Mapping[int, float]], target: Path, title: str = "") -> bool:
    """Draw held-out loss over the learning rate as a PNG, a line for each number of steps.

    Args:
        trials: Held-out loss by number of steps, by learning rate.
        target: Path of the PNG.
        title: Title of the image.

    Returns:
        Whether it was drawn, see :func:`draw_losses`.
    """
    if (figure := _figure()) is None:
        return False
    axes = figure.subplots()
    for steps in sorted({step for losses in trials.values() for step in losses}):
        points = [(rate, losses[steps]) for rate, losses in sorted(trials.items()) if steps in losses]
        axes.plot(*zip(*points, strict=True), "o-", label=f"after {steps:,} steps")
    axes.set(title=title, xlabel="learning rate", ylabel="held-out loss", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, target)


def _figure(long_labels: bool = False) -> Any:
    """Return an empty figure; None if matplotlib, an optional dependency, is not installed.

    Args:
        long_labels: Whether room has to be made for labels: the figure is drawn twice then.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 4.5), layout="constrained" if long_labels else None)


def _save(figure: Any, target: Path) -> bool:
    """Write a figure, and return whether the disk took it."""
    try:
        figure.savefig(target, dpi=120)
    except OSError:
        return False
    return True


def _points(metrics: Sequence[dict[str, Any]], key: str) -> Points:
    return [(line["step"], line[key]) for line in metrics if key in line]
