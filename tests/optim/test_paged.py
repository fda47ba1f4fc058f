"""State in managed memory, with the memory and the driver of a GPU replaced by stand-ins on a CPU."""

import ctypes
import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import bitsandbytes.functional
import pytest
import torch
from torch import nn

from qlora.optim import FlatParameters, adamw, make_optimizer, paged, unpaged_reason

GPU = torch.device("cuda", 1)
NAMES = ["paged_adamw_8bit", "paged_adamw_32bit"]


@pytest.fixture
def managed(monkeypatch):
    """Return what happens to stand-ins of managed memory, in order."""
    events = []

    def get_paged(*shape, dtype, device):
        buffer = torch.full(shape, 77, dtype=dtype)  # memory as it comes
        buffer.is_paged, buffer.page_deviceid = True, device.index
        events.append(("allocated", buffer.data_ptr()))
        return buffer

    def fill(buffer, value):
        events.append(("filled on the device", buffer.data_ptr()))
        buffer.fill_(value)

    monkeypatch.setattr(bitsandbytes.functional, "get_paged", get_paged)
    monkeypatch.setattr(bitsandbytes.functional, "fill", fill)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext(events.append(("device", index))))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: events.append(("synchronized",)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    driver = SimpleNamespace(cuMemFree_v2=lambda pointer: events.append(("freed", pointer.value)))
    monkeypatch.setattr(paged, "_driver", lambda: driver)
    monkeypatch.setattr(adamw, "unpaged_reason", lambda device: None)
    return events


def make_flat(values):
    parameter = nn.Parameter(values.clone())
    return parameter, FlatParameters([("p", parameter)])


def train(parameter, optimizer, grads):
    for grad in grads:
        optimizer.flat.zero_grad()
        parameter.grad.copy_(grad)
        optimizer.step(1e-2)


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("name", NAMES)
def test_paged_state_trains_the_same_bits_and_stays_paged_after_a_resume(
    name, rounding, managed, monkeypatch, generator
):
    monkeypatch.setattr(adamw, "BLOCK", 512)
    update = f"optimizer_update_{'8bit_blockwise' if '8bit' in name else '32bit'}"
    kernel, counts = getattr(bitsandbytes.functional, update), []

    def watched(optimizer, grad, weights, **named):
        marks = {(named[key].is_paged, named[key].page_deviceid) for key in ("state1", "state2")}
        assert marks == {(True, 3)}  # by which bitsandbytes takes them for memory of the device
        counts.append(grad.numel())
        return kernel(optimizer, grad, weights, **named)

    values = torch.randn(1700, generator=generator).bfloat16()
    grads = [torch.randn(1700, generator=generator) for _ in range(4)]
    plain, plain_flat = make_flat(values)
    train(plain, make_optimizer(name.removeprefix("paged_"), plain_flat, rounding=rounding), grads)

    monkeypatch.setattr(bitsandbytes.functional, update, watched)
    parameter, flat = make_flat(values)
    optimizer = make_optimizer(name, flat, rounding=rounding)
    assert (optimizer.is_paged, optimizer.unpaged_why) == (True, None)
    train(parameter, optimizer, grads[:2])
    managed.clear()
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    assert managed == [("synchronized",)]  # before the host reads
    restored, restored_flat = make_flat(parameter.detach())
    other = make_optimizer(name, restored_flat, rounding=rounding, seed=1)
    other.load_state_dict(state)
    train(restored, other, grads[2:])
    assert torch.equal(restored, plain)
    assert not hasattr(other.state_dict().get("master"), "is_paged")
    assert max(counts) == 512  # bitsandbytes counts in 32 bits, and gets no more than a block


def test_buffers_are_filled_on_the_device_and_freed_once_nothing_uses_them(managed):
    buffer = paged.paged_zeros(1000, torch.uint8, GPU)
    pointer = buffer.data_ptr()
    assert managed == [("device", 1), ("allocated", pointer), ("filled on the device", pointer)]
    assert buffer.count_nonzero() == 0
    part = buffer[10:20]
    managed.clear()
    del buffer
    gc.collect()
    assert managed == []
    del part
    gc.collect()
    assert managed == [("device", 1), ("synchronized",), ("freed", pointer)]


@pytest.mark.parametrize(
    ("status", "value", "reason"),
    [
        (0, 1, None),
        (0, 0, "the driver lacks concurrent access to managed memory, as under WSL"),
        (999, 1, "CUDA's driver can't be asked whether it pages: cuDeviceGetAttribute returned status 999"),
        (OSError("libcuda.so.1: cannot open"), 1, "CUDA's driver can't be asked whether it pages: libcuda.so.1"),
    ],
)
def test_state_is_paged_only_where_host_and_device_may_use_it_at_once(status, value, reason, monkeypatch):
    asked = []

    def answer(found, attribute, device):
        asked.append((attribute, device))
        ctypes.cast(found, ctypes.POINTER(ctypes.c_int))[0] = value
        return status

    def driver():
        if isinstance(status, OSError):
            raise status
        return SimpleNamespace(cuDeviceGetAttribute=answer)

    monkeypatch.setattr(paged, "_driver", driver)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    found = unpaged_reason(GPU)
    assert found is None if reason is None else found.startswith(reason)
    assert isinstance(status, OSError) or asked == [(89, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_can_not_page_gets_plain_state_and_the_reason(name, monkeypatch):
    monkeypatch.setattr(adamw, "unpaged_reason", lambda device: "not here")
    _, flat = make_flat(torch.randn(300))
    optimizer = make_optimizer(name, flat)
    assert (optimizer.is_paged, optimizer.unpaged_why) == (False, "not here")
    assert not any(hasattr(each, "is_paged") for each in optimizer.state_dict().values())


def test_updates_run_on_the_stream_of_the_kernels_in_order_with_the_current_one(monkeypatch):
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(stream):
        events.append(f"on {stream.name}")
        yield
        events.append(f"left {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("current"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream("default"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    with adamw._stream_of_kernels(GPU):
        events.append("update")
    assert events == ["default waits for current", "on default", "update", "left default", "current waits for default"]
