"""Head and loss in chunks: the same loss and gradient, without all logits at once."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.kernels import head, linear_cross_entropy, linear_log_probs, linear_token_loss
from qlora.kernels.head import bytes_per_logit, default_chunk
from qlora.kernels.simulated import simulating
from qlora.memory.probe import measure_peak
from tests.interpreted import (
    Launches,
    counted_kernel,
    load_interpreted,
)
from tests.reference.cross_entropy import linear_cross_entropy as reference
from tests.reference.cross_entropy import token_losses

# The package exports other functions of this name's module.
cross_entropy = sys.modules["qlora.kernels.cross_entropy"]


def make_inputs(generator, rows, features, vocabulary, dtype=torch.float32):
    hidden = torch.randn(rows, features, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, features, generator=generator) * features**-0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    return hidden.requires_grad_(), weight, labels, bias


def random_weights(generator, rows):
    """Return weights, some of them zero."""
    return torch.rand(rows, generator=generator) * 3 * (torch.rand(rows, generator=generator) < 0.8)


def run(hidden, *args, **kwargs):
    loss = linear_cross_entropy(hidden, *args, **kwargs)
    (grad,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), grad


def relative(found, wanted):
    return ((found.float() - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


# Variants of the loss, alone and together.
VARIANTS = [
    {}, {"label_smoothing": 0.3}, {"by_probability": True}, {"label_smoothing": 0.1, "by_probability": True},
]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.integers(1, 40),
    features=st.integers(1, 24),
    vocabulary=st.integers(2, 70),
    # One row at a time, some, or all at once; also less than one row's logits.
    chunk_rows=st.sampled_from([0, 1, 3, 7, 40]),
    with_bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.0625, 3.0]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    weighted=st.booleans(),
    variant=st.sampled_from(VARIANTS),
)
def test_loss_and_gradient_are_torchs(
    seed, rows, features, vocabulary, chunk_rows, with_bias, logit_scale, softcap, weighted, variant
):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, labels, bias = make_inputs(generator, rows, features, vocabulary)
    options = {"bias": bias if with_bias else None, "logit_scale": logit_scale, "softcap": softcap}
    options["row_weights"] = random_weights(generator, rows) if weighted else None
    chunk = max(1, chunk_rows * vocabulary)
    loss, plain = linear_token_loss(hidden, weight, labels, chunk_elements=chunk, **options, **variant)
    (grad,) = torch.autograd.grad(loss, hidden)
    wanted_loss, wanted_grad = reference(hidden, weight, labels, **options, **variant)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), wanted_loss, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-5)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, reference(hidden, weight, labels, **options)[0], rtol=2e-5, atol=1e-5)


def test_without_a_variant_the_token_loss_is_the_cross_entropy(generator):
    hidden, weight, labels, _ = make_inputs(generator, 9, 16, 50)
    loss, plain = linear_token_loss(hidden, weight, labels)
    assert torch.equal(loss.detach(), plain)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bf16_stays_within_its_rounding(softcap, weighted, generator):
    hidden, weight, labels, bias = make_inputs(generator, 64, 48, 300, torch.bfloat16)
    options = {"bias": bias, "softcap": softcap, "logit_scale": 0.5}
    options["row_weights"] = torch.rand(64, generator=generator) if weighted else None
    loss, grad = run(hidden, weight, labels, chunk_elements=7 * 300, **options)
    wanted_loss, wanted_grad = reference(hidden, weight, labels, **options)
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    # A logit is rounded by 2^-9 of itself at most, and those of the label and of the largest count: below 2^-8 · 16
    # a row. The gradient's probabilities move by as much, and are rounded once, and so is the product.
    assert abs(loss - wanted_loss) < 64 * 2**-8 * 4
    assert relative(grad, wanted_grad) < 2**-6


@pytest.mark.parametrize("chunk_elements", [1, 7 * 50, 1 << 24])
def test_a_weight_is_as_many_rows(chunk_elements, generator):
    hidden, weight, labels, bias = make_inputs(generator, 23, 16, 50)
    times = torch.randint(4, (23,), generator=generator)
    repeated = hidden.detach().repeat_interleave(times, dim=0).requires_grad_()
    loss, grad = run(hidden, weight, labels, bias=bias, row_weights=times.float(), chunk_elements=chunk_elements)
    wanted_loss, wanted = run(repeated, weight, labels.repeat_interleave(times), bias=bias)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
    owners = torch.arange(23).repeat_interleave(times)
    torch.testing.assert_close(grad, torch.zeros_like(grad).index_add(0, owners, wanted), rtol=1e-4, atol=1e-5)
    assert (grad[times == 0] == 0).all()


def test_weights_of_one_change_nothing(generator):
    hidden, weight, labels, _ = make_inputs(generator, 23, 16, 50)
    loss, grad = run(hidden, weight, labels, row_weights=torch.ones(23), chunk_elements=5 * 50)
    plain_loss, plain_grad = run(hidden, weight, labels, chunk_elements=5 * 50)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert torch.equal(grad, plain_grad)


def test_a_chunk_of_any_size_gives_the_same_gradient(generator):
    hidden, weight, labels, _ = make_inputs(generator, 37, 16, 50)
    whole_loss, whole_grad = run(hidden, weight, labels)
    for chunk_elements in (1, 50, 149, 36 * 50, 37 * 50):
        loss, grad = run(hidden, weight, labels, chunk_elements=chunk_elements)
        torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, whole_grad, rtol=1e-5, atol=1e-6)


def test_the_gradient_scales_with_the_loss(generator):
    hidden, weight, labels, _ = make_inputs(generator, 9, 16, 50)
    _, whole = run(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight, labels) / 7
    (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(grad, whole / 7, rtol=1e-6, atol=0)
    assert torch.equal(grad, again)


def test_the_head_gets_no_gradient_and_hidden_is_left_alone(generator):
    hidden, weight, labels, bias = make_inputs(generator, 9, 16, 50)
    before = hidden.detach().clone()
    linear_cross_entropy(hidden, weight, labels, bias=bias).backward()
    assert weight.grad is None
    assert torch.equal(hidden, before)


def test_evaluation_gives_the_loss_of_training(generator):
    hidden, weight, labels, _ = make_inputs(generator, 9, 16, 50)
    trained = linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, trained)


def test_no_rows_give_a_loss_of_zero_and_an_empty_gradient(generator):
    hidden, weight, labels, _ = make_inputs(generator, 0, 16, 50)
    loss, grad = run(hidden, weight, labels)
    assert loss.item() == 0
    assert grad.shape == (0, 16)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation returned, in elements."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return result


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_more_logits_exist_at_once_than_a_chunk_holds(softcap, train, weighted, generator):
    rows, features, vocabulary, chunk_elements = 512, 4, 256, 8 * 1024
    hidden, weight, labels, bias = make_inputs(generator, rows, features, vocabulary)
    # Nothing but logits is as large as a chunk.
    assert max(hidden.numel(), weight.numel()) < chunk_elements < rows * vocabulary
    with LargestTensor() as largest, torch.set_grad_enabled(train):
        loss = linear_cross_entropy(
            hidden, weight, labels, bias=bias, softcap=softcap, chunk_elements=chunk_elements,
            row_weights=torch.ones(rows) if weighted else None,
        )  # fmt: skip
        if train:
            loss.backward()
    assert largest.size == chunk_elements


def test_the_head_is_read_once_a_chunk_in_full_chunks(generator):
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    hidden, weight, labels, _ = make_inputs(generator, 10, 16, 50)
    with Count(), torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, chunk_elements=4 * 50 + 49)
    products = [call for call in calls if call in (torch.ops.aten.mm, torch.ops.aten.addmm)]
    assert len(products) == 3  # Rows by four: 4, 4 and 2.


@pytest.fixture
def fused(monkeypatch):
    """Have losses computed by the kernel, in Triton's interpreter, with several tiles of logits in a row."""
    module = load_interpreted("qlora.kernels.cross_entropy_triton")
    monkeypatch.setattr(module, "MOST_COLUMNS", 32)
    monkeypatch.setitem(sys.modules, "qlora.kernels.cross_entropy_triton", module)
    monkeypatch.setattr(cross_entropy, "unfused_reason", lambda *_, **__: None)


@pytest.mark.parametrize("vocabulary", [2, 32, 70])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("logit_scale", "softcap", "weighted"), [(1.0, None, False), (3.0, 5.0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_gives_torchs_loss_and_gradient(
    dtype, logit_scale, softcap, weighted, variant, vocabulary, fused, generator
):
    hidden, weight, labels, bias = make_inputs(generator, 5, 16, vocabulary, dtype)
    options = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    options["row_weights"] = random_weights(generator, 5) if weighted else None
    loss, plain = linear_token_loss(hidden, weight, labels, chunk_elements=2 * vocabulary, **options, **variant)
    (grad,) = torch.autograd.grad(loss, hidden)
    wanted_loss, wanted_grad = reference(hidden, weight, labels, **options, **variant)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.detach(), wanted_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.float(), wanted_grad, rtol=tolerance, atol=tolerance)
    wanted_plain, _ = reference(hidden, weight, labels, **options)
    torch.testing.assert_close(plain, wanted_plain, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        evaluated, _ = linear_token_loss(hidden, weight, labels, chunk_elements=2 * vocabulary, **options, **variant)
    assert torch.equal(evaluated, loss)


@pytest.mark.parametrize("way", ["plain", "kernel"])
def test_launches_per_chunk(way, monkeypatch, generator):
    if way == "kernel":
        module = load_interpreted("qlora.kernels.cross_entropy_triton")
        monkeypatch.setattr(module, "_token_loss_kernel", counted_kernel("token_loss"))
        monkeypatch.setitem(sys.modules, "qlora.kernels.cross_entropy_triton", module)
        monkeypatch.setattr(cross_entropy, "unfused_reason", lambda *_, **__: None)
    hidden, weight, labels, _ = make_inputs(generator, 8, 16, 50, torch.bfloat16)
    counts = []
    for chunk_rows in (8, 4):
        with Launches() as launches:
            linear_token_loss(hidden, weight, labels, chunk_elements=chunk_rows * 50)
        counts.append(launches.total)
    assert counts[1] - counts[0] == {"plain": 21, "kernel": 7}[way]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("simulated", ["cuda", "cpu"])
def test_a_simulated_step_takes_the_memory_of_the_real_one(simulated, softcap, trained, monkeypatch, generator):
    hidden, weight, labels, _ = make_inputs(generator, 8, 16, 50, torch.bfloat16)
    weight.requires_grad_(trained)

    def peak(device):
        moved = [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in (hidden, weight)]
        own = labels.to(device)
        return measure_peak(lambda: linear_token_loss(*moved, own, softcap=softcap, chunk_elements=4 * 50), device)

    with simulating(torch.device(simulated)):
        predicted = peak(torch.device("meta"))
    if simulated == "cuda":  # this CPU takes its place
        module = load_interpreted("qlora.kernels.cross_entropy_triton")
        monkeypatch.setattr(module, "_token_loss_kernel", counted_kernel("token_loss"))
        monkeypatch.setitem(sys.modules, "qlora.kernels.cross_entropy_triton", module)
        monkeypatch.setattr(cross_entropy, "unfused_reason", lambda *_, **__: None)
    with Launches() as launches:
        real = peak(torch.device("cpu"))
    assert predicted == real
    assert ("token_loss" in launches.counts) == (simulated == "cuda" and not trained)


OPTIONS = {
    "plain": {},
    "capped": {"logit_scale": 0.25, "softcap": 30.0},
    "of Gemma": {"softcap": 5.0},
    "smoothed": {"label_smoothing": 0.1, "is_weighted": True},
    "by probability": {"by_probability": True, "is_weighted": True},
    "evaluated": {"needs_grad": False},
}


@pytest.fixture
def kernels(monkeypatch):
    module = load_interpreted("qlora.kernels.cross_entropy_triton")
    monkeypatch.setitem(sys.modules, "qlora.kernels.cross_entropy_triton", module)
    return module


def variant_of(size=5000, dtype=torch.float16, **options):
    return cross_entropy.Variant(torch.device("cpu"), dtype, size, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [2, 97, 5000])
def test_a_trial_takes_the_kernel_with_any_options(size, options, dtype, kernels):
    with torch.inference_mode():
        assert cross_entropy.kernel_matches(variant_of(size, dtype, **options))


@pytest.mark.parametrize(
    ("error", "options"),
    [
        ("loss", {}),
        ("loss of evaluation", {"needs_grad": False}),
        ("gradient of the label", {}),
        ("gradient of the second tile", {}),
        ("last gradient", {}),
        ("scale of the gradient", {}),
        ("softcap", {"softcap": 5.0}),
        ("weights", {"is_weighted": True}),
        ("smoothing", {"label_smoothing": 0.1}),
        ("probability", {"by_probability": True}),
    ],
)
def test_a_kernel_that_gives_other_values_is_not_used(error, options, kernels, monkeypatch):
    right = kernels.token_losses_triton_

    def wrong(logits, labels, scale, softcap, weights, smoothing, by_probability, needs_grad):
        softcap = None if error == "softcap" else softcap
        weights = None if error == "weights" else weights
        smoothing = 0.0 if error == "smoothing" else smoothing
        by_probability = by_probability and error != "probability"
        losses, plain = right(logits, labels, scale, softcap, weights, smoothing, by_probability, needs_grad)
        if error == ("loss" if needs_grad else "loss of evaluation"):
            losses[2] += 0.01
        if error == "gradient of the label":
            logits[2, labels[2]] *= 1.05
        if error == "gradient of the second tile":
            logits[:, 2048:4096] = 0
        if error == "last gradient":
            logits[:2, -1] = 0
        if error == "scale of the gradient":
            logits *= 1.005
        return losses, plain

    variant = variant_of(**options)
    assert cross_entropy.kernel_matches(variant)
    monkeypatch.setattr(kernels, "token_losses_triton_", wrong)
    assert not cross_entropy.kernel_matches(variant)


def test_each_variant_is_tried_once_and_the_path_names_those_that_fail(kernels, monkeypatch, caplog):
    cpu, tried, right = torch.device("cpu"), [], kernels.token_losses_triton_

    def fails_with_caps(logits, labels, scale, softcap, *options):
        tried.append(softcap)
        if softcap is not None:
            raise RuntimeError("no\ncompiler" + "!" * 1000)
        return right(logits, labels, scale, softcap, *options)

    monkeypatch.setattr(kernels, "token_losses_triton_", fails_with_caps)
    monkeypatch.setattr(cross_entropy, "_reasons", {})
    assert cross_entropy.loss_path(cpu, torch.float16) == ("plain torch", "the fused cross-entropy is for CUDA")
    monkeypatch.setattr(cross_entropy, "_unusable_reason", lambda *_: None)
    assert cross_entropy.loss_path(cpu, torch.float16)[0] == "fused kernel"
    capped, plain = variant_of(softcap=5.0), variant_of()
    for _ in range(2):
        reason = cross_entropy.unfused_reason(capped)
        assert reason.startswith("the fused cross-entropy failed for 5,000 logits a row in float16: RuntimeError: no c")
        assert len(reason) < 300
    assert cross_entropy.loss_path(cpu, torch.float16) == ("plain torch", reason)
    assert cross_entropy.unfused_reason(plain) is None
    path, why = cross_entropy.loss_path(cpu, torch.float16)
    assert (path, why) == ("fused kernel", f"it gave torch's values here; plain torch for other losses: {reason}")
    assert cross_entropy.loss_path(cpu, torch.float32)[1].startswith("if ")
    assert tried == [5.0, None]
    assert [record.getMessage() for record in caplog.records] == [f"Losses are computed in plain torch: {reason}."]


def test_memory_that_runs_out_in_a_trial_is_raised_and_decides_nothing(kernels, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(cross_entropy, "_reasons", {})
    monkeypatch.setattr(cross_entropy, "_unusable_reason", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "token_losses_triton_", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
            cross_entropy.unfused_reason(variant_of())
    assert cross_entropy.unfused_reason(variant_of()) is None


GIB = 1 << 30


@pytest.mark.parametrize(
    ("gib", "vocabulary", "rows", "rows_fp32"),
    [
        (24, 128_256, 512, 512), (24, 256_000, 256, 384), (8, 128_256, 128, 256), (139, 256_000, 512, 512),
        (4, 256_000, 128, 128), (24, 32_000, 512, 512), (24, 2_048, 8_192, 8_192), (24, 16_777_216, 128, 128),
    ],
)  # fmt: skip
def test_a_gpus_chunks_are_tiles_of_rows_and_a_small_share_of_its_memory(gib, vocabulary, rows, rows_fp32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert default_chunk(torch.device("cuda", 0), vocabulary, torch.bfloat16) == rows * vocabulary
    assert default_chunk(torch.device("cuda", 0), vocabulary, torch.float32) == rows_fp32 * vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("function", [linear_token_loss, linear_log_probs])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_chunk_takes_the_bytes_that_its_size_is_chosen_by(kind, function, softcap, dtype, monkeypatch):
    vocabulary, device = 10_000, torch.device(kind)
    monkeypatch.setattr(head, "BLOCK_ELEMENTS_CPU", vocabulary)  # what a CPU holds in fp32 does not grow with a chunk
    monkeypatch.setattr(cross_entropy, "_unusable_reason", lambda *_: "plain torch is tested")
    hidden, weight = (torch.empty(rows, 4, dtype=dtype, device="meta") for rows in (12, vocabulary))
    labels = torch.empty(12, dtype=torch.int64, device="meta")
    hidden.requires_grad_()

    def step(rows):
        found = function(hidden, [weight], labels, softcap=softcap, chunk_elements=rows * vocabulary)
        (found[0] if isinstance(found, tuple) else found).sum().backward()

    with simulating(device):
        few, many = (measure_peak(lambda rows=rows: step(rows), torch.device("meta")) for rows in (3, 6))
    of_slope = 0 if softcap is None or kind == "cpu" else 4
    assert round((many - few) / (3 * vocabulary)) == bytes_per_logit(device, dtype) + of_slope


def split_at(weight, bounds, trained):
    """Return blocks of a weight's rows, those at the indices `trained` with a gradient."""
    blocks = weight.tensor_split(sorted(bounds))
    return [block.clone().requires_grad_(place in trained) for place, block in enumerate(blocks)]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.integers(1, 40),
    bounds=st.lists(st.integers(1, 49), max_size=3, unique=True),
    trained=st.sets(st.integers(0, 3)),
    chunk_rows=st.sampled_from([1, 3, 40]),
    with_bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 3.0]),
    softcap=st.sampled_from([None, 1.5]),
    weighted=st.booleans(),
    frozen_hidden=st.booleans(),
    variant=st.sampled_from(VARIANTS),
)
def test_trained_blocks_of_the_head_get_torchs_gradient(
    seed, rows, bounds, trained, chunk_rows, with_bias, logit_scale, softcap, weighted, frozen_hidden, variant
):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, labels, bias = make_inputs(generator, rows, 16, 50)
    hidden.requires_grad_(not frozen_hidden)
    options = {"bias": bias if with_bias else None, "logit_scale": logit_scale, "softcap": softcap}
    options["row_weights"] = random_weights(generator, rows) if weighted else None
    blocks = split_at(weight, bounds, trained)
    loss, _ = linear_token_loss(hidden, blocks, labels, chunk_elements=chunk_rows * 50, **options, **variant)
    wanted_loss, _ = reference(hidden, weight, labels, **options, **variant)
    torch.testing.assert_close(loss.detach(), wanted_loss, rtol=2e-5, atol=1e-5)
    wanted = torch.cat(blocks).double().detach().requires_grad_()
    own_bias = bias.double() if with_bias else None
    losses = token_losses(hidden.detach().double(), wanted, labels, own_bias, logit_scale, softcap, **variant)
    (losses * (1 if options["row_weights"] is None else options["row_weights"])).sum().backward()
    if loss.requires_grad:
        (loss / 7).backward()
    for block, grad in zip(blocks, wanted.grad.split([len(block) for block in blocks]), strict=True):
        if block.requires_grad:
            torch.testing.assert_close(block.grad, grad.float() / 7, rtol=1e-4, atol=1e-5)
        else:
            assert block.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_head_are_the_whole_of_it(dtype, generator):
    hidden, weight, labels, bias = make_inputs(generator, 23, 16, 50, dtype)
    loss, grad = run(hidden, split_at(weight, [7, 40], {}), labels, bias=bias, chunk_elements=5 * 50)
    wanted_loss, wanted = run(hidden, weight, labels, bias=bias, chunk_elements=5 * 50)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    assert relative(grad, wanted.float()) < 2 * torch.finfo(dtype).eps
    assert torch.equal(run(hidden, [weight], labels)[1], run(hidden, weight, labels)[1])


def test_the_gradient_of_16_bit_rows_is_summed_in_fp32(generator):
    hidden, weight, labels, _ = make_inputs(generator, 4000, 16, 50)
    rows = weight.bfloat16().requires_grad_()
    rows.grad_dtype = torch.float32
    linear_cross_entropy(hidden.bfloat16(), [rows], labels, chunk_elements=50).backward()
    exact = rows.detach().double().requires_grad_()
    logits = hidden.detach().bfloat16().double() @ exact.T
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    # Of each of 4,000 terms a logit is rounded to bf16; sums in bf16 would be off by 30 times as much.
    assert relative(rows.grad, exact.grad) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [(), (0,)])
@pytest.mark.parametrize("function", [linear_token_loss, linear_log_probs])
def test_blocks_of_a_chunk_change_nothing(function, trained, dtype, generator, monkeypatch):
    hidden, weight, labels, bias = make_inputs(generator, 23, 16, 50, dtype)
    blocks = split_at(weight, (20,), trained)
    given = [each for each in (hidden, *blocks) if each.requires_grad]
    factors = random_weights(generator, 23) if function is linear_log_probs else 1.0
    found = []
    for rows in (100, 3, 1):
        monkeypatch.setattr(head, "BLOCK_ELEMENTS_CPU", rows * 50)
        result = function(hidden, blocks, labels, bias, softcap=5.0, logit_scale=0.7, chunk_elements=10 * 50)
        result = result[0] if isinstance(result, tuple) else result
        found.append((result, torch.autograd.grad((result * factors).sum(), given)))
    assert found[0][1][0].abs().sum() > 0
    for result, grads in found[1:]:
        torch.testing.assert_close(result, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grads, found[0][1], rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
