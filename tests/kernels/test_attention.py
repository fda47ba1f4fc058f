import pytest
import torch

from qlora.kernels import attention, causal_attention
from qlora.layers import attention as layer_attention
from qlora.layers.region import recomputed

# (batch, heads, kv_heads, lengths, head_dim, width, scale, window)
SHAPES = [
    (1, 8, 4, [300, 7, 1, 200], 64, 64, None, None),
    (2, 4, 4, [150], 16, 16, 0.1, None),
    (1, 4, 2, [300, 20], 24, 40, None, 50),
    (2, 6, 2, [290], 8, 8, 1.0, 200),
    (1, 2, 1, [5, 130], 8, 8, None, 1),
]


def reference(query, key, value, lengths, window=None, scale=None):
    """Attention with all scores and a mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    place, document = torch.arange(sum(lengths)), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = place[:, None] - place
    seen = (distance >= 0) & (document[:, None] == document)
    if window is not None:
        seen &= distance < window
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def draw(generator):
    def drawn(batch, heads, kv_heads, lengths, head_dim, width, dtype=torch.float64):
        sizes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, width))
        shapes = ((batch, sum(lengths), *size) for size in sizes)
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        grad = torch.randn(batch, sum(lengths), heads, width, generator=generator, dtype=torch.float64).to(dtype)
        return [tensor.transpose(1, 2).requires_grad_() for tensor in inputs], grad

    return drawn


@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize(
    ("tile", "together"), [(attention.TILE, attention.GROUP_ELEMENTS), (5_000, 0)], ids=["large tiles", "small tiles"]
)
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "lengths", "head_dim", "width", "scale", "window"), SHAPES)
def test_outputs_and_gradients_are_those_of_the_formula(
    batch, heads, kv_heads, lengths, head_dim, width, scale, window, tile, together, has_tiles, draw, monkeypatch
):
    monkeypatch.setattr(attention, "TILE", tile)
    monkeypatch.setattr(attention, "GROUP_ELEMENTS", together)
    monkeypatch.setattr(attention, "has_tiles", lambda: has_tiles)
    inputs, grad = draw(batch, heads, kv_heads, lengths, head_dim, width)
    found = causal_attention(*inputs, lengths, scale, window)
    expected = reference(*inputs, lengths, window, scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad(output, inputs, grad) for output in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("has_tiles", [False, True])
def test_in_bf16_it_is_as_close_to_the_formula_as_its_roundings(has_tiles, draw, monkeypatch):
    monkeypatch.setattr(attention, "has_tiles", lambda: has_tiles)
    inputs, grad = draw(1, 8, 4, [300, 40], 64, 64, dtype=torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = causal_attention(*inputs, [300, 40]), reference(*exact, [300, 40])
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    )
    for one, other in pairs:
        assert (one.double() - other).norm() < 2 * torch.finfo(torch.bfloat16).eps * other.norm()


@pytest.mark.parametrize("has_tiles", [False, True])
def test_a_document_depends_on_no_other(has_tiles, draw, monkeypatch):
    monkeypatch.setattr(attention, "has_tiles", lambda: has_tiles)
    lengths, places = [140, 30, 150], (slice(0, 140), slice(140, 170), slice(170, 320))  # two are computed together
    inputs, grad = draw(1, 4, 2, lengths, 16, 16, dtype=torch.bfloat16)
    together = causal_attention(*inputs, lengths)
    grads = torch.autograd.grad(together, inputs, grad)
    for number, place in enumerate(places):
        own = [tensor.detach()[:, :, place].requires_grad_() for tensor in inputs]
        alone = causal_attention(*own)
        assert torch.equal(together[:, place], alone), number
        for found, expected in zip(grads, torch.autograd.grad(alone, own, grad[:, place]), strict=True):
            assert torch.equal(found[:, :, place], expected)


def test_the_meta_device_gives_the_same_shapes_and_strides(draw):
    inputs, grad = draw(2, 4, 2, [30], 16, 8, dtype=torch.bfloat16)
    shapes = []
    for device in ("cpu", "meta"):
        moved = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
        output = causal_attention(*moved)
        results = [output, *torch.autograd.grad(output, moved, grad.to(device))]
        shapes.append([(each.shape, each.stride(), each.dtype) for each in results])
    assert shapes[0] == shapes[1]


def test_its_output_can_be_kept_in_a_recomputation(draw, monkeypatch):
    inputs, grad = draw(1, 2, 2, [20], 8, 8)
    expected = torch.autograd.grad(reference(*inputs, [20]).sin(), inputs, grad)
    calls = []
    weights = attention._Tile.weights
    monkeypatch.setattr(attention._Tile, "weights", lambda *given: calls.append(1) or weights(*given))
    for keep, passes in ((True, 2), (False, 3)):
        calls.clear()
        output = recomputed(lambda *given: causal_attention(*given).sin(), *inputs, keep_attention=keep)
        torch.testing.assert_close(torch.autograd.grad(output, inputs, grad), expected, rtol=0, atol=1e-12)
        assert len(calls) == passes


@pytest.mark.parametrize("window", [None, 30])
def test_layers_of_packed_documents_use_it_in_bf16(window, draw, monkeypatch):
    lengths = [70, 1, 40]
    inputs, grad = draw(1, 4, 2, lengths, 16, 16, dtype=torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    calls = []
    monkeypatch.setattr(layer_attention, "causal_attention", lambda *given: calls.append(1) or causal_attention(*given))
    starts = torch.tensor([0, 70, 71, 111], dtype=torch.int32)
    found, _ = layer_attention.document_attention(
        None, *inputs, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=starts, max_length_q=70,
        document_lengths=lengths,
    )  # fmt: skip
    assert calls
    expected = reference(*exact, lengths, window, 0.3)
    assert (found.double() - expected).norm() < 2 * torch.finfo(torch.bfloat16).eps * expected.norm()
    grads = torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for one, other in zip(*grads, strict=True):
        assert (one.double() - other).norm() < 2 * torch.finfo(torch.bfloat16).eps * other.norm()
    with pytest.raises(ValueError, match="document_lengths"):
        layer_attention.document_attention(None, *inputs, None, cu_seq_lens_q=starts)


@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("lengths", [[64], [32, 32], [300, 40]])
def test_in_bf16_rows_of_a_batch_are_computed_as_by_the_formula(lengths, has_tiles, draw, monkeypatch):
    monkeypatch.setattr(attention, "has_tiles", lambda: has_tiles)
    inputs, grad = draw(2, 4, 2, lengths, 16, 16, dtype=torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = causal_attention(*inputs, lengths, 0.3), reference(*exact, lengths, scale=0.3)
    grads = torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for one, other in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        assert (one.double() - other).norm() < 2 * torch.finfo(torch.bfloat16).eps * other.norm()


def test_longer_documents_are_left_to_torch(draw, monkeypatch):
    monkeypatch.setattr(attention, "MAX_LENGTH", 50)
    monkeypatch.setattr(layer_attention, "causal_attention", None)
    inputs, _ = draw(1, 2, 2, [51], 8, 8, dtype=torch.bfloat16)
    found, _ = layer_attention.document_attention(None, *inputs, None)
    expected = reference(*(tensor.double() for tensor in inputs), [51])
    assert (found.double() - expected).norm() < 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_with_tiles_rows_of_long_documents_are_left_to_torch(monkeypatch):
    most, cpu = attention.MAX_MEAN_WITH_TILES, torch.device("cpu")
    for has_tiles in (True, False):
        monkeypatch.setattr(attention, "has_tiles", lambda has_tiles=has_tiles: has_tiles)
        assert attention.takes_blocks([most, most], cpu)
        assert attention.takes_blocks([most + 1], cpu) != has_tiles
        assert attention.takes_blocks([2 * most, *[20] * 30], cpu)  # blocks are faster for most of them
        assert attention.takes_blocks([most + 1], torch.device("meta"))
        assert not attention.takes_blocks([attention.MAX_LENGTH + 1, *[1] * 30], cpu)


@pytest.mark.parametrize(
    ("lengths", "window", "message"), [([4], None, "10 tokens"), ([0, 10], None, "1 or more"), ([10], 0, "window 0")]
)
def test_lengths_that_do_not_fill_a_row_are_refused(lengths, window, message, draw):
    inputs, _ = draw(1, 2, 2, [10], 8, 8)
    with pytest.raises(ValueError, match=message):
        causal_attention(*inputs, lengths, window=window)
