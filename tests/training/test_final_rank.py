"""A run with lora.final_rank: what it reports, and that processes and checkpoints agree on what is left."""

import json

import pytest
from safetensors.torch import load_file

from qlora.checkpoint import RunDirectory, load_state, read_adapter
from qlora.config import load_config
from qlora.errors import CheckpointError, ConfigError
from qlora.export.card import write_card
from qlora.lora import RankBudget, add_lora, lora_layers
from qlora.model import load_base
from qlora.optim import FlatParameters, make_optimizer
from qlora.training import train
from tests.tiny import run_config
from tests.training.ranks import call_in_two, needs_fork

SETTINGS = {"lora__rank": 6, "lora__rank_pattern": {"mlp.*": 4}, "lora__final_rank": 3, "data__packing": True}
# Of two decoder layers with four and three linears each.
FIRST, LAST = 2 * (4 * 6 + 3 * 4), (4 * 6 + 3 * 4)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter_ranks(folder):
    return [len(layer.A) for layer in read_adapter(folder).layers.values()]


@pytest.fixture(scope="module")
def finished(tiny_base, alpaca_file, tmp_path_factory):
    """The result of a run whose ranks shrink."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    return train(load_config(run_config(tiny_base, alpaca_file, folder, **SETTINGS)))


def test_the_mean_rank_falls_to_its_share_and_is_reported(finished, tiny_base, tmp_path):
    run = RunDirectory.open(finished.run_dir)
    means = [line["mean_rank"] for line in lines_of(run.path) if "loss" in line]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[-1] == pytest.approx(LAST / 14, abs=1e-4)
    assert sum(adapter_ranks(run.adapter)) == LAST
    assert min(adapter_ranks(run.adapter)) >= 1
    assert [note for note in finished.notes if f"Of {FIRST} components of the adapters {LAST} are left" in note]
    report = {"dtype": "bfloat16"}
    write_card(tmp_path, "release", run, tiny_base, report)
    assert f"rank 6 reduced to {LAST / 14:.4g} on average" in (tmp_path / "README.md").read_text()


def test_a_checkpoint_holds_what_is_left(finished):
    checkpoint = RunDirectory.open(finished.run_dir).list_checkpoints()[-1]
    state = load_file(checkpoint / "ranks.safetensors")
    assert int(state["kept"].sum()) == LAST
    assert sorted(state["kept"].sum(1).tolist()) == sorted(adapter_ranks(checkpoint))
    values = load_file(checkpoint / "parameters.safetensors")
    assert int(sum(B.any(0).sum() for name, B in values.items() if "lora_B" in name)) == LAST


def test_the_ranks_of_other_layers_are_not_restored(finished, tiny_base):
    model, _ = load_base(str(tiny_base))
    add_lora(model, rank=6, rank_pattern={"mlp.*": 4})
    flat = FlatParameters((name, value) for name, value in model.named_parameters() if value.requires_grad)
    layers = [layer for _, layer in lora_layers(model)]
    checkpoint = RunDirectory.open(finished.run_dir).list_checkpoints()[-1]
    ranks = RankBudget(layers[:3], 0.5, 6)
    with pytest.raises(CheckpointError, match="adaptive ranks"):
        load_state(checkpoint, model, make_optimizer("paged_adamw_8bit", flat), ranks)


def kept_by_this_process(config):
    """Train, and return the components that are left on this process, and the trained values."""
    made = []

    class Recorded(RankBudget):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qlora.training.assemble.RankBudget", Recorded)
        train(load_config(config))
    (ranks,) = made
    return ranks.kept.tolist(), [layer.lora_B.float().tolist() for layer in ranks.layers]


@needs_fork
def test_processes_keep_the_same_components(tiny_base, alpaca_file, tmp_path):
    config = str(run_config(tiny_base, alpaca_file, tmp_path / "two", **SETTINGS, train__eval_every=None))
    first, second = call_in_two(kept_by_this_process, config)
    assert first == second
    assert sum(map(sum, first[0])) == LAST


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora__final_rank": 4}, "4 should be below lora.rank"),
        ({"lora__final_rank": 2, "lora__train": "B", "lora__init": "orthogonal"}, "needs lora.train: AB"),
        ({"lora__final_rank": 2, "lora__init": "pissa"}, "set lora.init: eva"),
        ({"lora__final_rank": 2, "lora__kind": "rows", "lora__alpha": 32}, "remove lora.final_rank"),
    ],
)
def test_what_can_not_shrink_is_refused(settings, message, tiny_base, alpaca_file, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
