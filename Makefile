.PHONY: check test test-gpu bench

check:  ## format, lint, types, import contract
	ruff format --check . && ruff check . && mypy && lint-imports --no-cache

test:  ## everything that runs without a GPU
	pytest

test-gpu:  ## what needs CUDA
	pytest -m gpu

bench:  ## what this machine can measure; appends to docs/benchmarks/
	python scripts/bench/beside_peft.py
	python scripts/bench/loading.py
