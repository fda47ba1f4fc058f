"""Placed weights: two layers on the device at a time, and the bytes and copies that are predicted."""

import copy
import gc
import os
import pickle
import time
import warnings

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, LlamaConfig

from qlora.errors import ConfigError, ModelError
from qlora.layers import apply_recompute
from qlora.layers.host_weights import HostWeights
from qlora.layers.placement import placed_bytes, placed_weights, uneven_passes
from qlora.layers.slots import StoredLayer
from qlora.lora import RecomputedWeights, add_lora, train_rows
from qlora.lora.host_rows import HostHead, host_rows, keep_rows_on_host
from qlora.memory.place import check_weights
from qlora.model import frozen_checksum, load_base, placing, take_inventory
from qlora.model.starts import codes_of
from qlora.nf4 import NF4Experts, NF4Linear
from qlora.processes import Processes
from tests.moe import make_moe
from tests.test_out_of_memory import RAN_OUT
from tests.tiny import make_base
from tests.training.ranks import call_in, call_in_two, needs_fork

LAYERS = 5


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Random models of five layers, dense and with experts."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": make_base(folder / "llama", 2, LlamaConfig, num_hidden_layers=LAYERS),
        "moe": make_moe(folder / "moe", "qwen3_moe", 3, num_hidden_layers=LAYERS),
    }


def load(base, weights="device", processes=None, **options):
    return load_base(str(base), compute_dtype="float32", weights=weights, processes=processes, **options)[0]


def weights_of(model):
    return [module for module in model.modules() if isinstance(module, NF4Linear | NF4Experts)]


def passes(model, ids, level="full"):
    """Return the loss, and the gradients of a model's adapters, of a forward and a backward pass."""
    apply_recompute(model.train(), level)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: each.grad.float().numpy().copy() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(np.array_equal(found[1][name], grad) for name, grad in expected[1].items())


@pytest.mark.parametrize("family", ["llama", "moe"])
@pytest.mark.parametrize("level", ["none", "full"])
def test_two_layers_are_on_the_device_at_a_time(bases, family, level, generator):
    ids = torch.randint(259, (2, 9), generator=generator)
    plain, model = load(bases[family]), load(bases[family], "host")
    for each in (plain, model):
        add_lora(each, rank=2)
    placed = placed_weights(model)
    predicted = placed_bytes("host", placed.layer_bytes, 1)
    assert (placed.slot_bytes, placed.stored_bytes) == (predicted.device, predicted.host)
    assert placed.slot_bytes == 2 * max(placed.layer_bytes)
    # The packed weights hold nothing else: all are views of the two slots.
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
              for weight in weights_of(model) for tensor in weight.packed}  # fmt: skip
    assert sum(memory.values()) == placed.slot_bytes
    expected = passes(plain, ids, level)
    assert_same(passes(model, ids, level), expected)
    before = placed.num_fetched
    assert_same(passes(model, ids, level), expected)
    # The last two are there after the forward pass, and the first two after the backward pass.
    assert placed.num_fetched - before == 2 * LAYERS - 4
    assert predicted.copied == (2 * LAYERS - 4) * max(placed.layer_bytes)


def test_layers_are_fetched_ahead_in_both_directions(bases, monkeypatch):
    model, order = load(bases["llama"], "host"), []
    add_lora(model, rank=2)
    fetch = HostWeights._fetch
    monkeypatch.setattr(HostWeights, "_fetch", lambda self, number: (order.append(number), fetch(self, number)))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        model(ids)
    assert order == [0, 1, 2, 3, 4]
    order.clear()
    reads = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: reads.append((number, list(order))))
    passes(model, ids, "none")
    # While a layer computes, the next one has been asked for; nothing but the first is asked for too late.
    assert [number for number, _ in reads] == [0, 1, 2, 3, 4]
    assert all(max(asked) >= min(number + 1, 4) for number, asked in reads)
    assert order == [0, 1, 2, 3, 4, 2, 1, 0]


def test_any_weight_can_be_read_at_any_time(bases):
    plain, model = load(bases["moe"]), load(bases["moe"], "host")
    assert frozen_checksum(model) == frozen_checksum(plain)
    pairs = list(zip(weights_of(model), weights_of(plain), strict=True))
    for own, other in reversed(pairs):
        arguments = (0, torch.float32) if isinstance(own, NF4Experts) else (torch.float32,)
        assert own.dequantize(*arguments).equal(other.dequantize(*arguments))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps], ids=lambda function: function.__name__)
@pytest.mark.parametrize("family", ["llama", "moe"])
def test_placed_weights_are_not_copied_silently(bases, family, copied):
    model = load(bases[family], "host")
    parts = weights_of(model)
    for part in (parts[0], parts[-1]) if copied is not copy.deepcopy else (model, *parts[:1]):
        with pytest.raises(RuntimeError, match="can't be copied or pickled; load the base with weights='device'"):
            copied(part)
    assert copied(weights_of(load(bases[family]))[-1])


def test_weights_in_4_bits_on_the_disk_are_placed_after_loading(bases, tmp_path):
    from qlora.export.quantize import quantize_model

    quantize_model(str(bases["llama"]), tmp_path / "in-4-bits")
    ids = torch.arange(12)[None]
    plain, model = load(tmp_path / "in-4-bits"), load(tmp_path / "in-4-bits", "host")
    assert model(ids).logits.equal(plain(ids).logits)
    assert placed_weights(model).stored_bytes


@pytest.mark.parametrize("family", ["llama", "moe"])
def test_a_layer_that_can_not_be_placed_ends_the_loading(bases, family, monkeypatch):
    stored, store = [], HostWeights.store

    def store_first(self, index, layer, weights):
        stored.append(index)
        return store(self, index, layer, weights) if index == 0 else fail(RuntimeError("no pinned memory"))

    monkeypatch.setattr(HostWeights, "store", store_first)
    with pytest.raises(ModelError, match=r"can't be loaded: model\.layers\.1: no pinned memory$"):
        load(bases[family], "host")
    assert stored == [0, 1]  # nothing is tried after it failed


def test_any_error_while_layers_are_placed_ends_the_loading(bases, monkeypatch):
    looks = []

    def look(_model):
        looks.append(1)
        return fail(no_memory())

    monkeypatch.setattr(placing, "checkpointed_layers", look)
    with pytest.raises(
        ModelError, match=r"can't be loaded: the model: no memory\. Stop other programs .*smaller base\."
    ):
        load(bases["llama"], "host")
    assert len(looks) == 1


def test_pieces_are_the_bytes_of_the_layer():
    linears = [NF4Linear.from_linear(torch.nn.Linear(64, size, bias=False)) for size in (48, 7)]
    wanted = [[tensor.clone() for tensor in linear.packed] for linear in linears]
    layer = StoredLayer(linears, piece_bytes=100)
    assert {len(piece) for piece in layer.pieces[:-1]} == {100}
    content = torch.empty(layer.packed.num_bytes, dtype=torch.uint8)
    layer.copy_to(content)
    reads = []
    assert not layer.packed.uses(content)
    layer.packed.use(content)
    assert layer.packed.uses(content)
    assert not layer.packed.uses(content.clone())  # as if it had come to other memory
    layer.packed.fetch_by(lambda: reads.append(1))
    for linear, tensors in zip(linears, wanted, strict=True):
        linear.ensure_present()
        assert all(map(torch.equal, linear.packed, tensors))
    assert reads == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "disk"}, "weights: 'disk' should be one of device, sharded, host"),
        ({"weights": "sharded"}, "there is one; launch several with torchrun"),
        ({"weights": "host", "quantization": "none"}, "model.quantization is none; set it to nf4"),
    ],
)
def test_what_is_not_possible_is_refused(bases, options, message):
    with pytest.raises(ModelError, match=message):
        load(bases["llama"], **options)


def test_a_run_of_one_process_refuses_to_split_weights(bases):
    from qlora.config import load_config

    section = load_config({"model": {"base": "b", "weights": "sharded"}, "data": {"train": "t"},
                           "train": {"output_dir": "o"}}).model  # fmt: skip
    check_weights(section, 2)
    with pytest.raises(ConfigError, match="model.weights: sharded splits the weights over processes, but there is one"):
        check_weights(section, 1)
    with pytest.raises(ConfigError, match="weights: host is for weights in 4 bits, but quantization is none"):
        load_config({"model": {"base": "b", "weights": "host", "quantization": "none"}, "data": {"train": "t"},
                     "train": {"output_dir": "o"}})  # fmt: skip


def own_share(base, ids):
    """Return what each process holds of how much, and its loss and gradients."""
    processes = Processes.start(on_cpu=True)
    model = load(base, "sharded", processes)
    checksum = frozen_checksum(model)
    add_lora(model, rank=2)
    placed = placed_weights(model)
    codes = [codes_of(part).clone().numpy() for part in reversed(weights_of(model))]
    return placed.stored_bytes, placed.layer_bytes, checksum, codes, *passes(model, ids)


@needs_fork
@pytest.mark.parametrize(("family", "count"), [("llama", 3), ("moe", 2)])
def test_each_process_holds_its_part(bases, family, count, generator):
    ids = torch.randint(259, (2, 9), generator=generator)
    plain = load(bases[family])
    checksum = frozen_checksum(plain)
    add_lora(plain, rank=2)
    expected = passes(plain, ids)
    codes = [part.weight for part in reversed(weights_of(plain))]
    answers = call_in(count, own_share, bases[family], ids)
    for rank, (stored, layers, own_checksum, own_codes, *found) in enumerate(answers):
        assert_same(found, expected)
        assert own_checksum == checksum
        assert all(map(np.array_equal, own_codes, codes))
        parts = [torch.empty(num_bytes).chunk(count)[rank].numel() for num_bytes in layers]
        assert stored == sum(parts)
        assert abs(stored - placed_bytes("sharded", layers, count).device) <= count * len(layers)


def different_work(base):
    """Run as many passes as the rank says, and then the same on all processes; return losses and gradients."""
    processes = Processes.start(on_cpu=True)
    model = load(base, "sharded", processes)
    add_lora(model, rank=2, layers=[2, 4])
    ids = torch.arange(9)[None]
    warnings.simplefilter("error", FutureWarning)  # of names that torch is about to remove
    found = [passes(model, ids, level) for level in ("none", "full")]
    for level in ("none", "full"):
        with uneven_passes(model):
            found += [passes(model, ids, level) for _ in range(2 * processes.rank)]
        with uneven_passes(model), torch.no_grad():
            for _ in range(3 - processes.rank):
                model(ids)
        found.append(passes(model, ids, level))
    return found


@needs_fork
def test_processes_may_run_different_numbers_of_passes(bases):
    plain = load(bases["llama"])
    add_lora(plain, rank=2, layers=[2, 4])
    expected = passes(plain, torch.arange(9)[None])
    first, second = call_in_two(different_work, bases["llama"])
    assert (len(first), len(second)) == (4, 8)
    for found in (*first, *second):
        assert_same(found, expected)


def run_out(base, places, is_old=False):
    """Run out of memory in one process at places of a pass, one after the other; after each, run the same on both.

    Returns:
        What was computed, by place.
    """
    if is_old:
        del torch.distributed.fsdp.FSDPModule.reset_iter_state
    processes = Processes.start(on_cpu=True)
    model = load(base, "sharded", processes)
    add_lora(model, rank=2)
    ids = torch.arange(9)[None]
    found = {"before": [passes(model, ids)]}
    for place in places:
        own = found[place] = []
        if processes.rank == 0:
            with uneven_passes(model, is_retried=True):
                own += [passes(model, ids) for _ in range(2)]
        else:
            restore = fail_once(model, place)
            with pytest.raises(torch.OutOfMemoryError, match="no memory"):
                run_until_it_fails(model, ids, place)
            restore()
            model.zero_grad()
            assert not RecomputedWeights._weights
        with uneven_passes(model):
            own += [passes(model, ids, level) for level in ("none", "full")]
    return found


def run_until_it_fails(model, ids, place):
    with uneven_passes(model, is_retried=True):
        passes(model, ids)
        if place == "between":
            raise no_memory()


def fail_once(model, place):
    """Have memory run out; return a function that undoes it."""
    mlp, gathers = model.model.layers[2].mlp, placed_weights(model)._gathers
    if place == "gathering":
        allocate, calls = gathers.allocate, []

        def allocate_some(size, **options):
            calls.append(size)
            return fail(no_memory()) if len(calls) == 4 else allocate(size, **options)

        gathers.allocate = allocate_some
        return lambda: setattr(gathers, "allocate", allocate)
    hooks = {
        "forward": mlp.register_forward_hook,
        "loss": model.lm_head.register_forward_hook,
        "norm's backward": model.model.norm.register_full_backward_hook,
        "backward": mlp.register_full_backward_hook,
    }
    return hooks[place](lambda *_: fail(no_memory())).remove if place in hooks else lambda: None


@needs_fork
@pytest.mark.parametrize(
    ("places", "is_old"),
    [
        (["forward", "loss", "norm's backward", "backward", "gathering", "between"], False),
        (["loss", "between"], True),  # outside of forward and backward there is nothing to reset
    ],
    ids=["any torch", "torch before 2.13"],
)
def test_a_process_that_runs_out_of_memory_takes_part_until_the_others_are_done(bases, places, is_old):
    plain = load(bases["llama"])
    add_lora(plain, rank=2)
    expected = passes(plain, torch.arange(9)[None])
    for rank, found in enumerate(call_in_two(run_out, bases["llama"], places, is_old)):
        own = 4 if rank == 0 else 2
        assert {place: len(each) for place, each in found.items()} == {"before": 1} | dict.fromkeys(places, own)
        for each in sum(found.values(), []):
            assert_same(each, expected)


def count_gathers(base, level):
    """Return how many layers were asked for when each layer computes, forward and backward, and in all."""
    processes = Processes.start(on_cpu=True)
    model = load(base, "sharded", processes)
    add_lora(model, rank=2)
    ids, counts, gathers = torch.arange(9)[None], {"forward": {}, "backward": {}}, placed_weights(model)._gathers

    def note(way, number):
        counts[way].setdefault(number, gathers.num_issued)  # the first time: it may be computed again

    passes(model, ids, level)
    gathers.num_issued = 0
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: note("forward", number))
        layer.mlp.register_full_backward_hook(lambda *_, number=number: note("backward", number))
    passes(model, ids, level)
    return counts, gathers.num_issued


@needs_fork
@pytest.mark.parametrize("level", ["none", "full"])
def test_split_layers_are_gathered_ahead_in_both_directions(bases, level):
    for counts, total in call_in_two(count_gathers, bases["llama"], level):
        assert counts["forward"] == {0: 2, 1: 3, 2: 4, 3: 5, 4: 5}
        assert counts["backward"] == {4: 7, 3: 8, 2: 9, 1: 10, 0: 10}
        assert total == 2 * LAYERS


def fail_alone(base, folder, error, case):
    """Fail in one process in the middle of a pass; write what each of them meets."""
    if case.startswith("old torch"):
        del torch.distributed.fsdp.FSDPModule.reset_iter_state
    processes = Processes.start(on_cpu=True)
    model = load(base, "sharded", processes)
    if case == "old torch in a backward":
        add_lora(model, rank=2)
    if processes.rank == 1 and case == "idle":
        forbid_gathering(model, error)
    elif processes.rank == 1 and case == "old torch in a backward":
        fail_once(model, "norm's backward")
    elif processes.rank == 1:
        model.model.layers[3].mlp.register_forward_hook(lambda *_: fail(error))
        if case == "no room":  # not even a layer of the other process fits any more
            model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: forbid_gathering(model, error))
    started, finished = time.perf_counter(), []

    def run():
        with processes.raise_together(), uneven_passes(model, is_retried=case != "not retried"):
            for _ in range(2 if processes.rank == 0 or case != "idle" else 0):
                logits = model(torch.arange(9)[None]).logits
                if logits.requires_grad:
                    logits.sum().backward()
                finished.append(True)

    with pytest.raises((ModelError, torch.OutOfMemoryError)) as problem:
        run()
    assert len(finished) < 2
    (folder / str(processes.rank)).write_text(f"{time.perf_counter() - started:.1f} s: {problem.value}")
    os._exit(0)


def forbid_gathering(model, error):
    placed_weights(model)._gathers.allocate = lambda *_, **options: fail(error)


def no_memory():
    return torch.OutOfMemoryError("no memory")


def fail(error):
    if error is None:
        os._exit(0)
    raise error


NO_RETRY = "Memory ran out. With model.weights: sharded the step can't be tried again with less, because "
# What happens in one process, and the message that it ends with.
FAILURES = {
    "killed": (None, None),
    "error": (ModelError("one process fails"), "one process fails"),
    "not retried": (no_memory(), "no memory"),
    "no room": (no_memory(), f"{NO_RETRY}too little is left for the layers"),
    "idle": (no_memory(), f"{NO_RETRY}too little is left for the layers"),
    "old torch": (no_memory(), f"{NO_RETRY}going on after an aborted pass needs torch 2.13"),
    "old torch in a backward": (no_memory(), f"{NO_RETRY}going on after an aborted pass needs torch 2.13"),
    "NCCL": (RAN_OUT["NCCL"], "NCCL ran out of memory for its own buffers, after which it can't be used any more."),
}


@needs_fork
@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.replace(" ", "-"))
def test_a_process_that_ends_ends_the_others(bases, tmp_path, case):
    error, message = FAILURES[case]
    with pytest.raises(AssertionError, match="ended without an answer"):
        call_in_two(fail_alone, bases["llama"], tmp_path, error, case)
    for rank, start in enumerate(("Another process of the run has ended; its last message has the reason.", message)):
        if start is not None:
            deadline = time.monotonic() + 30
            while not (tmp_path / str(rank)).exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            seconds, found = (tmp_path / str(rank)).read_text().split(" s: ", 1)
            assert float(seconds) < 30
            assert found.startswith(start)


@pytest.mark.parametrize("config_class", [LlamaConfig, GemmaConfig], ids=["plain", "scaled"])
def test_embedding_and_head_on_the_host_give_the_same(tmp_path, seed, config_class, generator):
    base = make_base(tmp_path / "base", seed, config_class, tie_word_embeddings=False)
    ids = torch.randint(259, (2, 9), generator=generator)
    plain, model = load(base), load(base)
    for each in (plain, model):
        add_lora(each, rank=2)
    inventory, checksum = take_inventory(model), frozen_checksum(model)
    keep_rows_on_host(model)
    assert_same(passes(model, ids), passes(plain, ids))
    assert (take_inventory(model), frozen_checksum(model)) == (inventory, checksum)
    assert (model.device, model.dtype) == (plain.device, plain.dtype)
    assert sum(each.nbytes for each in model.parameters() if each.shape[-1] == 64 and len(each) == 259) == 0
    answers = [each.eval().generate(ids, max_new_tokens=4, do_sample=False) for each in (plain, model)]
    assert answers[0].equal(answers[1])
    rows = host_rows(model)
    assert [[tuple(each.shape) for each in pieces] for pieces in rows.values()] == [[(259, 64)]] * 2
    rows["lm_head"][0][3] += 1  # a changed row is noticed
    assert frozen_checksum(model) != checksum


def test_a_head_on_the_host_comes_in_pieces_and_once_for_all_that_use_it(generator):
    linear = torch.nn.Linear(7, 10, bias=False)
    weight, x = linear.weight.detach().clone(), torch.randn(3, 7, generator=generator)
    expected = x @ weight.T
    head = HostHead(linear, piece_bytes=3 * weight[0].nbytes)
    assert [len(piece) for piece in head.pieces] == [3, 3, 3, 1]
    assert head.base.weight.numel() == 0
    (first,), (second,) = head.blocks(), head.blocks()
    assert second is first
    assert first.equal(weight)
    assert head.num_copied == 1
    del first, second  # its memory is free now
    assert head(x).equal(expected)
    assert head.num_copied == 2


@pytest.mark.parametrize("change", ["tied", "trained", "partly trained"])
def test_an_embedding_and_head_that_are_trained_or_shared_stay(tmp_path, change):
    model = load(make_base(tmp_path / "base", 1, tie_word_embeddings=change == "tied"))
    train_rows(
        model, ["lm_head"] if change == "trained" else [], range(259, 261 if change == "partly trained" else 259)
    )
    keep_rows_on_host(model)
    assert list(host_rows(model)) == {"tied": [], "trained": ["model.embed_tokens"], "partly trained": []}[change]
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_nothing_else_holds_the_codes_after_loading(bases):
    """bitsandbytes' weights refer back to their layers, and would be freed only with other garbage."""
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in gc.get_objects()}
        model = load(bases["llama"], "host")
        new = [each for each in gc.get_objects() if id(each) not in before and isinstance(each, torch.Tensor)]
    finally:
        gc.enable()
    storages = [each.untyped_storage() for each in new if each.dtype == torch.uint8]
    held = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    placed = placed_weights(model)
    assert held < placed.stored_bytes + placed.slot_bytes + max(placed.layer_bytes)
