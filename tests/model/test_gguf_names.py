"""Models of GGUF files compute what the models that were written do, in every supported architecture."""

import pytest
import torch

from qlora.errors import ModelError
from qlora.files.gguf_config import ARCHITECTURES
from qlora.model import load_base
from tests.gguf_files import write_gguf_of

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8, "rope_theta": 50_000.0}
SIZES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen2moe": EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3moe": EXPERTS | {"norm_topk_prob": True},
    "gemma2": GEMMA | {"attn_logit_softcapping": 30.0, "final_logit_softcapping": 20.0},
    "gemma3": GEMMA | {"num_hidden_layers": 7},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_of_a_file_computes_the_same(architecture, tmp_path, seed, generator):
    expected, path = write_gguf_of(architecture, tmp_path / "model.gguf", seed, **SIZES[architecture])
    found, _ = load_base(str(path), quantization="none", compute_dtype="float32")
    ids = torch.randint(4, 99, (2, 24), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected.eval()(ids).logits, rtol=0, atol=0)


def test_metadata_of_another_shape_than_the_tensors_is_refused(tmp_path, seed):
    _, path = write_gguf_of("llama", tmp_path / "model.gguf", seed, {"feed_forward_length": 64}, num_hidden_layers=1)
    with pytest.raises(
        ModelError, match=r"ffn_gate.weight is \(96, 64\), but the file's metadata describes \(64, 64\)"
    ):
        load_base(str(path), quantization="none", compute_dtype="float32")
