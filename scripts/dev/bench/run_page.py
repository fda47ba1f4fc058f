"""Measure the page of a run: its size, the time to write it, and the time until a browser has drawn it.

python -m scripts.dev.bench.run_page --steps 1000 100000
"""

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from scripts.dev.bench.common import ROOT, append, heading

TITLE = """# The run page

`python -m scripts.dev.bench.run_page --out docs/benchmarks/run_page.md`. A run whose log is made up: a line for every
step with loss, gradient norm, learning rate, speed, memory and lost updates, and fifty evaluations of two sets with a
metric each. Opened is the time from the start of the page until its script has drawn all charts, in headless Chromium.
"""


def main() -> None:
    """Make runs, write their pages, open them, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, help="page that the table is appended to")
    arguments = parser.parse_args()
    lines = [
        *heading("size and time of a run's page", "jinja2"),
        "| steps | written in, s of CPU | size, KB | opened in, ms |",
    ]
    lines.append("|---|---|---|---|")
    for steps in arguments.steps:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(measure(Path(folder), steps))
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def measure(folder: Path, steps: int) -> str:
    """Return a row of the table for a run of a number of steps."""
    from qlora.pages import report

    run = Path(shutil.copytree(ROOT / "tests" / "runs_of_0_1_0" / "finished", folder / "run"))
    for name in ("config.yaml", "run.json"):
        (run / name).write_text((run / name).read_text().replace("{folder}", str(folder)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in make_log(steps)))
    started = time.process_time()
    page = Path(report(run).page or "")
    seconds = time.process_time() - started
    opened = open_page(page, folder)
    shown = "–" if opened is None else f"{opened:.0f}"
    return f"| {steps:,} | {seconds:.2f} | {page.stat().st_size / 1000:.0f} | {shown} |"


def make_log(steps: int) -> list[dict[str, float]]:
    """Return lines of metrics.jsonl."""
    source, lines = random.Random(0), []
    for step in range(steps + 1):
        loss = 1 + 2 * math.exp(-5 * step / steps)
        if step:
            lines.append({
                "step": step, "epoch": step / steps, "loss": source.gauss(loss, 0.1), "grad_norm": source.gauss(1, 0.2),
                "learning_rate": 2e-4 * (1 - step / steps), "tokens": 4096 * step,
                "tokens_per_second": source.gauss(2000, 50), "peak_memory": 10**10 + step,
                "zero_update_share": source.random() / 100,
            })  # fmt: skip
        if step % max(1, steps // 50) == 0:
            lines.append({"step": step, "eval_loss": loss, "eval_f1": 0.5, "retain_loss": 2.0, "retain_f1": 0.4})
    return lines


def open_page(page: Path, folder: Path) -> float | None:
    """Return the milliseconds until a page is drawn; None if no Chromium is installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        return None
    source = re.sub(r"<meta http-equiv=.*?>", "", page.read_text(encoding="utf-8"))
    timed = folder / "timed.html"
    timed.write_text(source.replace("</body>", "<script>document.title = performance.now()</script></body>"))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom", timed.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<title>([\d.]+)</title>", done.stdout)
    return None if found is None else float(found[1])


if __name__ == "__main__":
    main()
