"""The loss curve of a run as an image."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def draw_losses(metrics: Sequence[dict[str, Any]], target: Path) -> bool:
    """Draw training and held-out loss over the steps as a PNG.

    Args:
        metrics: Lines of metrics.jsonl.
        target: Path of the PNG.

    Returns:
        Whether it was drawn; matplotlib is an optional dependency.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="mean loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
    return True
