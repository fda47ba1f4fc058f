"""Products of several experts at once: kernels and loop against single products, and the choice between them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qlora.kernels import ExpertGroup, LowRank, fold_group, group_experts, grouped, grouped_matmul, grouped_outer
from tests.interpreted import load_interpreted, random_groups, use_on_cpu
from tests.test_out_of_memory import RAN_OUT

# Not bf16, whose bit patterns the interpreter multiplies.
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """Return the kernels in Triton's interpreter."""
    return load_interpreted("qlora.kernels.grouped_triton")


@pytest.fixture(params=["loop", "kernels"])
def way(request, monkeypatch):
    """Compute products in both ways."""
    if request.param == "kernels":
        use_on_cpu(monkeypatch, {"grouped_triton": request.getfixturevalue("interpreted")})


def groups_of(offsets, most_experts=100, most_rows=1000) -> list[ExpertGroup]:
    """Return the groups of experts whose rows begin at these places."""
    bounds = torch.tensor(offsets)
    hit = (bounds.diff() == 0).sort(stable=True).indices
    return [*group_experts(offsets, hit, bounds, most_experts, most_rows)]


def assert_close(found, expected):
    """Check values that are sums of products in another order, each rounded once."""
    eps = torch.finfo(found.dtype).eps
    assert ((found.double() - expected).abs() <= 8 * eps * expected.abs().max()).all()


# Widths below, at and above those of a tile, and some that no tile divides.
@pytest.mark.parametrize("sizes", [(96, 160), (33, 8), (8, 33), (130, 1), (64, 256)], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_experts_rows_meet_its_own_matrix(dtype, is_transposed, sizes, way, generator):
    depth, features = sizes
    offsets = random_groups(7, 90, generator)
    weights = torch.randn(7, features, depth, generator=generator).to(dtype)
    if is_transposed:
        weights = weights.mT.contiguous().mT
    for group in groups_of(offsets, most_experts=3):
        x = torch.randn(offsets[-1], depth, generator=generator).to(dtype)[group.rows]
        expected = torch.cat([x[rows].double() @ weights[expert].double().T for _, expert, rows in group])
        assert_close(grouped_matmul(x, weights, group), expected)
        bias = torch.randn(7, features, generator=generator)
        for _, expert, rows in group:
            expected[rows] += bias[expert].to(dtype)
        own = weights[group.index]
        assert_close(grouped_matmul(x, own, group, bias=bias.to(dtype), of_group=True), expected)


@pytest.mark.parametrize("sizes", [(8, 130), (160, 4), (33, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_of_features_are_summed_over_each_experts_rows(dtype, sizes, way, generator):
    offsets = random_groups(7, 90, generator)
    out = torch.full((7, *sizes), 7.0, dtype=dtype)
    expected = torch.full((7, *sizes), 7.0, dtype=torch.double)
    for group in groups_of(offsets, most_experts=3):
        left, right = (torch.randn(group.rows.stop - group.rows.start, n, generator=generator).to(dtype) for n in sizes)
        grouped_outer(left, right, group, out, 0.5)
        for _, expert, rows in group:
            expected[expert] = left[rows].double().T @ right[rows].double() / 2
    assert_close(out, expected)
    empty = torch.tensor(offsets).diff() == 0
    assert (out[empty] == 7).all()


def test_what_an_expert_gives_does_not_depend_on_the_rows_of_others(way, generator):
    x, weights = torch.randn(50, 48, generator=generator), torch.randn(3, 40, 48, generator=generator)
    (together,) = groups_of([0, 13, 40, 50])
    (alone,) = groups_of([0, 0, 27, 27])
    assert torch.equal(grouped_matmul(x, weights, together)[13:40], grouped_matmul(x[13:40], weights, alone))


def test_groups_hold_every_row_once_and_no_more_than_is_allowed(generator):
    offsets = random_groups(20, 30, generator)
    groups = groups_of(offsets, most_experts=4, most_rows=40)
    assert [expert for group in groups for expert in group.experts] == [
        expert for expert in range(20) if offsets[expert] < offsets[expert + 1]
    ]
    end = 0
    for group in groups:
        assert group.rows.start == end
        end = group.rows.stop
        assert group.index.tolist() == group.experts
        assert len(group.experts) == 1 or (len(group.experts) <= 4 and end - group.rows.start <= 40)
    assert end == offsets[-1]
    assert groups_of([0, 0, 0]) == []


@pytest.mark.parametrize("most_experts", [1, 5])
def test_each_weight_of_a_group_gets_its_own_term(most_experts, generator):
    weights = torch.randn(4, 9, 6, generator=generator)
    update = LowRank(torch.randn(4, 2, 6, generator=generator), torch.randn(4, 9, 2, generator=generator), 0.5)
    for group in groups_of([0, 2, 2, 3, 7], most_experts):
        found = fold_group(weights[group.index], update, group)
        for slot, expert, _ in group:
            assert torch.allclose(found[slot], weights[expert] + 0.5 * update.B[expert] @ update.A[expert], atol=1e-5)
        assert fold_group(weights, None, group) is weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_are_used_where_they_give_what_a_loop_gives(dtype, interpreted, monkeypatch):
    monkeypatch.setitem(sys.modules, "qlora.kernels.grouped_triton", interpreted)
    assert grouped.compare_kernels(torch.device("cpu"), dtype) is None


def scale(which, factor, is_wanted=lambda *_: True):
    """Return a product of which some values are multiplied by a factor, where that is wanted."""

    def product(x, weights, group, **options):
        found = grouped.grouped_matmul_plain(x, weights, group, **options)
        if is_wanted(weights, group):
            found[which] *= factor
        return found

    return product


def shrink_an_input(x, weights, group, **options):
    """Multiply with one input too small."""
    x = x.clone()
    x[:, -1] *= 0.8
    return grouped.grouped_matmul_plain(x, weights, group, **options)


def enlarge_outer(left, right, group, out, scaling):
    """Give sums that are too large."""
    grouped.grouped_outer_plain(left, right, group, out, 1.05 * scaling)


WRONG = {
    "right": {},
    "all": {"grouped_matmul_triton": scale(..., 1.03)},
    "last row": {"grouped_matmul_triton": scale(-1, 0.96)},
    "last feature": {"grouped_matmul_triton": scale((..., -1), 0.96)},
    "one value": {"grouped_matmul_triton": scale((0, 0), 1.03)},
    "one feature": {"grouped_matmul_triton": scale(..., 1.03, lambda weights, _: weights.shape[1] == 1)},
    "later groups": {"grouped_matmul_triton": scale(..., 1.03, lambda _, group: group.starts[0] > 0)},
    "no whole tile": {"grouped_matmul_triton": scale(..., 1.03, lambda weights, _: weights.shape[2] % 32 > 0)},
    "last input": {"grouped_matmul_triton": shrink_an_input},
    "outer": {"grouped_outer_triton": enlarge_outer},
}


@pytest.mark.parametrize("error", WRONG)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_that_give_something_else_are_not_used(dtype, error, monkeypatch):
    plain = {
        "grouped_matmul_triton": grouped.grouped_matmul_plain,
        "grouped_outer_triton": grouped.grouped_outer_plain,
    }
    kernels = SimpleNamespace(**plain | WRONG[error])
    monkeypatch.setitem(sys.modules, "qlora.kernels.grouped_triton", kernels)
    name = str(dtype).removeprefix("torch.")
    expected = None if error == "right" else f"the grouped kernels gave other results in {name}"
    assert grouped.compare_kernels(torch.device("cpu"), dtype) == expected


def test_the_loop_is_named_with_its_reason(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert grouped.experts_path(cpu, torch.bfloat16) == "loop over experts: the grouped kernels are for CUDA"
    assert "are for 16 bits" in grouped.experts_path(gpu, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert grouped._try_kernels(gpu, torch.float16) == (
        "the grouped kernels need compute capability 8.0, this GPU has 7.5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))

    def fail(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(grouped, "compare_kernels", fail)
    assert grouped._try_kernels(gpu, torch.float16) == (
        "the grouped kernels failed: RuntimeError: Failed to find C compiler. Please specify via CC."
    )


@pytest.mark.parametrize("error", RAN_OUT.values(), ids=RAN_OUT)
def test_a_comparison_that_runs_out_of_memory_decides_nothing(error, monkeypatch):
    gpu, errors = torch.device("cuda", 0), [error]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(grouped, "HAS_TRITON", True)
    monkeypatch.setattr(grouped, "_reasons", {})

    def compare(*_):
        if errors:
            raise errors.pop()

    monkeypatch.setattr(grouped, "compare_kernels", compare)
    with pytest.raises(type(error)):
        grouped.loop_reason(gpu, torch.float16)
    assert grouped.loop_reason(gpu, torch.float16) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_uses_the_kernels(dtype):
    assert grouped.experts_path(torch.device("cuda"), dtype) == ("grouped kernels: they gave what a loop gives here")
