.PHONY: check test test-gpu bench

check:  ## format, lint, types, import contract
	ruff format --check . && ruff check . && mypy && lint-imports --no-cache

test:  ## everything that runs without a GPU
	pytest

test-gpu:  ## what needs CUDA
	pytest -m gpu

cuda = $(shell python -c "import torch; print(torch.cuda.is_available() and 1 or '')")
has = $(shell python -c "import importlib.util as u; print(u.find_spec('$(1)') and 1 or '')")

bench:  ## what this machine can measure; appends to docs/benchmarks/
	python scripts/bench/memory.py --out docs/benchmarks/memory.md
	python scripts/bench/estimate.py --out docs/benchmarks/estimate.md
	python scripts/bench/loss.py --out docs/benchmarks/loss.md
	python scripts/bench/forms.py --out docs/benchmarks/forms.md
	python scripts/bench/loading.py
	python scripts/bench/templates.py --out docs/benchmarks/templates.md
	$(if $(cuda),python scripts/bench/dequantize.py --out docs/benchmarks/dequantize.md)
	$(if $(cuda),python scripts/bench/max_context.py --out docs/benchmarks/max_context.md)
	$(if $(call has,peft),python scripts/bench/train_step.py --peer peft --out docs/benchmarks/train_step.md)
	$(if $(call has,peft),python scripts/bench/beside_peft.py)
	$(if $(call has,trl),python scripts/bench/tokenizing.py)
