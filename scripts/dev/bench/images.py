"""Measure the accuracy of configs/digits.yaml before and after training, and from the merged folder.

python -m scripts.dev.bench.images --out docs/benchmarks/images.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import qlora
from scripts.dev.bench.common import ROOT, append, heading

TITLE = """# Images
"""
TEXT = """`python -m scripts.dev.bench.images`. `configs/digits.yaml`: scikit-learn's handwritten digits, 8 × 8 pixels
that are scaled to 16 × 16, with a tiny ViT of 4 layers and width 128, pretrained by `scripts/tiny/make_image_base.py`
on drawn letters. NF4 with double quantization, LoRA of rank 16 on all linear layers. Accuracy on the held-out images:
before training (with a head that was just drawn), after it, by `qlora predict` with the run and with its merge in fp32,
and by transformers alone with that folder; and the number of held-out images that the run and transformers predict
differently. Seconds are of training, in wall time and in CPU time of the process."""
COLUMNS = (
    "images", "steps", "before", "after", "macro F1", "predict, run", "predict, merged", "transformers, merged",
    "different", "verified", "s", "CPU s",
)  # fmt: skip
TABLE = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def make(script: str, *arguments: str) -> None:
    """Run a script that makes the base or the images."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / "tiny" / script), *arguments], check=True)


def accuracy(labels: list[str], files: list[Path]) -> float:
    """Return the share of images whose label is the name of their folder."""
    return sum(label == file.parent.name for label, file in zip(labels, files, strict=True)) / len(files)


def by_transformers(merged: Path, images: Path) -> list[str]:
    """Return the labels that transformers alone predicts, in the order of the paths; in a process without qlora."""
    code = (
        "import json, sys; from pathlib import Path; from read_images import read_images; "
        "assert not any(name.startswith('qlora') for name in sys.modules); "
        "print(json.dumps(read_images(Path(sys.argv[1]), sorted(Path(sys.argv[2]).glob('*/*.png')))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(merged.absolute()), str(images.absolute())],
        cwd=ROOT / "scripts" / "tiny", check=True, capture_output=True, text=True,
    )  # fmt: skip
    labels: list[str] = json.loads(done.stdout.splitlines()[-1])
    return labels


def measure(folder: Path) -> str:
    """Make base and images, train, and return the figures as a line of a table."""
    base, images = folder / "base", folder / "images"
    make("make_digits.py", "--out", str(images))
    make("make_image_base.py", "--out", str(base))
    overrides = [f"model.base={base}", f"data.train={images}", f"train.output_dir={folder / 'run'}"]
    overrides += [f"data.eval=[{{path: {images}, split: test}}]", f"data.cache_dir={folder / 'cache'}"]
    config = qlora.load_config(ROOT / "configs" / "digits.yaml", overrides)
    started, used = time.perf_counter(), time.process_time()
    result = qlora.train(config, show_progress=True)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    report = qlora.evaluate(result.run_dir)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before = next(line for line in lines if "eval_accuracy" in line)["eval_accuracy"]
    merged = folder / "merged"
    qlora.merge(result.run_dir, merged, dtype="float32")
    verified = qlora.verify(result.run_dir, merged)
    files = sorted((images / "test").glob("*/*.png"))
    of_run, of_merged = (
        [str(each.label) for each in qlora.predict(model, images / "test")] for model in (result.run_dir, merged)
    )
    theirs = by_transformers(merged, images / "test")
    different = sum(map(str.__ne__, of_run, theirs))
    trained = len([*images.glob("train/*/*.png")])
    return (
        f"| {trained:,} / {len(files)} | {result.steps} | {before:.1%} | {report.metrics['accuracy']:.1%} | "
        f"{report.metrics['macro_f1']:.1%} | {accuracy(of_run, files):.1%} | {accuracy(of_merged, files):.1%} | "
        f"{accuracy(theirs, files):.1%} | {different} | {'yes' if verified.matches else 'no'} | {seconds:,.0f} | "
        f"{cpu:,.0f} |"
    )


def main() -> None:
    """Measure, and append the figures to a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="page to append to")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        line = measure(Path(folder))
    title = heading("Accuracy of a tiny ViT on handwritten digits", "torch", "transformers", "bitsandbytes")
    append(out, TITLE, [*title, TEXT, "", TABLE, line])


if __name__ == "__main__":
    main()
