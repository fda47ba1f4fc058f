"""Releases of model families: merged onto both bases, verified, and computed the same by PEFT.

`scripts.dev.bench.proof_families` covers more families, with smaller differences; test_merge compares each family's
bits.
"""

import pytest
import transformers

from scripts.dev.bench import proof_families as families
from tests.tiny import make_base

# Tied, with biases; odd widths; biases of its own; norms of queries and keys, one key head; scaled, with a window.
NAMES = ("llama, tied, biases", "mistral, odd sizes", "qwen2, tied", "qwen3, tied, one key head", "gemma3")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_release_matches_the_run_and_peft(name, alpaca_file, tmp_path, seed):
    pytest.importorskip("peft")
    config_class, sizes = families.FAMILIES[name]
    sizes = families.SIZES | {"vocab_size": 264, "initializer_range": 0.02} | sizes
    base = make_base(tmp_path / "base", seed, getattr(transformers, config_class), **sizes)
    proof = families.prove(base, families.train_run(base, alpaca_file, tmp_path / "run"), tmp_path)
    assert proof.problems["dequantized"] == []
    # Onto weights other than those of training, a random model may be worse by chance, which is reported.
    assert all("is worse than the adapter's" in problem for problem in proof.problems["original"])
    assert proof.tensors >= 20
    assert abs(proof.max_kl) < 1e-6
    assert proof.peft_difference < 1e-5 < proof.update / 100
