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
	python -m scripts.dev.bench.memory --out docs/benchmarks/memory.md
	python -m scripts.dev.bench.estimate --out docs/benchmarks/estimate.md
	python -m scripts.dev.bench.loss --out docs/benchmarks/loss.md
	python -m scripts.dev.bench.forms --out docs/benchmarks/forms.md
	python -m scripts.dev.bench.loading
	python -m scripts.dev.bench.templates --out docs/benchmarks/templates.md
	python -m scripts.dev.bench.run_page --out docs/benchmarks/run_page.md
	$(if $(cuda),python -m scripts.dev.bench.dequantize --out docs/benchmarks/dequantize.md)
	$(if $(cuda),python -m scripts.dev.bench.max_context --out docs/benchmarks/max_context.md)
	$(if $(call has,peft),python -m scripts.dev.bench.train_step --peer peft --out docs/benchmarks/train_step.md)
	$(if $(call has,peft),python -m scripts.dev.bench.beside_peft)
	$(if $(call has,trl),python -m scripts.dev.bench.tokenizing)
