"""A step in which memory runs out is retried with less memory, and has the same gradient."""

from dataclasses import replace

import pytest
import torch

from qlora.errors import ModelError
from qlora.layers import apply_recompute, cache_weights, recompute_levels
from qlora.memory.probe import Storages, measure_peak
from qlora.model import SUPERVISED
from qlora.nf4 import NF4Linear
from qlora.processes import Processes
from qlora.training.relief import MemoryRelief
from tests.test_out_of_memory import OTHERS, RAN_OUT
from tests.training.test_loop import Trainer, counting, random_examples

STEPS = 3


class Limited(Storages):
    """An allocator with so many bytes for new storages and those held before."""

    def __init__(self, num_bytes, held):
        super().__init__(torch.device("cpu"), held)
        self.num_bytes = num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.now > self.num_bytes:
            raise torch.OutOfMemoryError("no room")
        return result


def prepare(tiny_base, examples, **settings):
    settings = {"micro": 4, "accumulation": 1, "compute_dtype": "bfloat16"} | settings
    trainer = Trainer(tiny_base, examples, **settings)
    apply_recompute(trainer.model, "none")
    trainer.run(1)  # memory taken at first use stays
    return trainer


def held_by(trainer):
    """Return the trained values, their gradient and the optimizer's state."""
    return [trainer.flat.data, trainer.flat.grad, *trainer.optimizer.state_dict().values()]


def step_bytes(trainer):
    """Return the memory that every step takes."""
    steps = trainer.progress.step + 1
    return measure_peak(lambda: trainer.run(steps), torch.device("cpu"), held_by(trainer))


def run_limited(trainer, num_bytes, may_raise=True, level="none"):
    """Train on with an allocator of so many bytes; return the relief and the changes that it made."""
    levels = recompute_levels(trainer.model) if may_raise else ()
    relief, changes = MemoryRelief(trainer.model, trainer.plan, trainer.progress, level, levels), []

    with Limited(num_bytes, held_by(trainer)):
        trainer.run(1 + STEPS, on_out_of_memory=lambda step: changes.append((step, relief.reduce_memory(step))))
    return relief, changes


@pytest.fixture
def examples(generator):
    return random_examples(generator, 16)


def test_recomputation_rises_and_results_have_the_same_bits(tiny_base, examples):
    needed = {}
    for level in ("none", "full"):
        trainer = prepare(tiny_base, examples)
        apply_recompute(trainer.model, level)
        needed[level] = max(step_bytes(trainer) for _ in range(STEPS))
    assert needed["full"] < 0.9 * needed["none"]
    free = prepare(tiny_base, examples).run(1 + STEPS)
    trainer = prepare(tiny_base, examples)
    relief, changes = run_limited(trainer, (needed["full"] + needed["none"]) // 2)
    assert relief.level in recompute_levels(trainer.model)[1:]
    assert "model.recompute is" in changes[-1][1]
    assert trainer.progress.num_parts == 1
    assert trainer.losses == free.losses
    assert torch.equal(trainer.flat.data, free.flat.data)
    assert trainer.progress.tokens == free.progress.tokens


@pytest.mark.parametrize("capacity", [None, 80], ids=["apart", "packed"])
def test_micro_batches_are_halved_at_the_same_gradient(capacity, any_base, examples):
    settings = {"capacity": capacity, "compute_dtype": "float32"}
    free = prepare(any_base, examples, **settings)
    needed = max(step_bytes(free) for _ in range(STEPS))
    trainer = prepare(any_base, examples, **settings)
    relief, changes = run_limited(trainer, int(0.7 * needed), may_raise=False)
    assert relief.level == "none"
    assert trainer.progress.num_parts in (2, 4)
    assert f"{trainer.progress.num_parts} parts" in changes[-1][1]
    assert trainer.progress.step == 1 + STEPS
    assert trainer.losses == pytest.approx(free.losses, rel=1e-4)
    assert trainer.progress.supervised_tokens == free.progress.supervised_tokens
    for grad, expected in zip(trainer.grads, free.grads, strict=True):
        assert (grad - expected).norm() < 1e-3 * expected.norm()


def test_cached_weights_are_dropped_first(tiny_base, examples):
    trainer = prepare(tiny_base, examples)
    num_cached = cache_weights(trainer.model, 2**30)
    relief = MemoryRelief(trainer.model, trainer.plan, trainer.progress, "none", recompute_levels(trainer.model))
    assert relief.reduce_memory(0) == f"{num_cached} dequantized weights are no longer cached"
    assert not any(module.is_cached for module in trainer.model.modules() if isinstance(module, NF4Linear))
    assert (relief.num_cached, relief.level) == (0, "none")
    assert "model.recompute is" in relief.reduce_memory(0)


def test_all_measures_are_taken_in_order_and_then_the_run_ends_with_the_remedy(tiny_base, examples):
    trainer = prepare(tiny_base, examples)
    before = trainer.flat.data.clone()
    relief = MemoryRelief(trainer.model, trainer.plan, trainer.progress, "none", recompute_levels(trainer.model))
    levels = recompute_levels(trainer.model)[1:]
    changes = [relief.reduce_memory(4) for _ in range(len(levels) + 2)]  # four examples become two, then one
    assert [f"is {level} instead" in what for level, what in zip(levels, changes, strict=False)] == [True] * len(levels)
    assert ["parts" in what for what in changes[-2:]] == [True, True]
    with pytest.raises(ModelError, match=r"Step 5: memory ran out with single examples at model\.recompute=full"):
        relief.reduce_memory(4)
    assert trainer.progress.num_parts == 4
    assert torch.equal(trainer.flat.data, before)


def test_a_level_that_was_asked_for_stays(tiny_base, examples):
    trainer = prepare(tiny_base, examples)
    relief = MemoryRelief(trainer.model, trainer.plan, trainer.progress, "none", ())
    assert "2 parts" in relief.reduce_memory(0)
    assert relief.level == "none"


def test_a_level_for_which_the_host_has_no_memory_is_left_out(tiny_base, examples):
    trainer = prepare(tiny_base, examples)
    *fitting, last = recompute_levels(trainer.model)
    relief = MemoryRelief(trainer.model, trainer.plan, trainer.progress, fitting[-1], fitting)
    assert last not in fitting
    assert "2 parts" in relief.reduce_memory(0)
    assert relief.level == fitting[-1]


def test_a_run_without_room_for_one_example_changes_nothing(tiny_base, examples):
    trainer = prepare(tiny_base, examples)
    before = trainer.flat.data.clone()
    with pytest.raises(ModelError, match="memory ran out"):
        run_limited(trainer, sum(each.nbytes for each in held_by(trainer)) + 20_000)
    assert torch.equal(trainer.flat.data, before)
    assert trainer.progress.step == 1


def test_a_step_that_another_process_has_no_memory_for_is_retried_here_too(tiny_base, examples):
    """Otherwise the processes would wait for each other with gradients of different steps."""
    free = prepare(tiny_base, examples, compute_dtype="float32").run(1 + STEPS)
    trainer, steps = prepare(tiny_base, examples, compute_dtype="float32"), []

    def add(tensor):
        # Of the other process nothing is added but, in the first step, that it ran out.
        is_first = tensor.shape == (3,) and not steps
        return tensor + tensor.new_tensor([0, 0, 1]) if is_first else tensor

    processes = Processes(world_size=2)
    processes.sum = add
    trainer.run(1 + STEPS, processes=processes, on_out_of_memory=steps.append)
    assert steps == [1]
    assert trainer.losses == free.losses
    assert torch.equal(trainer.flat.data, free.flat.data)


def test_a_step_is_retried_when_a_library_runs_out_of_memory_but_not_after_another_error(tiny_base, examples):
    trainer, steps, errors = prepare(tiny_base, examples), [], [RAN_OUT["cuBLAS"], RAN_OUT["Triton"]]
    free = prepare(tiny_base, examples).run(3)

    def compute(model, batch):
        if errors:
            raise errors.pop()
        return counting(SUPERVISED).compute(model, batch)

    trainer.loss = replace(counting(SUPERVISED), compute=compute)
    trainer.run(3, on_out_of_memory=steps.append)
    assert steps == [1, 1]
    assert trainer.losses[-2:] == free.losses[-2:]
    errors.append(OTHERS["an illegal access"])
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        trainer.run(4, on_out_of_memory=steps.append)
    assert steps == [1, 1]


def test_a_process_that_runs_out_at_once_sends_as_many_sums_as_the_others(tiny_base, examples):
    """Otherwise the sum over processes would hang, or add up different things."""
    trainer, shapes, calls = prepare(tiny_base, examples), [], []

    def compute(model, batch):
        calls.append(batch)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return counting(SUPERVISED).compute(model, batch)

    trainer.loss = replace(counting(SUPERVISED), compute=compute)
    processes = Processes(world_size=2)
    processes.sum = lambda tensor: shapes.append(tensor.shape) or tensor
    trainer.run(2, processes=processes, on_out_of_memory=lambda step: None)
    assert len(shapes) == 4
    assert shapes[:2] == shapes[2:]
    assert trainer.reports[-1].metrics["total"] == trainer.losses[-1]
