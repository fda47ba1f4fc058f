"""Recomputation: at every level the same gradients bit for bit, with fewer bytes held from level to level."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig, Phi3Config, Qwen3Config

from qlora.data import collate
from qlora.data.tokens import make_example
from qlora.errors import ModelError
from qlora.kernels import LowRank
from qlora.layers import apply_recompute, rebuild_activations, use_document_attention
from qlora.layers.rebuild import GatedMLP
from qlora.layers.recompute import recompute_levels
from qlora.layers.recompute_mlp import tile_mlp
from qlora.layers.region import _is_kept
from qlora.lora import RecomputedWeights, add_lora, lora_experts, lora_layers, train_rows
from qlora.model import load_base, supervised_loss
from scripts.dev.bench import counts
from tests.combinations import pairs
from tests.tiny import make_base

ALL = ["none", "mlp", "attention", "full", "offload", "offload+tiled"]
NO_GATED_MLP = ["none", "attention", "full", "offload"]
FAMILIES = {
    "llama": (LlamaConfig, {}, ALL),
    "qwen3": (Qwen3Config, {}, ALL),
    "gemma2, whose attention may not be torch's": (Gemma2Config, {}, ALL),
    "gemma3 with a window": (Gemma3TextConfig, {"sliding_window": 5}, ALL),
    "phi3, gate and up in one": (Phi3Config, {}, NO_GATED_MLP),
    "mixtral, with experts": (MixtralConfig, {"num_local_experts": 4, "intermediate_size": 176}, NO_GATED_MLP),
    "gpt2, with dropout": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, NO_GATED_MLP),
}
# The shape for which bytes and products are counted.
HIDDEN, FFN, LAYERS, RANK = 512, 1408, 4, 16
SHAPE = {
    "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def own_memory(monkeypatch):
    """Treat the CPU as a device with its own memory."""
    monkeypatch.setattr("qlora.layers.recompute.OFFLOADED_FROM", ("cpu",))


def make_model(base, generator, dropout=0.0, compute_dtype="bfloat16", packed=True, rank=4, **settings):
    model, _ = load_base(str(base), compute_dtype=compute_dtype, allow_unquantized=True)
    expert_rank = 0 if dropout else "auto"  # experts have no dropout
    add_lora(
        model, rank=rank, dropout=dropout, dtype=getattr(torch, compute_dtype), expert_rank=expert_rank, **settings
    )
    for _, layer in lora_layers(model):
        layer.first_trained.data.normal_(std=0.05, generator=generator)
    for _, experts in lora_experts(model):
        experts.lora_B.data.normal_(std=0.05, generator=generator)
    if packed:
        use_document_attention(model)
    rebuild_activations(model)
    return model.train()


def random_batch(generator, lengths=(40, 23), packed=True):
    rows = [torch.randint(256, (length,), generator=generator).numpy() for length in lengths]
    return collate([make_example(row, [True] * len(row)) for row in rows], packed=packed)


def gradients(model, batch, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = supervised_loss(model, batch)
    loss.backward()
    return loss.item(), {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def gated_mlps(model):
    return [module for module in model.modules() if isinstance(module, GatedMLP)]


def shrink_tiles(model, num_tokens):
    """Shrink tiles, if the level has any, below a test's few tokens."""
    for mlp in gated_mlps(model):
        if mlp.run is tile_mlp:
            mlp.run = partial(tile_mlp, num_tokens=num_tokens)


@pytest.mark.parametrize(
    ("family", "packed", "dropout", "compute_dtype"),
    pairs(tuple(FAMILIES), (True, False), (0.0, 0.3), ("bfloat16", "float32")),
)
def test_gradients_are_those_without_it_bit_for_bit(
    family, packed, dropout, compute_dtype, own_memory, tmp_path, generator, seed
):
    config_class, sizes, levels = FAMILIES[family]
    base = make_base(tmp_path / "base", seed, config_class, **sizes)
    model, batch = make_model(base, generator, dropout, compute_dtype, packed), random_batch(generator, packed=packed)
    if model.config._attn_implementation == "eager":
        levels = [level for level in levels if level != "attention"]
    assert recompute_levels(model) == levels
    loss, expected = gradients(model, batch, seed)
    assert all(grad.abs().max() > 0 for name, grad in expected.items())
    for level in [*levels, "full", "none"]:
        assert apply_recompute(model, level) == level
        loss_again, found = gradients(model, batch, seed)
        assert loss == loss_again, level
        assert [name for name, grad in expected.items() if not torch.equal(found[name], grad)] == [], level


def test_dequantized_weights_are_kept_for_the_backward_unless_offloaded(
    own_memory, tiny_base, generator, seed, monkeypatch
):
    model, batch, kept = make_model(tiny_base, generator), random_batch(generator), []
    monkeypatch.setattr(RecomputedWeights, "put", lambda base, weight: kept.append(base))
    found = {}
    for level in ("full", "offload"):
        apply_recompute(model, level)
        gradients(model, batch, seed)
        found[level] = len(kept)
        kept.clear()
    assert found["full"] > found["offload"] == 0


@pytest.mark.parametrize(
    ("settings", "frozen", "null_space"),
    [
        ({"kind": "dora"}, True, False),
        ({"kind": "dora", "form": "folded"}, False, True),
        ({"kind": "rows"}, True, False),
        ({"train": "B", "init": "orthogonal", "form": "folded"}, True, True),
    ],
    ids=str,
)
def test_gradients_of_every_kind_are_those_without_it(
    settings, frozen, null_space, own_memory, tiny_base, generator, seed
):
    model, batch = make_model(tiny_base, generator, **settings), random_batch(generator)
    for _, layer in lora_layers(model):
        shapes = (3, layer.in_features), (layer.out_features, 3)
        if frozen:
            layer.frozen = LowRank(
                *(torch.randn(shape, generator=generator).bfloat16() * 0.05 for shape in shapes), 0.5
            )
        if null_space:
            layer.null_space = torch.linalg.qr(torch.randn(layer.in_features, 5, generator=generator)).Q
    loss, expected = gradients(model, batch, seed)
    assert all(grad.abs().max() > 0 for grad in expected.values())
    for level in recompute_levels(model):
        apply_recompute(model, level)
        loss_again, found = gradients(model, batch, seed)
        assert loss == loss_again, level
        assert [name for name, grad in expected.items() if not torch.equal(found[name], grad)] == [], level


@pytest.mark.parametrize("new_ids", [range(0), range(250, 254)], ids=["in full", "new rows"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_of_embedding_and_head_are_those_without_it(tied, new_ids, own_memory, tmp_path, generator, seed):
    base = make_base(tmp_path / "base", seed, tie_word_embeddings=tied)
    model, batch = make_model(base, generator), random_batch(generator, (40, 23, 1200))
    train_rows(model, [] if new_ids else ["embed_tokens", "lm_head"], new_ids)
    loss, expected = gradients(model, batch, seed)
    assert sum(".rows." in name and bool(grad.any()) for name, grad in expected.items()) == (1 if tied else 2)
    for level in ALL[:5]:
        apply_recompute(model, level)
        loss_again, found = gradients(model, batch, seed)
        assert loss == loss_again, level
        assert [name for name, grad in expected.items() if not torch.equal(found[name], grad)] == [], level


@pytest.mark.parametrize(
    ("config_class", "dropout", "packed"), pairs((LlamaConfig, Gemma3TextConfig), (0.0, 0.3), (True, False))
)
def test_tiles_are_what_they_are_without_recomputation(
    config_class, dropout, packed, own_memory, tmp_path, generator, seed
):
    base = make_base(tmp_path / "base", seed, config_class)
    model, batch = make_model(base, generator, dropout, "float32", packed), random_batch(generator, packed=packed)
    whole_loss, whole = gradients(model, batch, seed)
    for module in gated_mlps(model):
        module.run = lambda mlp, x: torch.cat([mlp.compute(tile) for tile in x.flatten(0, -2).split(16)]).view_as(x)
    loss, expected = gradients(model, batch, seed)
    apply_recompute(model, "offload+tiled")
    shrink_tiles(model, 16)
    again, found = gradients(model, batch, seed)
    assert loss == again
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-6 * grad.norm(), name
        if not dropout:  # otherwise tiles draw other masks than the whole
            assert (whole[name] - grad).norm() <= 1e-5 * grad.norm(), name
    assert dropout or loss == pytest.approx(whole_loss, rel=1e-6)


@pytest.mark.parametrize("level", ["mlp", "attention", "full", "offload", "offload+tiled"])
def test_a_retained_graph_gives_the_same_gradients_again(level, own_memory, tiny_base, generator):
    model, batch = make_model(tiny_base, generator), random_batch(generator)
    apply_recompute(model, level)
    shrink_tiles(model, 16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = supervised_loss(model, batch)
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    second = torch.autograd.grad(loss, trained)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("form", ["separate", "folded"])
def test_a_backward_in_a_thread_of_its_own_may_take_memory_of_its_own(form, tiny_base, generator, seed):
    """As on GPUs, where autograd has its own thread: it recomputes operations that the forward did not need."""
    model, batch = make_model(tiny_base, generator, form=form), random_batch(generator)
    _, expected = gradients(model, batch, seed)
    apply_recompute(model, "attention")
    model.zero_grad()
    loss, errors = supervised_loss(model, batch), []

    def backward():
        try:
            loss.backward()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert errors == []
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in expected.items())


def big_model(folder, generator):
    """Return a model of a shape whose bytes and products can be computed, and a batch of two documents for it."""
    return make_model(make_base(folder / "base", 0, **SHAPE), generator, rank=RANK), random_batch(generator, (128, 128))


@pytest.mark.slow
def test_every_level_holds_what_it_should(own_memory, tmp_path, generator):
    model, batch = big_model(tmp_path, generator)
    held = {}
    for level in ALL:
        apply_recompute(model, level)
        gradients(model, batch, 0)  # host memory is taken once
        held[level] = counts.held_for_backward(lambda: supervised_loss(model, batch), model).alive / 256
    projections, key_values = 2 * FFN * 2, HIDDEN * 2
    state = HIDDEN * 2
    expected = {
        # Both residuals, queries, keys, values, and their output.
        "none": LAYERS * (4 * state + key_values + projections),
        "mlp": LAYERS * (4 * state + key_values),
        "attention": LAYERS * 2 * state,
        "full": LAYERS * state,
        "offload": state,
        "offload+tiled": state,
    }
    rest = {level: held[level] - expected[level] for level in ALL}
    assert held["none"] > held["mlp"] > held["attention"] > held["full"] > held["offload"] == held["offload+tiled"]
    # The batch, positions, the loss and states of random generators; not of a layer.
    assert all(0 <= extra <= 2 * state for extra in rest.values()), rest


@pytest.mark.slow
def test_every_level_computes_again_what_it_should(own_memory, tmp_path, generator):
    model, batch = big_model(tmp_path, generator)
    work = {}
    for level in ALL:
        apply_recompute(model, level)
        shrink_tiles(model, 64)
        loss = supervised_loss(model, batch)
        with counts.Watch() as work[level]:
            loss.backward()
    extra = {level: (one.base_gemms - work["none"].base_gemms) / LAYERS for level, one in work.items()}
    # Never down_proj, the last product of a region. Tiles are 4: each has its backward, and gate and up again. Before
    # each, torch 2.11 saves a tensor of its own, so that a layer's recomputation does not stop at the first of them.
    stops_early = hasattr(torch.utils.checkpoint._CheckpointFrame, "get_inputs")
    tiled = 4 + 3 * 3 + 4 * 2 + (0 if stops_early else 3 * 3)
    assert extra == {"none": 0, "mlp": 2, "attention": 6, "full": 6, "offload": 6, "offload+tiled": tiled}
    attention = LAYERS * 2 * (4 * 128 * 128 * HIDDEN) // 2  # of two documents, half of it behind the causal mask
    assert work["full"].flops - work["attention"].flops == attention
    gate_and_up = LAYERS * 2 * 256 * 2 * HIDDEN * FFN
    assert gate_and_up < work["mlp"].flops - work["none"].flops < 1.06 * gate_and_up  # with the adapters' share
    assert work["offload"].flops == work["full"].flops
    assert (work["offload+tiled"].flops == work["full"].flops) == stops_early


class PeakOfStorages(TorchDispatchMode):
    """The largest number of bytes of storages from operations at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        result = func(*args, **kwargs or {})
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self.alive[storage._cdata] = StorageWeakRef(storage)
        self.now = 0
        for key, reference in list(self.alive.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.alive[key]
            else:
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result


def is_tensor(thing):
    return isinstance(thing, torch.Tensor)


def test_tiles_need_less_at_once(own_memory, tmp_path, generator):
    base = make_base(tmp_path / "base", 0, intermediate_size=1024)
    model, batch = make_model(base, generator), random_batch(generator, (256, 256))
    peaks = {}
    for level in ("offload", "offload+tiled"):
        apply_recompute(model, level)
        shrink_tiles(model, 32)
        gradients(model, batch, 0)
        with PeakOfStorages() as peak:
            supervised_loss(model, batch).backward()
        peaks[level] = peak.peak
    assert peaks["offload+tiled"] < peaks["offload"] / 2, peaks


def test_the_first_layers_input_asks_for_no_gradient(tiny_base, generator):
    """Re-entrant checkpointing would need one from the frozen embeddings."""
    model, batch = make_model(tiny_base, generator), random_batch(generator)
    apply_recompute(model, "full")
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda *arguments: seen.append(arguments[2].requires_grad))
    loss = supervised_loss(model, batch)
    assert seen == [False]
    nodes, names = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names.add(node)
            nodes.extend(parent for parent, _ in node.next_functions)
    assert names
    assert not any("CheckpointFunction" in node.name() for node in names)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_attention_kernel_that_draws_is_called_again(dropout, generator):
    """Otherwise the random numbers after it would differ. No kernel on CPUs draws any."""
    query = torch.randn(1, 1, 4, 8, generator=generator)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert _is_kept(kernel, (query, query, query, dropout), {}) == (not dropout)
    assert _is_kept(kernel, (query, query, query), {"dropout_p": dropout}) == (not dropout)


def test_auto_is_full_where_layers_can_be_recomputed(tiny_base):
    model, _ = load_base(str(tiny_base))
    assert apply_recompute(model, "auto") == "full"
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize(
    ("config_class", "settings", "level", "message"),
    [
        (MixtralConfig, {}, "mlp", "MixtralForCausalLM.*gate, up and down.*=none or attention or full"),
        (LlamaConfig, {"attention": "eager"}, "attention", "LlamaForCausalLM.*eager.*=none or mlp or full"),
        (LlamaConfig, {}, "offload", "on a cpu.*=none or mlp or attention or full"),
        (LlamaConfig, {}, "offload+tiled", "on a cpu.*=none or mlp or attention or full"),
        (LlamaConfig, {}, "most", "there is no such level.*=none or mlp or attention or full"),
    ],
)
def test_a_level_that_a_model_does_not_support_is_refused(config_class, settings, level, message, tmp_path):
    base = make_base(tmp_path / "base", 0, config_class)
    model, _ = load_base(str(base), allow_unquantized=True, **settings)
    rebuild_activations(model)
    with pytest.raises(ModelError, match=message):
        apply_recompute(model, level)


def test_a_model_whose_layers_can_not_be_recomputed_is_reported():
    model = nn.Sequential(nn.Linear(2, 2))
    assert recompute_levels(model) == ["none"]
    assert apply_recompute(model, "auto") == "none"
    assert apply_recompute(model, "none") == "none"
    with pytest.raises(ModelError, match=r"model\.recompute=none"):
        apply_recompute(model, "full")
