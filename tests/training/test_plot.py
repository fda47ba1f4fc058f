"""The loss curve: its contents, and a full disk."""

import pytest
from matplotlib.figure import Figure

from qlora.training.plot import draw_losses

METRICS = [
    {"step": step, "loss": 4.0 / step, "learning_rate": 1e-4 * step} | ({"eval_loss": 3.0} if step == 2 else {})
    for step in range(1, 41)
]


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that are saved, instead of writing files."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_it_shows_losses_and_the_learning_rate_by_step(drawn, tmp_path):
    assert draw_losses(METRICS, tmp_path / "loss.png", "llama on rows")
    axes, rates = drawn[0].axes
    assert axes.get_title() == "llama on rows"
    lines = {line.get_label(): line.get_xydata().tolist() for line in (*axes.get_lines(), *rates.get_lines())}
    assert lines["training"] == [[line["step"], line["loss"]] for line in METRICS]
    assert lines["held-out loss"] == [[2, 3.0]]
    assert lines["learning rate"][-1] == [40, pytest.approx(4e-3)]
    smoothed = [value for _, value in lines["training, smoothed"]]
    assert smoothed[0] == 4.0
    assert all(
        value >= line["loss"] for value, line in zip(smoothed, METRICS, strict=True)
    )  # it lags behind a falling loss


def test_a_run_without_logged_steps_is_drawn_too(tmp_path):
    assert draw_losses([{"step": 0, "eval_loss": 5.0}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_full_disk_does_not_end_the_run(tmp_path):
    (tmp_path / "taken").write_text("")
    assert not draw_losses(METRICS, tmp_path / "taken" / "loss.png")
