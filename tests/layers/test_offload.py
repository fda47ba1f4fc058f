"""Saved tensors on the host: the same values, nothing left on the device, the same memory from step to step."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from qlora.data import collate, make_example
from qlora.layers import apply_recompute, rebuild_activations
from qlora.layers.offload import HostStore
from qlora.lora import add_lora
from qlora.model import load_base, supervised_loss

CHUNK = 256


def make_store():
    return HostStore(torch.device("cpu"), chunk_bytes=CHUNK)


class Layers:
    """A few functions in sequence, each checkpointed with its input in a store."""

    def __init__(self, store, count=4, features=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.store = store
        self.weights = [
            torch.randn(features, features, generator=generator).div_(4).requires_grad_() for _ in range(count)
        ]

    def __call__(self, x):
        """Return the result, and weak references to each layer's input."""
        inputs = []
        for weight in self.weights:
            inputs.append(StorageWeakRef(x.untyped_storage()))
            with self.store.hooks(x, stays=weight is self.weights[-1]):
                x = checkpoint(lambda x, weight: torch.tanh(x @ weight), x, weight, use_reentrant=False)
        return x, inputs

    def plain(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x

    def gradients(self, y, **options):
        return torch.autograd.grad(y.square().sum(), self.weights, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5), (64,), (65, 3), (1, 2, 300)])
def test_a_tensor_comes_back_bit_for_bit(shape, dtype, generator):
    store = make_store()
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    kept = x.detach().clone()
    y = x * 1  # not a leaf
    with store.hooks(y):
        z = y.square()
    pointer = StorageWeakRef(y.untyped_storage())
    with store.hooks(other := torch.ones(1)):
        torch.ones(1, requires_grad=True) * other  # the next save frees the one before
    del y
    gc.collect()
    assert pointer.expired()
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(grad, 2 * kept)


def test_a_tensor_that_is_a_view_with_gaps_comes_back(generator):
    store = make_store()
    x = torch.randn(7, 40, generator=generator, requires_grad=True)
    y = (x * 1)[:, ::3].T
    with store.hooks(y):
        z = y.square()
    (grad,) = torch.autograd.grad(z.sum(), y)
    assert torch.equal(grad, 2 * y)


def test_inputs_are_on_the_host_but_for_the_last(generator):
    layers = Layers(make_store())
    y, inputs = layers(torch.randn(20, 16, generator=generator))
    assert [reference.expired() for reference in inputs] == [True, True, True, False]
    assert layers.store.num_chunks == 3 * 20 * 16 * 4 // CHUNK
    assert layers.store.num_free == 0
    assert y.requires_grad


def test_other_tensors_stay_where_they_are(generator):
    store = make_store()
    weight = torch.randn(16, 16, generator=generator, requires_grad=True)
    x = torch.randn(4, 16, generator=generator)
    with store.hooks(x):
        y = (x @ weight) * weight.sum()
    assert store.num_chunks == 1
    x_bytes = x.numel() * 4
    assert x_bytes == CHUNK
    assert y.requires_grad


def test_gradients_are_those_without_it_and_memory_is_used_again(generator):
    layers, taken = Layers(make_store()), []
    for num_tokens in (20, 7, 20, 33, 20):
        x = torch.randn(num_tokens, 16, generator=generator)
        expected = layers.gradients(layers.plain(x.clone()))
        y, _ = layers(x)
        assert all(map(torch.equal, layers.gradients(y), expected))
        del y
        assert layers.store.num_free == layers.store.num_chunks
        taken.append(layers.store.num_chunks)
    assert taken == [15, 15, 15, 27, 27]


def test_memory_is_free_as_soon_as_a_layer_is_done(generator):
    layers, free = Layers(make_store()), []
    y, _ = layers(torch.randn(20, 16, generator=generator))
    for weight in layers.weights:
        weight.register_hook(lambda grad: free.append(layers.store.num_free))
    y.sum().backward()
    assert free == sorted(free)
    assert free[0] == 0
    assert 0 < free[2] < layers.store.num_chunks


@pytest.mark.parametrize("num_backwards", [0, 1])
def test_a_forward_without_a_backward_leaks_nothing(num_backwards, generator):
    layers = Layers(make_store())
    x = torch.randn(20, 16, generator=generator)
    expected = layers.gradients(layers.plain(x))
    for _ in range(3):
        y, inputs = layers(x.clone())
        if num_backwards:  # one that is aborted
            torch.autograd.grad(y.sum(), layers.weights[-1], retain_graph=True)
        del y
        assert all(reference.expired() for reference in inputs)
        assert layers.store.num_free == layers.store.num_chunks == 15
    with torch.no_grad():
        layers(x)
    assert layers.store.num_chunks == 15
    assert all(map(torch.equal, layers.gradients(layers(x)[0]), expected))


def test_two_graphs_at_a_time_do_not_mix(generator):
    layers = Layers(make_store())
    first, second = (torch.randn(20, 16, generator=generator) for _ in range(2))
    wanted = [layers.gradients(layers.plain(x)) for x in (first, second)]
    y, _ = layers(first)
    z, _ = layers(second)
    found = [layers.gradients(y), layers.gradients(z)]
    assert all(
        torch.equal(a, b) for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_a_retained_graph_can_be_gone_through_again(generator):
    layers = Layers(make_store())
    y, _ = layers(torch.randn(20, 16, generator=generator))
    first = layers.gradients(y, retain_graph=True)
    assert all(map(torch.equal, layers.gradients(y), first))


class LateStream:
    """A stream of copies that makes each one as late as possible: when it is waited for.

    Like a device, it keeps no memory alive for them: a tensor that is freed before its copy is made is lost.
    """

    def __init__(self):
        self.copies, self.num_lost, self.num_done = [], 0, 0

    def wait_stream(self, stream):
        assert stream == "computes"

    def record_event(self):
        return self.num_done + len(self.copies)

    def run_until(self, event):
        while self.num_done < event:
            target, source = (self._find(*place) for place in self.copies.pop(0))
            self.num_done += 1
            if target is None or source is None:
                self.num_lost += 1
            else:
                target.copy_(source)

    def _find(self, reference, offset, size):
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        return None if storage is None else torch.empty(0, dtype=torch.uint8).set_(storage, offset, (size,), (1,))


class Queued(TorchFunctionMode):
    """Copies that are queued on a stream."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.copy_:
            return func(*args, **kwargs or {})
        assert kwargs == {"non_blocking": True}
        self.stream.copies.append(
            [(StorageWeakRef(one.untyped_storage()), one.storage_offset(), one.numel()) for one in args]
        )
        return args[0]


@pytest.fixture
def late_store(monkeypatch):
    """Return a store whose copies run on a late stream."""
    store = make_store()
    stream = store._stream = LateStream()

    class Computes(str):
        def wait_event(self, event):
            stream.run_until(event)

    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Computes("computes"))
    monkeypatch.setattr("torch.cuda.stream", Queued)
    return store


def test_copies_of_a_late_stream_are_waited_for(late_store, generator):
    layers = Layers(late_store)
    for num_tokens in (20, 33, 20):
        x = torch.randn(num_tokens, 16, generator=generator)
        expected = layers.gradients(layers.plain(x.clone()))
        y, inputs = layers(x)
        del x
        assert [reference.expired() for reference in inputs] == [True, True, True, False]
        assert all(map(torch.equal, layers.gradients(y), expected))
        del y
    assert late_store._stream.num_lost == 0


def test_each_copy_is_pending_while_the_layer_after_it_is_computed(late_store, generator):
    layers, under_way = Layers(late_store), []
    y, _ = layers(torch.randn(20, 16, generator=generator))
    for weight in layers.weights:
        weight.register_hook(lambda grad: under_way.append(len(late_store._stream.copies)))
    y.sum().backward()
    assert under_way == [5, 5, 5, 0]  # of the layer before, in 5 chunks; the first has none before it


@pytest.mark.parametrize("num_backwards", [0, 1])
def test_pending_copies_are_waited_for_when_a_graph_is_dropped(num_backwards, late_store, generator):
    layers = Layers(late_store)
    for _ in range(3):
        y, inputs = layers(torch.randn(20, 16, generator=generator))
        if num_backwards:
            torch.autograd.grad(y.sum(), layers.weights[-1], retain_graph=True)
            assert late_store._stream.copies
        del y
        assert all(reference.expired() for reference in inputs)
        assert late_store._stream.copies == []
    assert late_store._stream.num_lost == 0


def test_a_models_layers_leave_their_inputs_to_the_host(tiny_base, generator, monkeypatch):
    monkeypatch.setattr("qlora.layers.recompute.OFFLOADED_FROM", ("cpu",))
    monkeypatch.setattr("qlora.layers.recompute.HostStore", lambda device: stores.append(make_store()) or stores[0])
    stores, inputs = [], []
    model, _ = load_base(str(tiny_base), compute_dtype="bfloat16")
    add_lora(model, rank=4)
    rebuild_activations(model)
    apply_recompute(model.train(), "offload")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    ids = torch.randint(256, (40,), generator=generator).numpy()
    batch = collate([make_example(ids, [True] * len(ids))])
    (store,) = stores
    for _ in range(2):
        loss = supervised_loss(model, batch)
        assert [reference.expired() for reference in inputs] == [True, False]
        assert store.num_free == 0
        loss.backward()
        assert store.num_free == store.num_chunks == 40 * 64 * 2 // CHUNK
        inputs.clear()
    with torch.no_grad():
        supervised_loss(model, batch)
        supervised_loss(model.eval(), batch)
    assert store.num_free == store.num_chunks == 40 * 64 * 2 // CHUNK
