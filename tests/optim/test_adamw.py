"""FlatAdamW: the paper's update, bitsandbytes' bits, and a state that continues exactly."""

import io

import bitsandbytes
import pytest
import torch
from torch import nn

from qlora.memory.probe import measure_peak
from qlora.optim import OPTIMIZERS, FlatAdamW, FlatParameters, make_optimizer, unpaged_reason
from tests.reference.adamw import AdamW

NAMES = list(OPTIMIZERS)
ROUNDINGS = ["stochastic", "master", "nearest"]


def make_flat(values):
    parameter = nn.Parameter(values.clone())
    return parameter, FlatParameters([("p", parameter)])


def random_grads(generator, steps, shape):
    """Return gradients whose sizes differ between elements by orders of magnitude, with a constant direction."""
    direction = torch.randn(shape, generator=generator)
    scale = 10 ** (4 * torch.rand(shape, generator=generator) - 5)
    return [(direction + torch.randn(shape, generator=generator)) * scale for _ in range(steps)]


def run(parameter, optimizer, grads, learning_rate=1e-3):
    for grad in grads:
        optimizer.flat.zero_grad()
        parameter.grad.copy_(grad)
        optimizer.step(learning_rate)
    return optimizer.zero_update_share


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw_32bit", "paged_adamw_32bit"])
def test_32_bit_updates_are_the_papers(name, weight_decay, generator):
    values = torch.randn(33, 17, generator=generator)
    grads = random_grads(generator, 20, values.shape)
    parameter, flat = make_flat(values)
    run(parameter, make_optimizer(name, flat, weight_decay=weight_decay), grads)
    wanted = values.clone()
    reference = AdamW(wanted, weight_decay=weight_decay)
    for grad in grads:
        reference.step(grad, 1e-3)
    # Twenty steps of 1e-3, each within fp32's rounding of values near 1.
    torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=4e-6)
    assert (wanted - values).abs().max() > 5e-3


def test_betas_eps_and_a_changing_learning_rate_are_followed(generator):
    values = torch.randn(300, generator=generator)
    grads = random_grads(generator, 10, values.shape)
    settings = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.05}
    parameter, flat = make_flat(values)
    optimizer = make_optimizer("adamw_32bit", flat, **settings)
    wanted = values.clone()
    reference = AdamW(wanted, **settings)
    for step, grad in enumerate(grads):
        run(parameter, optimizer, [grad], learning_rate=1e-3 * (step + 1))
        reference.step(grad, 1e-3 * (step + 1))
    torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_updates_stay_close_to_32_bit_ones(name, weight_decay, generator):
    values = torch.randn(64, 64, generator=generator)
    # Gradients of similar size, as within one factor: a block of 8-bit state has one scale.
    direction = torch.randn(64, 64, generator=generator)
    grads = [direction + torch.randn(64, 64, generator=generator) for _ in range(20)]
    results = {}
    for each in (name, "adamw_32bit"):
        parameter, flat = make_flat(values)
        run(parameter, make_optimizer(each, flat, weight_decay=weight_decay), grads)
        results[each] = parameter.detach() - values
    eight, full = results[name], results["adamw_32bit"]
    assert not torch.equal(eight, full)
    assert (eight - full).norm() / full.norm() < 0.05


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("bits", [8, 32])
def test_updates_are_bitsandbytes_own_bit_for_bit(bits, weight_decay, generator):
    values = torch.randn(8, 256, generator=generator)
    grads = random_grads(generator, 6, values.shape)
    parameter, flat = make_flat(values)
    run(parameter, make_optimizer(f"adamw_{bits}bit", flat, weight_decay=weight_decay), grads)
    other = nn.Parameter(values.clone())
    theirs = bitsandbytes.optim.AdamW([other], lr=1e-3, weight_decay=weight_decay, optim_bits=bits, min_8bit_size=1)
    for grad in grads:
        other.grad = grad.clone()
        theirs.step()
    dtype = torch.uint8 if bits == 8 else torch.float32
    assert theirs.state[other]["state1"].dtype == dtype
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("name", NAMES)
def test_state_takes_the_bits_it_is_named_for_whatever_the_size(name, generator):
    _, flat = make_flat(torch.randn(3, 5, generator=generator))
    state = make_optimizer(name, flat).state_dict()
    bits = 8 if name.endswith("_8bit") else 32
    assert {state[key].element_size() * 8 for key in ("state1", "state2")} == {bits}


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_32bit"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_run_continues_bit_for_bit(dtype, rounding, name, generator, seed):
    values = torch.randn(33, 17, generator=generator).to(dtype)
    grads = random_grads(generator, 8, values.shape)
    parameter, flat = make_flat(values)
    optimizer = make_optimizer(name, flat, weight_decay=0.1, rounding=rounding, seed=seed)
    run(parameter, optimizer, grads[:4])
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), parameter.detach().clone()), file)
    run(parameter, optimizer, grads[4:])

    file.seek(0)
    state, stopped_at = torch.load(file)
    # Another seed and other initial values: everything must come from the state.
    restored, restored_flat = make_flat(torch.zeros_like(values))
    other = make_optimizer(name, restored_flat, weight_decay=0.1, rounding=rounding, seed=seed + 1)
    with torch.no_grad():
        restored.copy_(stopped_at)
    other.load_state_dict(state)
    run(restored, other, grads[4:])

    assert torch.equal(restored, parameter)
    for key, value in optimizer.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_32bit"])
def test_each_group_is_updated_as_by_an_optimizer_of_its_own(name, generator):
    """Also in the order of the buffer, which puts the parameters of a group together."""
    values = {key: torch.randn(300, generator=generator) for key in ("a.rows", "b", "c.rows", "d")}
    grads = {key: random_grads(generator, 5, (300,)) for key in values}
    rates = {"a.rows": 0.25, "b": 1.0, "c.rows": 0.25, "d": 1.0}
    groups = {"a.rows": "rows", "b": "", "c.rows": "rows", "d": ""}
    parameters = {key: nn.Parameter(value.clone()) for key, value in values.items()}
    flat = FlatParameters(parameters.items(), groups.__getitem__, {"rows": 0.25})
    assert flat.names == ["a.rows", "c.rows", "b", "d"]
    assert [(group.span, group.rate) for group in flat.groups] == [(slice(0, 1024), 0.25), (slice(1024, 2048), 1.0)]
    flat.set_rates({"rows": 7.0})
    flat.set_rates({"rows": 0.25})
    optimizer = make_optimizer(name, flat, weight_decay=0.1)
    for step in range(5):
        flat.zero_grad()
        for key, parameter in parameters.items():
            parameter.grad.copy_(grads[key][step])
        optimizer.step(1e-3)
    for key, value in values.items():
        alone, alone_flat = make_flat(value)
        run(alone, make_optimizer(name, alone_flat, weight_decay=0.1), grads[key], 1e-3 * rates[key])
        assert torch.equal(parameters[key], alone), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [2048, 1 << 22])
def test_bytes_are_those_that_state_and_update_take(block, dtype, rounding, name, monkeypatch):
    monkeypatch.setattr("qlora.optim.adamw.BLOCK", block)
    sizes = [(33, 170), (5000,)]
    optimizers = {}
    for device in ("meta", "cpu"):
        parameters = [nn.Parameter(torch.zeros(size, dtype=dtype, device=device)) for size in sizes]
        flat = FlatParameters((str(index), parameter) for index, parameter in enumerate(parameters))
        optimizers[device] = make_optimizer(name, flat, rounding=rounding)
    real = optimizers["cpu"]
    state = real.state_dict()
    assert real.state_bytes == sum(value.nbytes for key, value in state.items() if key not in ("generator", "step"))
    held = [real.flat.data, real.flat.grad, *state.values()]
    real.step(1e-3)  # once before, for tensors that are made at first use
    peak = measure_peak(lambda: real.step(1e-3), torch.device("cpu"), held)
    measured = peak - sum(
        {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in held}.values()
    )
    assert real.update_bytes == pytest.approx(measured, abs=200)  # besides scalars
    assert (optimizers["meta"].state_bytes, optimizers["meta"].update_bytes) == (real.state_bytes, real.update_bytes)


def test_unknown_names_and_values_are_refused(generator):
    _, flat = make_flat(torch.randn(3, generator=generator))
    with pytest.raises(ValueError, match="'adam' should be one of paged_adamw_8bit"):
        make_optimizer("adam", flat)
    with pytest.raises(ValueError, match="rounding='up' one of stochastic"):
        make_optimizer("adamw_8bit", flat, rounding="up")


def test_loading_copies_and_shares_nothing_with_the_state_given(generator):
    values = torch.randn(300, generator=generator)
    grads = random_grads(generator, 2, values.shape)
    parameter, flat = make_flat(values)
    optimizer = make_optimizer("adamw_32bit", flat)
    run(parameter, optimizer, grads)
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    kept = {key: value.clone() for key, value in state.items()}
    other_parameter, other_flat = make_flat(values)
    other = make_optimizer("adamw_32bit", other_flat)
    buffers = {key: value.data_ptr() for key, value in other.state_dict().items() if key.startswith("state")}
    other.load_state_dict(state)
    run(other_parameter, other, grads)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    assert buffers == {key: other.state_dict()[key].data_ptr() for key in buffers}


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ({"name": "adamw_8bit"}, {"name": "adamw_32bit"}),
        ({"name": "adamw_32bit"}, {"name": "adamw_8bit"}),
        ({"rounding": "master"}, {"rounding": "stochastic"}),
        ({"rounding": "stochastic"}, {"rounding": "master"}),
        ({"size": 300}, {"size": 600}),
    ],
    ids=["8-in-32", "32-in-8", "master-in-none", "none-in-master", "size"],
)
def test_a_state_of_another_optimizer_is_refused_and_nothing_changed(saved, loading, generator):
    def build(name="adamw_8bit", rounding="stochastic", size=300):
        parameter, flat = make_flat(torch.randn(size, generator=generator).bfloat16())
        optimizer = make_optimizer(name, flat, rounding=rounding)
        run(parameter, optimizer, random_grads(generator, 2, (size,)))
        return optimizer

    state, optimizer = build(**saved).state_dict(), build(**loading)
    before = {key: value.clone() for key, value in optimizer.state_dict().items()}
    with pytest.raises(ValueError, match="optimizer state"):
        optimizer.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state_dict().items())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_share_of_lost_updates_is_reported(rounding, generator):
    # Elements of 1 lose an update of 1e-4 in bf16, where half a step is 2e-3; elements of 2^-20 do not.
    values = torch.cat([torch.full((600,), 1.0), torch.full((300,), 2.0**-20), torch.full((100,), 1.0)])
    parameter, flat = make_flat(values.bfloat16())
    optimizer = make_optimizer("adamw_32bit", flat, rounding=rounding)
    grad = torch.ones(1000)
    grad[900:] = 0  # No gradient: not counted.
    before = parameter.detach().clone()
    share = run(parameter, optimizer, [grad], learning_rate=1e-4).item()
    kept = (parameter == before)[:900].double().mean().item()
    assert share == pytest.approx(kept, abs=1e-6)
    if rounding == "stochastic":
        assert share < 600 / 900
    else:
        assert share == pytest.approx(600 / 900, abs=1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_32bit"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_slices_is_the_whole_step_bit_for_bit(dtype, rounding, name, generator, monkeypatch):
    """Also where a slice spans two groups, and in the random numbers of rounding."""
    values = {key: torch.randn(1700, generator=generator).to(dtype) for key in ("a", "b")}
    grads = random_grads(generator, 3, (2, 1700))
    results = []
    for block in (1 << 22, 768):
        monkeypatch.setattr("qlora.optim.adamw.BLOCK", block)
        parameters = {key: nn.Parameter(value.clone()) for key, value in values.items()}
        flat = FlatParameters(parameters.items(), str, {"a": 0.25})
        optimizer = make_optimizer(name, flat, weight_decay=0.1, rounding=rounding)
        for grad in grads:
            flat.zero_grad()
            for parameter, own in zip(parameters.values(), grad, strict=True):
                parameter.grad.copy_(own)
            optimizer.step(1e-3)
        results.append({"data": flat.data} | optimizer.state_dict())
    assert (results[0]["data"][:1700] != values["a"]).any()
    for key, whole in results[0].items():
        assert torch.equal(results[1][key], whole), key


@pytest.mark.parametrize(("learning_rate", "share"), [(0.0, 1.0), (1e-2, 0.0)])
def test_fp32_parameters_lose_no_update_but_one_of_zero(learning_rate, share, generator):
    parameter, flat = make_flat(torch.randn(300, generator=generator))
    grad = torch.randn(300, generator=generator)
    assert run(parameter, make_optimizer("adamw_32bit", flat), [grad], learning_rate).item() == share


def test_without_any_gradient_the_share_is_a_number(generator):
    parameter, flat = make_flat(torch.randn(300, generator=generator))
    before = parameter.detach().clone()
    assert run(parameter, FlatAdamW(flat), [torch.zeros(300)]).isfinite()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_called_paged_only_where_it_is(name, generator):
    _, flat = make_flat(torch.randn(300, generator=generator))
    optimizer = make_optimizer(name, flat)
    assert not optimizer.is_paged
    assert optimizer.unpaged_why == ("paging needs CUDA's managed memory" if name.startswith("paged_") else None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.paged] * name.startswith("paged_")) for name in NAMES]
)
def test_state_on_cuda_is_paged_whatever_the_size_and_after_resume(name, rounding, generator):
    # Under WSL it can't be.
    paged = name.startswith("paged_") and unpaged_reason(torch.device("cuda")) is None
    values = torch.randn(3, 5, generator=generator).bfloat16().cuda()
    grads = [grad.cuda() for grad in random_grads(generator, 4, values.shape)]
    parameter, flat = make_flat(values)
    optimizer = make_optimizer(name, flat, rounding=rounding)
    run(parameter, optimizer, grads[:2])
    state = {key: value.cpu().clone() for key, value in optimizer.state_dict().items()}
    restored, restored_flat = make_flat(parameter.detach())
    other = make_optimizer(name, restored_flat, rounding=rounding, seed=1)
    other.load_state_dict(state)
    keys = ["state1", "state2"]
    for each in (optimizer, other):
        assert each.is_paged == paged
        # bitsandbytes marks the tensors that it allocated in managed memory.
        assert {getattr(each.state_dict()[key], "is_paged", False) for key in keys} == {paged}
        # Every step reads all of the master.
        assert each.state_dict()["master"].is_cuda if rounding == "master" else "master" not in each.state_dict()
    run(parameter, optimizer, grads[2:])
    run(restored, other, grads[2:])
    assert torch.equal(restored, parameter)
