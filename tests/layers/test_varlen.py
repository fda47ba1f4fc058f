"""Which kernel computes attention within documents on a GPU, for GPUs that are not there."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BltConfig, DeepseekV3Config, Gemma4TextConfig, GPT2Config, LlamaConfig

from qlora.layers import attention, use_document_attention
from qlora.layers.varlen import describe_kernel, varlen_unusable_reason
from qlora.model import load_base
from scripts.dev.support.run import architectures
from scripts.dev.support.sizes import OWN_TOKENS, tiny_config
from tests.tiny import make_base

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)
LENGTHS, HEADS, KV_HEADS = [5, 1, 9], 4, 2
TABLE = [
    (BF16, AMPERE, 128, 128, None),
    (FP16, ADA, 64, 64, None),
    (BF16, HOPPER, 256, 256, None),
    (FP16, BLACKWELL, 8, 8, None),
    (FP32, HOPPER, 128, 128, "varlen_attn is for 16 bits, not float32"),
    (FP16, TURING, 128, 128, "varlen_attn needs compute capability 8.0, this GPU has 7.5"),
    (BF16, ADA, 192, 128, "varlen_attn needs keys and values of one size, not of 192 and 128"),
    (BF16, ADA, 20, 20, "varlen_attn needs head dims to 256 in steps of 8, not 20"),
    (BF16, HOPPER, 264, 264, "varlen_attn needs head dims to 256 in steps of 8, not 264"),
    (BF16, HOPPER, 200, 200, None),
    (BF16, ADA, 200, 200, "varlen_attn can't train a head dim of 200 on compute capability 8.9"),
    (FP16, BLACKWELL, 224, 224, "varlen_attn can't train a head dim of 224 on compute capability 12.0"),
    (BF16, ADA, 256, 256, None),
]


@pytest.mark.parametrize(("dtype", "capability", "head_dim", "value_dim", "reason"), TABLE)
def test_the_table_of_what_the_kernel_takes(dtype, capability, head_dim, value_dim, reason):
    assert varlen_unusable_reason(dtype, capability, head_dim, value_dim) == reason


@pytest.fixture
def called(monkeypatch):
    """Return the kernels that are called, in order, with the sizes of their queries and keys; they compute nothing."""
    calls = []

    def varlen(query, key, value, *_):
        calls.append(("varlen", query.shape[2]))
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])

    def sdpa(query, key, value, mask=None, *, is_causal=False, enable_gqa=False, **_):
        kind = "masked" if mask is not None else "causal"
        assert is_causal == (mask is None)
        assert enable_gqa
        calls.append((kind, query.shape[2], key.shape[1]))
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def with_sinks(query, key, value, sinks, scale, mask):
        assert mask.shape == (query.shape[2], query.shape[2])
        calls.append(("sinks", query.shape[2], key.shape[1]))
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    # A build of torch without CUDA can't compute with tensors that are said to be there.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: tensor)
    monkeypatch.setattr(
        attention, "near_mask", lambda length, window, device: torch.empty(length, length, device=device)
    )
    monkeypatch.setattr(attention, "masked_with_sinks", with_sinks)
    monkeypatch.setattr(attention, "_varlen", varlen)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    return calls


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("dtype", "capability", "head_dim", "value_dim", "reason"), TABLE)
def test_documents_are_attended_to_together_or_one_at_a_time(
    dtype, capability, head_dim, value_dim, reason, window, has_sinks, called, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    total = sum(LENGTHS)
    with FakeTensorMode():
        query = torch.empty(1, HEADS, total, head_dim, dtype=dtype, device="cuda")
        key, value = (
            torch.empty(1, KV_HEADS, total, size, dtype=dtype, device="cuda") for size in (head_dim, value_dim)
        )
        starts = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="cuda")
        sinks = torch.empty(HEADS, dtype=dtype, device="cuda") if has_sinks else None
        attended, _ = attention.document_attention(
            None, query, key, value, None, sliding_window=window, cu_seq_lens_q=starts, max_length_q=max(LENGTHS),
            document_lengths=LENGTHS, s_aux=sinks,
        )  # fmt: skip
    assert attended.shape == (1, total, HEADS, value_dim)
    if reason is None:
        assert called == [("varlen", total)]
    elif has_sinks:
        assert called == [("sinks", length, HEADS) for length in LENGTHS]
    else:
        kinds = ["masked" if window and length > window else "causal" for length in LENGTHS]
        # Torch's other kernels take as many key heads as query heads.
        assert called == [(kind, length, HEADS) for kind, length in zip(kinds, LENGTHS, strict=True)]


@pytest.mark.parametrize(("dtype", "keys"), [(BF16, KV_HEADS), (FP32, HEADS)])
def test_a_row_of_one_document_keeps_its_grouped_heads_where_flash_attention_takes_them(
    dtype, keys, called, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: AMPERE)
    with FakeTensorMode():
        query, key = (torch.empty(2, heads, 7, 16, dtype=dtype, device="cuda") for heads in (HEADS, KV_HEADS))
        attention.document_attention(None, query, key, key, None)
    assert called == [("causal", 7, keys)]


ONE_AT_A_TIME = "a document at a time: varlen_attn needs "
MODELS = {
    "llama": (LlamaConfig(hidden_size=64, num_attention_heads=4), "varlen_attn"),
    "llama with a head dim": (
        LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=20),
        f"{ONE_AT_A_TIME}head dims to 256 in steps of 8, not 20",
    ),
    "gpt2": (GPT2Config(n_embd=60, n_head=3), f"{ONE_AT_A_TIME}head dims to 256 in steps of 8, not 20"),
    "deepseek": (
        DeepseekV3Config(num_hidden_layers=2),
        f"{ONE_AT_A_TIME}keys and values of one size, not of 192 and 128",
    ),
    "gemma 4, whose layers differ": (
        Gemma4TextConfig(num_hidden_layers=12),
        f"varlen_attn, in 2 of 12 layers {ONE_AT_A_TIME}head dims to 256 in steps of 8, not 512",
    ),
    "blt, of several models": (BltConfig(), "varlen_attn"),
}


def on_meta(config, auto_class=AutoModelForCausalLM):
    with torch.device("meta"):
        return auto_class.from_config(config, dtype=BF16)


@pytest.mark.parametrize(("config", "kernel"), MODELS.values(), ids=MODELS)
def test_the_kernel_of_a_model_is_described_by_the_sizes_of_its_layers(config, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: AMPERE)
    assert describe_kernel(on_meta(config)) == kernel


def test_the_kernel_of_every_architecture_can_be_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: TURING)
    reason = "varlen_attn needs compute capability 8.0, this GPU has 7.5"
    described = dict.fromkeys((f"a document at a time: {reason}", "varlen_attn where it takes the heads' sizes"), 0)
    for name, auto_class in architectures().items():
        try:
            config = tiny_config(transformers.CONFIG_MAPPING[name], 259, dict.fromkeys(OWN_TOKENS, 0))
            model = on_meta(config, getattr(transformers, auto_class))
        except Exception:  # some can't be built without other packages, or with tiny sizes
            continue
        described[describe_kernel(model)] += 1
    by_size, unknown = described.values()
    assert by_size > 3 * unknown > 0


def test_a_run_says_why_documents_are_computed_one_at_a_time(tmp_path, seed, monkeypatch):
    model, _ = load_base(str(make_base(tmp_path / "base", seed)), compute_dtype="float32")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: HOPPER)
    assert use_document_attention(model) == (
        "sdpa by documents (a document at a time: varlen_attn is for 16 bits, not float32)",
        None,
    )
