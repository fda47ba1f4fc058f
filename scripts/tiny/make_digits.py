"""Write scikit-learn's handwritten digits as PNG files: a folder for each split, and in it one for each digit.

The 1,797 images have 8 × 8 pixels in 17 shades of grey (https://archive.ics.uci.edu/dataset/80). A fifth, drawn by a
fixed seed, is for testing.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TEST_SHARE, SEED = 0.2, 0


def main() -> None:
    """Write the images, replacing earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the images")
    out = parser.parse_args().out
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.images))
    is_test = np.isin(np.arange(len(order)), order[: round(TEST_SHARE * len(order))])
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent))
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = staging / ("test" if is_test[number] else "train") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(folder / f"{number:04}.png")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    print(f"  {out}: {np.count_nonzero(~is_test)} images for training, {np.count_nonzero(is_test)} for testing")


if __name__ == "__main__":
    main()
