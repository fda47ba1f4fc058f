#!/usr/bin/env bash
# Install qlora into .venv, and classify images: make a tiny ViT that knows letters, teach it handwritten digits in 4
# bits, merge, verify, and read the held-out digits with transformers alone. The results are in .cache/digits.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step "1. Install into .venv"
bash scripts/setup.sh plot,images,digits
export PATH="$PWD/.venv/bin:$PATH"
# Let waiting threads sleep: on shared cores, a spinning thread makes a step several times slower.
export OMP_WAIT_POLICY=PASSIVE
out=.cache/digits
started=$SECONDS

step "2. Write scikit-learn's digits as images, and make a tiny ViT (pretrained here on drawn letters; cached)"
python scripts/tiny/make_digits.py --out "$out/images"
python scripts/tiny/make_image_base.py --out "$out/base"

step "3. Fine-tune it in 4 bits: qlora train configs/digits.yaml"
rm -rf "$out/run" "$out/merged"
qlora train configs/digits.yaml

step "4. Evaluate, merge to fp32, verify"
qlora eval "$out/run"
qlora merge "$out/run" -o "$out/merged"
qlora verify "$out/run" "$out/merged"

step "5. Read the held-out digits with transformers alone"
python scripts/tiny/read_images.py "$out/merged" "$out/images/test" --at-least 0.97

step "Done in $((SECONDS - started)) s. Loss curve: $out/run/loss.png, confusion matrix: $out/run/confusion.png."
