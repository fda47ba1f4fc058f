#!/usr/bin/env bash
# Install qlora into .venv and run the whole job on a tiny model that is made here, without a model hub:
# train → evaluate → merge → verify → generate. The results are in .cache/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step "1. Install into .venv"
bash scripts/setup.sh plot
export PATH="$PWD/.venv/bin:$PATH"
# Let waiting threads sleep: on shared cores, a spinning thread makes a step several times slower.
export OMP_WAIT_POLICY=PASSIVE
out=.cache/quickstart
started=$SECONDS

step "2. Make a tiny base model (pretrained here on plain statements about an invented world; cached)"
python scripts/tiny/make_base.py --out .cache/tiny/base
python scripts/tiny/make_instructions.py --out .cache/tiny/data

step "3. Ask the base, before fine-tuning"
python scripts/tiny/exact_match.py .cache/tiny/base .cache/tiny/data/heldout.jsonl --at-most 0.1

step "4. Fine-tune it in 4 bits: qlora train configs/tiny.yaml"
rm -rf "$out"
qlora train configs/tiny.yaml

step "5. Evaluate, merge to fp16, verify"
qlora eval "$out/run"
qlora merge "$out/run" -o "$out/merged"
qlora verify "$out/run" "$out/merged"

step "6. Ask the merged model, which needs only transformers"
python scripts/tiny/exact_match.py "$out/merged" .cache/tiny/data/heldout.jsonl --at-least 0.8
question=$(python -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["instruction"])' .cache/tiny/data/heldout.jsonl)
echo "  \$ qlora generate $out/merged --prompt \"$question\""
qlora generate "$out/merged" --prompt "$question" | sed 's/^/  /'

step "Done in $((SECONDS - started)) s. Loss curve: $out/run/loss.png. Next: source .venv/bin/activate && qlora init"
