"""Write scikit-learn's handwritten digits as PNG files: a folder for each split, and in it one for each digit.

The 1,797 images have 8 × 8 pixels in 17 shades of grey (https://archive.ics.uci.edu/dataset/80). A fifth, drawn by a
fixed seed, is for testing.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TEST_SHARE, SEED = 0.2, 0
SPLITS = ("train", "test")


def main() -> None:
    """Write the images, replacing earlier ones.

    They are written next to `out` and renamed to it, so `out` is never incomplete.

    Raises:
        FileExistsError: `out` holds something else than images made by this script.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the images")
    out = parser.parse_args().out
    if out.exists() and any(out.iterdir()) and {path.name for path in out.iterdir()} != {*SPLITS}:
        raise FileExistsError(f"{out} holds something other than the digits; choose another --out")
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.images))
    is_test = np.isin(np.arange(len(order)), order[: round(TEST_SHARE * len(order))])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as staging:
        made = Path(staging) / "digits"
        for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
            folder = made / SPLITS[int(is_test[number])] / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(folder / f"{number:04}.png")
        if out.exists():
            shutil.rmtree(out)
        os.replace(made, out)
    print(f"  {out}: {np.count_nonzero(~is_test)} images for training, {np.count_nonzero(is_test)} for testing")


if __name__ == "__main__":
    main()
