"""Where weights go by estimate, GPUs by their names, and the time of a step on paper."""

import re
from dataclasses import replace

import pytest
import torch

from qlora.config import load_config
from qlora.data import collate
from qlora.errors import ConfigError, ModelError
from qlora.files import BaseFiles
from qlora.layers.placement import PlacedBytes, placed_bytes, placed_weights
from qlora.lora import add_lora
from qlora.lora.host_rows import keep_rows_on_host
from qlora.lora.mixture import expert_stacks
from qlora.memory import place
from qlora.memory.cards import CARDS, find_card, read_gpu
from qlora.memory.estimate import Estimate, check_host, choose_level
from qlora.memory.estimate import estimate as estimate_bytes
from qlora.memory.pace import BUS_SHARE, FLOPS_SHARE, pace_of
from qlora.memory.passes import Passes
from qlora.memory.place import first_that_fits
from qlora.memory.probe import made_up_document
from qlora.memory.timeline import HEAD
from qlora.model import SUPERVISED, build_skeleton, load_base
from qlora.objectives import training_loss
from qlora.processes import Processes
from qlora.training import estimate
from tests.moe import make_moe
from tests.tiny import make_base, run_config


@pytest.fixture(scope="module", params=["dense", "experts"])
def base(request, tmp_path_factory):
    """A random model of eight layers, so wide that rounding up the bytes of each weight is negligible."""
    folder, sizes = tmp_path_factory.mktemp("base") / "base", {"num_hidden_layers": 8, "hidden_size": 256}
    if request.param == "experts":
        return make_moe(folder, "qwen3_moe", 1, **sizes)
    return make_base(folder, 1, **sizes, intermediate_size=512)


@pytest.fixture
def predicted(base, tmp_path):
    config = load_config(run_config(base, tmp_path / "none.jsonl", tmp_path / "run", model__compute_dtype="bfloat16"))
    return estimate_bytes(config, SUPERVISED, "cuda")


def test_bytes_are_those_of_a_loaded_model(base, predicted):
    placed = placed_weights(load_base(str(base), compute_dtype="bfloat16", weights="host", device="cpu")[0])
    assert sum(predicted.footprint.layers_packed) == pytest.approx(sum(placed.layer_bytes), rel=0.05)
    host = replace(predicted, weights="host")
    edges = predicted.footprint.embedding + predicted.footprint.head
    assert edges == 2 * 259 * 256 * 2
    assert (host.placed.device, host.placed.host - edges) == pytest.approx(
        (placed.slot_bytes, placed.stored_bytes), rel=0.05
    )
    moved = sum(predicted.footprint.layers_packed) + edges
    assert predicted.weight_bytes - host.weight_bytes == moved - host.placed.device
    # In the layers the head is not there; where it is used, it is, and memory was freed for it.
    for is_head, kept in ((False, 0), (True, predicted.footprint.head - predicted.footprint.freed_for_head)):
        moments = [moment for moment in predicted.footprint.held["full"] if (moment.place == HEAD) == is_head]
        footprint = replace(predicted.footprint, held={"full": moments}, update=0)
        on_device, on_host = (replace(each, footprint=footprint).total_bytes("full", 512) for each in (predicted, host))
        assert on_device - on_host == moved - host.placed.device - kept


def test_a_large_embedding_is_the_peak_while_a_base_is_loaded(predicted):
    """It leaves the device when adapters are added, before the first step."""
    own = predicted.footprint
    large = replace(
        predicted, footprint=replace(own, weights=own.weights + (1 << 40), embedding=own.embedding + (1 << 40))
    )
    for weights in ("device", "sharded", "host"):
        before, placed = (replace(each, weights=weights, processes=2) for each in (predicted, large))
        peak = placed.bytes_by_kind("full", 512)
        moved = 0 if weights == "device" else own.embedding + own.head
        assert peak["weights"] == before.weight_bytes + (1 << 40) + moved
        assert (peak["adapters"] == 0) == (weights != "device")
        # Once it is loaded, and memory is fitted, only steps count.
        assert replace(placed, is_loaded=True).bytes_by_kind("full", 512)["adapters"] > 0
        if weights == "device":
            continue
        free = int(placed.total_bytes("full", 512) / 0.95) - 1
        remedy = {"sharded": "Start more processes, or use a", "host": "Use a"}[weights]
        with pytest.raises(
            ModelError, match=rf"^Loading the base takes .* for embedding and head .*\. {remedy} smaller"
        ):
            choose_level(placed, free, 512)
        assert choose_level(replace(placed, is_loaded=True), free, 512)[0] == "none"


def test_parts_of_several_processes(predicted):
    layers = predicted.footprint.layers_packed
    for count in (2, 3):
        parts, largest = sum(layers) / count, max(layers)
        sharded, host = (placed_bytes(kind, layers, count) for kind in ("sharded", "host"))
        assert (sharded.device, sharded.host) == (pytest.approx(parts, rel=0.1), 0)
        assert (sharded.in_layers, host.in_layers) == (3 * largest, 0)
        assert host[:2] == (2 * largest, sum(layers))  # each process has all of them
        # All layers are gathered twice, and the process's own part is there.
        assert sharded.copied == pytest.approx(2 * sum(layers) * (count - 1) / count, rel=0.05)


def test_the_first_place_that_fits_is_taken(predicted):
    two = replace(predicted, processes=2)
    least = {
        weights: min(replace(two, weights=weights).total_bytes(level, two.tokens) for level in two.levels)
        for weights in ("device", "sharded", "host")
    }
    assert least["device"] > least["sharded"]
    just_enough = {weights: int(number / 0.95) + 1 for weights, number in least.items()}
    assert first_that_fits(two, just_enough["device"]) == ("device", "they fit on the device")
    found, reason = first_that_fits(two, just_enough["sharded"])
    assert found == "sharded"
    assert reason.startswith("on the device they don't fit: A micro-batch of")
    assert first_that_fits(predicted, just_enough["sharded"])[0] == "host"  # one process


def test_a_host_with_too_little_memory_is_refused_before_anything_is_loaded(predicted, base, tmp_path, monkeypatch):
    """The device is too small for the weights, which go to the host if they fit there."""
    host = replace(predicted, weights="host")
    least = min(host.total_bytes(level, host.tokens) for level in host.levels)
    needed = min(host.host_bytes(level, host.tokens) for level in host.levels)
    assert needed == host.placed.host
    monkeypatch.setattr(place, "estimate", lambda *_: predicted)
    monkeypatch.setattr(place, "available_bytes", lambda _device: int(least / 0.95) + 1)
    on_gpu, lengths = Processes(device=torch.device("cuda")), [predicted.max_seq_len] * predicted.micro_batch_size
    for weights in ("host", "auto"):
        path = run_config(base, tmp_path / "none.jsonl", tmp_path / "run", model__weights=weights)
        config = load_config(path)
        monkeypatch.setattr(place, "free_host_bytes", lambda: int(needed / 0.95) + 1)
        assert place.choose_weights(config, SUPERVISED, on_gpu, lengths, packed=False)[0] == "host"
        monkeypatch.setattr(place, "free_host_bytes", lambda: int(needed / 0.95) - 1)
        with pytest.raises(ModelError, match=r"^model\.weights: host takes .* of host memory.*smaller base\.$"):
            place.choose_weights(config, SUPERVISED, on_gpu, lengths, packed=False)


@pytest.mark.parametrize(("weights", "remedy"), [
    ("device", "Set model.weights: auto, or use a"), ("sharded", "Start more processes, or use a"), ("host", "Use a"),
])  # fmt: skip
def test_a_place_that_a_config_asks_for_is_refused_if_the_base_does_not_fit_there(
    weights, remedy, predicted, base, tmp_path, monkeypatch
):
    """Before it is loaded; whether a step fits is known after a trial."""
    loaded = replace(predicted, weights=weights, processes=1).loaded_bytes
    monkeypatch.setattr(place, "estimate", lambda *_: predicted)
    monkeypatch.setattr(place, "free_host_bytes", lambda: 1 << 40)
    config = load_config(
        run_config(base, tmp_path / "none.jsonl", tmp_path / "run", model__weights=weights, model__recompute="full")
    )
    on_gpu, lengths = Processes(device=torch.device("cuda")), [predicted.max_seq_len] * predicted.micro_batch_size
    monkeypatch.setattr(place, "available_bytes", lambda _device: int(loaded / 0.95) + 1)
    assert place.choose_weights(config, SUPERVISED, on_gpu, lengths, packed=False)[0] == weights
    monkeypatch.setattr(place, "available_bytes", lambda _device: int(loaded / 0.95) - 1)
    with pytest.raises(ModelError, match=rf"^Loading the base takes .* the device has .*\. {remedy} smaller base\.$"):
        place.choose_weights(config, SUPERVISED, on_gpu, lengths, packed=False)


@pytest.mark.parametrize("base", ["dense"], indirect=True)
def test_a_base_in_16_bits_that_does_not_fit_can_be_quantized(base, tmp_path, monkeypatch):
    config = load_config(
        run_config(
            base, tmp_path / "none.jsonl", tmp_path / "run", model__quantization="none", train__micro_batch_size=1
        )
    )
    monkeypatch.setattr(place, "available_bytes", lambda _device: 1 << 20)
    on_gpu = Processes(device=torch.device("cuda"))
    with pytest.raises(ModelError, match=r"the device has .*\. Set model\.quantization: nf4, or use a smaller base\.$"):
        place.choose_weights(config, SUPERVISED, on_gpu, [8], packed=False)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("embedding and head", r"^model\.weights: sharded takes .*start fewer processes .* smaller vocabulary\.$"),
        ("layer inputs", r"^model\.recompute: offload takes .*set model\.recompute: full"),
    ],
)
@pytest.mark.parametrize("base", ["dense"], indirect=True)
def test_split_weights_that_a_config_asks_for_are_held_against_the_host(
    missing, message, predicted, base, tmp_path, monkeypatch
):
    """With split weights, the host of each process has embedding and head, and layer inputs that are offloaded."""
    sharded = replace(predicted, weights="sharded")
    of_weights, total = sharded.placed.host, sharded.host_bytes("offload", sharded.tokens)
    assert of_weights == predicted.footprint.embedding + predicted.footprint.head
    monkeypatch.setattr(place, "estimate", lambda *_: predicted)
    monkeypatch.setattr(place, "available_bytes", lambda _device: 1 << 40)
    on_gpu, lengths = Processes(device=torch.device("cuda")), [predicted.max_seq_len] * predicted.micro_batch_size
    path = run_config(
        base, tmp_path / "none.jsonl", tmp_path / "run", model__weights="sharded", model__recompute="offload"
    )
    config, needed = load_config(path), {"embedding and head": of_weights, "layer inputs": total}[missing]
    monkeypatch.setattr(place, "free_host_bytes", lambda: int(total / 0.95) + 1)
    assert place.choose_weights(config, SUPERVISED, on_gpu, lengths, packed=False)[0] == "sharded"
    monkeypatch.setattr(place, "free_host_bytes", lambda: int(needed / 0.95) - 1)
    with pytest.raises(ModelError, match=message):
        place.choose_weights(config, SUPERVISED, on_gpu, lengths, packed=False)


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (
            3 << 30,
            "model.recompute: offload takes 1.50 GiB of host memory for each process, and the run 3.50 GiB in all,",
        ),
        (
            1 << 30,
            "model.weights: sharded takes 2.00 GiB of host memory for each process, and the run 3.50 GiB in all,",
        ),
    ],
    ids=["layer inputs", "embedding and head"],
)
@pytest.mark.parametrize("base", ["dense"], indirect=True)
def test_host_memory_is_blamed_on_what_takes_it(free, message, predicted, monkeypatch):
    monkeypatch.setattr(Estimate, "placed", PlacedBytes(0, 2 << 30, 0))
    monkeypatch.setattr(Estimate, "host_bytes", lambda *_: 7 << 29)
    with pytest.raises(ModelError, match=f"^{re.escape(message)} but there are {free >> 30}.00 GiB"):
        check_host(replace(predicted, weights="sharded", host_free=free), 512, ["offload"])


@pytest.mark.parametrize(
    ("settings", "order", "head_copies"),
    [
        ({}, "FB", 1),
        ({"objective": "dpo"}, "FFB", 2),  # the reference first
        ({"objective": "kto"}, "FFFFB", 4),  # two passes look ahead
        ({"keep": {"kl": 0.1}}, "FFB", 2),  # both predictions that are compared read one copy
        ({"adversarial": {"epsilon": 1}}, "FBFB", 2),
        ({"keep": {"kl": 0.1}, "adversarial": {"epsilon": 1}}, "FFBFFB", 4),
    ],
    ids=lambda value: "+".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("base", ["dense"], indirect=True)
def test_copies_are_those_of_every_pass_of_an_objective(settings, order, head_copies, base, tmp_path):
    path = run_config(base, tmp_path / "none.jsonl", tmp_path / "run", model__compute_dtype="bfloat16",
                      **{f"train__{key}": value for key, value in settings.items()})  # fmt: skip
    config = load_config(path)
    loss = training_loss(config.train)
    expected = replace(estimate_bytes(config, loss, "cuda"), weights="host")
    assert expected.footprint.passes == Passes(order, head_copies)
    model, _ = load_base(str(base), compute_dtype="bfloat16", weights="host", device="cpu")
    add_lora(model, rank=2)
    keep_rows_on_host(model)
    document = made_up_document(list(range(12)), loss.columns)
    batch = collate([document] * loss.group_size, packed=True)
    placed, head = placed_weights(model), model.get_output_embeddings()
    for _ in range(2):  # the second begins with what the first left on the device
        fetched, copied = placed.num_fetched, head.num_copied
        for computed in loss.training_passes(model.train(), batch):
            computed.total.backward()
    assert head.num_copied - copied == head_copies
    layers = placed_bytes("host", placed.layer_bytes, 1, passes=order).copied
    assert layers == (placed.num_fetched - fetched) * placed.layer_bytes[0]  # which are as large as each other
    assert expected.placed.copied == pytest.approx(
        layers + head_copies * sum(piece.nbytes for piece in head.pieces), rel=0.05
    )
    # A process gathers what others hold in every pass.
    sharded = placed_bytes("sharded", placed.layer_bytes, 2, passes=order).copied
    assert sharded == pytest.approx(len(order) * sum(placed.layer_bytes) / 2, rel=0.01)
    products = expected.footprint.products * expected.tokens * 2
    flops = pace_of(expected, "none", CARDS[3]).compute * FLOPS_SHARE * CARDS[3].flops
    assert flops == pytest.approx(products * len(order))


def test_a_lack_of_host_memory_for_layer_inputs_is_not_blamed_on_the_weights(predicted, base, tmp_path, monkeypatch):
    needed = predicted.host_bytes("offload", predicted.tokens)
    monkeypatch.setattr(place, "estimate", lambda *_: predicted)
    monkeypatch.setattr(place, "available_bytes", lambda _device: 1 << 40)
    monkeypatch.setattr(place, "free_host_bytes", lambda: needed)
    on_gpu, lengths = Processes(device=torch.device("cuda")), [predicted.max_seq_len] * predicted.micro_batch_size
    for level, is_refused in (("offload", True), ("full", False)):
        path = run_config(base, tmp_path / "none.jsonl", tmp_path / "run", model__recompute=level)
        if is_refused:
            with pytest.raises(ModelError, match=r"^model\.recompute: offload takes .*set model\.recompute: full"):
                place.choose_weights(load_config(path), SUPERVISED, on_gpu, lengths, packed=False)
        else:
            assert place.choose_weights(load_config(path), SUPERVISED, on_gpu, lengths, packed=False)[0] == "device"


def test_layer_inputs_are_offloaded_only_where_the_host_has_room(predicted):
    tokens, levels = 4096, ["full", "offload"]
    needed = {level: predicted.host_bytes(level, tokens) for level in levels}
    # The inputs of all layers but those that compute, in 16 bits.
    assert needed == {"full": 0, "offload": pytest.approx(6 * tokens * 256 * 2, rel=0.2)}
    for host_free, level in ((None, "offload"), (2 * needed["offload"], "offload"), (needed["offload"], None)):
        limited = replace(predicted, host_free=host_free)
        free = int(predicted.total_bytes("offload", tokens) / 0.95) + 1
        if level is not None:
            assert choose_level(limited, free, tokens, levels)[0] == level
            continue
        with pytest.raises(ModelError, match=r"^model\.recompute: offload takes .* of host memory"):
            choose_level(limited, free, tokens, levels)
    on_cpu = replace(predicted, device=torch.device("cpu"), host_free=1)  # which is the host
    assert on_cpu.fits_host("offload", tokens)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("3060 12GB", "RTX 3060 12GB"), ("4060Ti 16GB", "RTX 4060 Ti 16GB"), ("4060 ti", "RTX 4060 Ti 16GB"),
        ("A100", "A100 80GB"), ("H100", "H100 80GB"), ("h200", "H200 141GB"), ("5090", "RTX 5090"),
        ("24GB", None), ("24", None), ("", None), ("RTX", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_name(text, name):
    card = find_card(text)
    assert (None if card is None else card.name) == name


def test_a_number_is_a_size_only_with_a_unit():
    assert read_gpu("4090") == (24 << 30, find_card("4090"))
    assert read_gpu("24GB") == (24 * 10**9, None)
    for wrong in ("24", "24000000000", "4091", "24.5", "1MB", "lots", ""):
        with pytest.raises(ValueError, match="should be a size such as 24GB or 24GiB, or a GPU: 3060 12GB, "):
            read_gpu(wrong)
    with pytest.raises(ConfigError, match="gpu: '24' should be a size such as 24GB"):
        estimate({"model": {"base": "b"}, "data": {"train": "t"}, "train": {"output_dir": "o"}}, "24")


def test_times_follow_from_the_rates(predicted):
    card, host = CARDS[3], replace(predicted, weights="host")
    pace = pace_of(host, "full", card)
    assert pace.copy == pytest.approx(host.placed.copied / (BUS_SHARE * card.bus))
    products = predicted.footprint.products
    assert pace.compute == pytest.approx(6 * products * predicted.tokens / (FLOPS_SHARE * card.flops))
    assert pace_of(host, "none", card).compute == pytest.approx(pace.compute * 2 / 3)
    # At that number of tokens, computing takes as long as copying.
    assert pace.compute * pace.hidden_from / predicted.tokens == pytest.approx(pace.copy, rel=0.01)
    assert (pace.compute >= pace.copy) == (predicted.tokens >= pace.hidden_from)
    assert pace_of(predicted, "full", card).hidden_from == 0
    split = replace(predicted, weights="sharded", processes=2)
    assert 0 < pace_of(split, "full", card).hidden_from < pace.hidden_from  # half of the bytes


def test_a_token_is_multiplied_by_its_experts_alone(base, predicted):
    skeleton = build_skeleton(BaseFiles.resolve(str(base)))
    stacks, tables = expert_stacks(skeleton), ("embed_tokens", "norm")
    weights = [(name, each) for name, each in skeleton.named_parameters()
               if each.dim() > 1 and not any(table in name for table in tables)]  # fmt: skip
    wanted = sum(each.numel() * (2 / 6 if name in stacks else 1) for name, each in weights)  # 2 of 6 experts
    assert predicted.footprint.products == wanted
