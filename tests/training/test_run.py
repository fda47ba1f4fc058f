"""A whole run: its training, its files, and what it refuses."""

import json
import os
import shutil
import stat
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import BloomConfig, FalconH1Config, XGLMConfig

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import CheckpointError, ConfigError, DataError, ModelError
from qlora.export import merge
from qlora.files import BaseFiles
from qlora.model import SUPERVISED, StepLoss, load_base, load_run, supervised_loss, take_inventory
from qlora.objectives import SFT
from qlora.proof import verify
from qlora.training import plan_run, session, train
from qlora.training.metrics import MetricsLog
from qlora.training.preview import preview
from tests.tiny import make_base, run_config, write_jsonl

STEP_KEYS = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "tokens_per_second",
    "peak_memory", "zero_update_share", "dead_adapters",
}  # fmt: skip
EVAL_KEYS = {"step", "epoch", "eval_loss", "eval_perplexity", "eval_supervised_tokens"}


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "apart"])
def finished(request, tiny_base, alpaca_file, tmp_path_factory):
    """Return a run of six steps, its result, and its directory."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    return train(load_config(run_config(tiny_base, alpaca_file, folder, data__packing=request.param))), folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(folder):
    return json.loads((folder / "run.json").read_text())


def learn_by(monkeypatch, compute, metrics=()):
    """Replace the loss of later runs, but not in the estimate of their memory."""

    def compute_unless_estimated(model, batch):
        return (SUPERVISED.compute if batch.input_ids.is_meta else compute)(model, batch)

    objective = replace(SFT, loss=replace(SUPERVISED, compute=compute_unless_estimated, metrics=metrics))
    monkeypatch.setattr("qlora.training.assemble.objective_for_data", lambda section, datasets: objective)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_learns(finished):
    result, _ = finished
    assert result.status == "finished"
    assert result.steps == len(result.losses) == 6
    assert result.losses[-1] < result.losses[0] - 0.5
    assert list(result.eval_losses) == [0, 3, 6]
    assert result.eval_losses[6] < result.eval_losses[3] < result.eval_losses[0]
    assert result.tokens_per_second > 0
    assert result.peak_memory > 1e6


def test_every_step_and_evaluation_has_a_line_with_all_keys(finished):
    lines = metrics(finished[1])
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert {frozenset(line) for line in steps} == {frozenset(STEP_KEYS)}
    assert {frozenset(line) for line in evaluations} == {frozenset(EVAL_KEYS)}
    config = load_config(finished[1] / "config.yaml")
    plan = plan_run(config)
    # 32 examples, 4 a step; packed, they are fewer rows.
    assert (plan.steps_per_epoch < 8) if config.data.packing else (plan.steps_per_epoch == 8)
    assert steps[-1]["epoch"] == pytest.approx(6 / plan.steps_per_epoch, abs=1e-6)
    assert steps[-1]["tokens"] > steps[-1]["supervised_tokens"] > steps[0]["supervised_tokens"] > 0
    assert [line["zero_update_share"] is None for line in steps] == [True] + [False] * 5
    assert all(0 <= line["zero_update_share"] < 0.5 for line in steps[1:])
    assert steps[0]["learning_rate"] < steps[1]["learning_rate"] > steps[5]["learning_rate"] > 0


def test_the_first_evaluation_is_that_of_the_bare_base(finished, tiny_base):
    from qlora.data import eval_batches
    from qlora.layers import use_document_attention
    from qlora.model import datasets_from_section, evaluate

    model, tokenizer = load_base(str(tiny_base))
    config = load_config(finished[1] / "config.yaml")
    examples = datasets_from_section(config.data, tokenizer, config.train.seed).eval
    capacity = config.data.max_seq_len if config.data.packing else None
    if config.data.packing:
        use_document_attention(model)
    assert evaluate(model, eval_batches(examples, 2, capacity)).loss == pytest.approx(
        finished[0].eval_losses[0], rel=1e-6
    )


def test_run_json_records_where_the_run_came_from(finished, tiny_base):
    values = record(finished[1])
    assert values["status"] == "finished"
    assert values["steps"] == values["total_steps"] == 6
    assert values["versions"]["torch"] == torch.__version__
    assert {"python", "qlora", "bitsandbytes", "transformers", "accelerate"} <= values["versions"].keys()
    assert values["base"]["name"] == str(tiny_base)
    assert values["base"]["files"] == BaseFiles.resolve(str(tiny_base)).fingerprint()
    assert values["quantization"] == {
        "kind": "nf4", "double_quant": True, "block_size": 64, "from_4bit_checkpoint": False, "experts": None,
    }  # fmt: skip
    assert values["seed"] == 0
    assert values["examples"] == {"train": 32, "eval": 8}
    assert values["continued_from"] is None
    assert values["in_use"]["optimizer"] == "paged_adamw_8bit"
    assert values["in_use"]["rounding"] == "stochastic"
    assert values["in_use"]["recompute"] == "none"
    packing = load_config(finished[1] / "config.yaml").data.packing
    fill = values["in_use"]["packing_fill"]
    assert 0.5 < fill <= 1 if packing else fill is None


def test_run_json_has_the_share_that_is_quantized_and_the_names_of_the_rest(finished, tiny_base):
    inventory = take_inventory(load_base(str(tiny_base))[0])
    parameters = record(finished[1])["parameters"]
    assert parameters["quantized_share"] == parameters["adapted_share"] == inventory.quantized_share
    assert inventory.quantized_share == 1
    assert parameters["quantized"] == parameters["adapted"] == inventory.quantized
    assert parameters["unquantized"] == inventory.unquantized
    assert "lm_head.weight" in parameters["unquantized"]


def test_the_resolved_config_is_in_the_run(finished, tiny_base):
    values = yaml.safe_load((finished[1] / "config.yaml").read_text())
    assert values["model"]["base"] == str(tiny_base)
    assert values["lora"]["targets"] == "all-linear"  # a default, written out
    assert load_config(finished[1] / "config.yaml").train.max_steps == 6


def test_the_adapter_comes_with_tokenizer_and_template(finished):
    names = {path.name for path in (finished[1] / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    model, tokenizer = load_run(finished[1])
    assert tokenizer.chat_template
    saved = load_file(finished[1] / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).lora_B, saved[f"base_model.model.{name}.lora_B.weight"])
    assert not model.training


def test_the_loss_is_drawn(finished):
    pytest.importorskip("matplotlib")
    assert (finished[1] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    result, folder = finished
    before = contents(folder)
    monkeypatch.setattr(session, "run_loop", None)
    again = train(load_config(folder / "config.yaml"))
    assert (again.status, again.steps, again.losses) == ("finished", 6, result.losses)
    assert again.eval_losses == result.eval_losses
    assert contents(folder) == before


def test_a_finished_run_continues_when_it_is_given_more_steps(tiny_base, alpaca_file, tmp_path):
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=2))
    first = train(config)
    longer = train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=4)))
    assert longer.steps == 4
    assert longer.losses[:2] == first.losses
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    assert record(tmp_path / "run")["continued_from"].endswith("step-000002")


def test_a_finished_run_without_checkpoints_is_not_trained_again(finished, tmp_path):
    _, folder = finished
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoints"))
    config = load_config(folder / "config.yaml", [f"train.output_dir={copy}", "train.max_steps=8"])
    before = contents(copy)
    for start in (train, plan_run):
        with pytest.raises(ConfigError, match="no checkpoint to continue"):
            start(config)
    assert contents(copy) == before


@pytest.mark.parametrize(("keep", "expected"), [(1, [6]), (2, [4, 6]), (9, [2, 4, 6])])
def test_as_many_checkpoints_are_kept_as_asked_for(keep, expected, tiny_base, alpaca_file, tmp_path):
    settings = {"train__save_every": 2, "train__keep_checkpoints": keep, "train__eval_every": None}
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == [f"step-{step:06d}" for step in expected]


def test_lines_have_the_configured_interval_and_the_last_step_has_one(tiny_base, alpaca_file, tmp_path):
    settings = {"train__max_steps": 5, "train__log_every": 2, "data__eval": None}
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2, 4, 5]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulation_makes_no_difference_to_a_run(dtype, packing, tiny_base, alpaca_file, tmp_path):
    losses = []
    for micro in (1, 4):
        settings = {"train__micro_batch_size": micro, "train__gradient_accumulation_steps": 4 // micro}
        settings["data__packing"] = packing
        config = run_config(
            tiny_base, alpaca_file, tmp_path / str(micro), model__compute_dtype=dtype, lora__dtype="float32",
            train__optimizer="adamw_32bit", **settings,
        )  # fmt: skip
        losses.append(train(load_config(config)).losses)
    # In bf16, padding makes other products: 2^-8 each, in the mean of many.
    assert losses[0] == pytest.approx(losses[1], rel={"float32": 1e-4, "bfloat16": 2**-7}[dtype])


@pytest.mark.parametrize("packing", [True, False])
def test_a_plan_writes_nothing_and_describes_the_run(packing, tiny_base, alpaca_file, tmp_path):
    settings = {"train__max_steps": None, "data__packing": packing}
    plan = plan_run(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    # Of 128 tokens a row holds one document or two.
    assert plan.total_steps == plan.steps_per_epoch
    assert (4 <= plan.steps_per_epoch < 8) if packing else (plan.steps_per_epoch == 8)
    assert (len(plan.datasets.train), len(plan.datasets.eval)) == (32, 8)
    assert plan.in_use.compute_dtype in ("bfloat16", "float32")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_leaves_the_state_before_it(tiny_base, alpaca_file, tmp_path, monkeypatch):
    calls = []

    def fail_in_step_four(model, batch):
        calls.append(model.training)
        return StepLoss(supervised_loss(model, batch) * (float("nan") if sum(calls) > 6 else 1))

    learn_by(monkeypatch, fail_in_step_four)
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run"))
    with pytest.raises(ModelError, match="Step 4: the loss is nan"):
        train(config)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3]
    monkeypatch.undo()
    result = train(config)
    assert result.status == "finished"
    assert len(result.losses) == 6


def test_running_out_of_memory_in_an_evaluation_is_one_message_and_the_run_continues(
    tiny_base, alpaca_file, tmp_path, monkeypatch
):
    config = load_config(
        run_config(
            tiny_base, alpaca_file, tmp_path / "run", train__max_steps=4, train__save_every=1, train__eval_every=2
        )
    )
    original, calls = session.evaluate, []

    def evaluate(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return original(*arguments)

    monkeypatch.setattr(session, "evaluate", evaluate)
    with pytest.raises(ModelError, match=r"Memory ran out after step 2, in an evaluation.*no room"):
        train(config)
    result = train(config)
    assert result.status == "finished"
    assert sorted(result.eval_losses) == [0, 2, 4]


def test_a_quantized_and_a_plain_base_are_trained_alike(tiny_base, alpaca_file, tmp_path):
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", model__quantization="none")
    result = train(load_config(config))
    assert result.losses[-1] < result.losses[0]
    assert record(tmp_path / "run")["parameters"]["quantized"] == []


def test_a_run_with_other_settings_is_not_written_over(finished):
    before = contents(finished[1])
    changed = ["lora.rank=8", "train.learning_rate=0.02"]
    message = r"lora\.rank: 4 → 8\n  train\.learning_rate: 0\.01 → 0\.02\n.*--fresh.*train\.output_dir"
    with pytest.raises(ConfigError, match=message):
        train(load_config(finished[1] / "config.yaml", changed))
    with pytest.raises(ConfigError, match="--resume never was replaced by --fresh"):
        train(load_config(finished[1] / "config.yaml"), resume="never")
    with pytest.raises(ConfigError, match="can't be combined"):
        train(load_config(finished[1] / "config.yaml"), resume=str(finished[1]), fresh=True)
    assert contents(finished[1]) == before


def test_a_fresh_run_keeps_the_old_one_under_another_name(tiny_base, alpaca_file, tmp_path):
    settings = {"train__max_steps": 2, "data__eval": None}
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
    assert train(config, fresh=True).trained_steps == 2  # without an old run it just starts
    kept = [contents(tmp_path / "run")]
    other = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__learning_rate=2e-2, **settings))
    with pytest.raises(ConfigError, match="other settings"):
        train(other)
    assert plan_run(other, fresh=True).notes == [f"The run in {tmp_path / 'run'} would be kept under another name."]
    assert contents(tmp_path / "run") == kept[0]  # a dry run moves nothing
    assert train(other, fresh=True).trained_steps == 2
    kept.append(contents(tmp_path / "run"))
    assert train(other, fresh=True).trained_steps == 2
    for number, files in enumerate(kept, start=1):
        old = tmp_path / f"run.old-{number}"
        assert {path.relative_to(old): data for path, data in contents(old).items()} == {
            path.relative_to(tmp_path / "run"): data for path, data in files.items()
        }
        merge(old, tmp_path / f"merged-{number}")


def test_a_fresh_run_that_can_not_start_leaves_the_old_one_in_place(tiny_base, alpaca_file, tmp_path):
    settings = {"train__max_steps": 2, "data__eval": None}
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    before = contents(tmp_path / "run")
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", lora__targets=["q_prj"], **settings)
    with pytest.raises(ModelError, match="q_prj"):
        train(load_config(config), fresh=True)
    assert contents(tmp_path / "run") == before


def test_a_finished_run_is_reported_and_keeps_its_numbers(finished):
    first, folder = finished
    before = contents(folder)
    changed = ["train.keep_checkpoints=1", "export.dtype=bfloat16", f"train.output_dir={folder}/."]
    result = train(load_config(folder / "config.yaml", changed))
    assert plan_run(load_config(folder / "config.yaml", changed)).notes == result.notes
    assert (result.status, result.steps, result.trained_steps) == ("finished", 6, 0)
    assert (result.losses, result.eval_losses) == (first.losses, first.eval_losses)
    assert result.tokens_per_second == first.tokens_per_second
    assert result.peak_memory == max(line.get("peak_memory", 0) for line in metrics(folder))
    assert "Already finished at step 6; nothing was trained" in result.notes[0]
    assert "train.max_steps" in result.notes[0]
    assert "--fresh" in result.notes[0]
    assert result.notes[1].endswith(": export.dtype: float16 → bfloat16; train.keep_checkpoints: 2 → 1.")
    with pytest.raises(CheckpointError, match="no checkpoint or run was found there"):
        train(load_config(folder / "config.yaml"), resume=str(folder / "checkpoints" / "absent"))
    assert contents(folder) == before


def test_a_run_that_is_extended_to_its_own_length_is_finished(tiny_base, alpaca_file, tmp_path):
    """By epochs instead of steps, whose number is known only after the data is read."""
    settings = {"data__eval": None, "data__packing": False, "train__micro_batch_size": 4}
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=5, **settings)))
    before = contents(tmp_path / "run")
    result = train(load_config(tmp_path / "run" / "config.yaml", ["train.max_steps=null"]))  # one epoch: 5 steps
    assert result.trained_steps == 0
    assert "Already finished at step 5" in result.notes[0]
    assert contents(tmp_path / "run") == before


def test_a_jump_of_the_learning_rate_is_reported_before_training(tiny_base, alpaca_file, tmp_path, capsys):
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=4, data__eval=None)
    train(load_config(config))
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    shutil.copytree(tmp_path / "run", tmp_path / "constant")
    capsys.readouterr()

    train(load_config(config, ["train.max_steps=6"]), show_progress=True)
    lines = capsys.readouterr().err.splitlines()
    after = metrics(tmp_path / "run")[4]["learning_rate"]
    assert after > 1.3 * rates[-1]
    (jump,) = (number for number, line in enumerate(lines) if "learning rate jumps" in line)
    assert f"from {rates[-1]:.3g} at step 4 to {after:.3g} at step 5" in lines[jump]
    assert "now spans 6 steps instead of 4" in lines[jump]
    assert "train.lr_scheduler=constant" in lines[jump]
    assert "train.min_learning_rate" in lines[jump]
    assert jump < min(number for number, line in enumerate(lines) if "  step " in line)

    # The remedy that it names.
    constant = [f"train.output_dir={tmp_path / 'constant'}", "train.max_steps=6", "train.lr_scheduler=constant"]
    overrides = [*constant, f"train.learning_rate={rates[-1]:.3g}", "train.warmup_ratio=0"]
    assert not any("jumps" in note for note in train(load_config(config, overrides), stop_at=5).notes)
    assert train(load_config(config, overrides)).status == "finished"
    found = [line["learning_rate"] for line in metrics(tmp_path / "constant")]
    assert found[4:] == pytest.approx([rates[-1]] * 2, rel=1e-2)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_follow_the_umask(mask, tiny_base, alpaca_file, tmp_path):
    before = os.umask(mask)
    try:
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=1, data__eval=None)))
        merge(tmp_path / "run", tmp_path / "merged")
    finally:
        os.umask(before)
    for folder in (tmp_path / "run", tmp_path / "merged"):
        for path in folder.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_an_interrupted_run_says_how_it_continues(tiny_base, alpaca_file, tmp_path):
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", data__eval=None))
    result = train(config, stop_at=2)
    assert result.notes == ["Stopped at step 2 of 6. The same command continues the run from its last save."]
    assert result.as_dict()["trained_steps"] == 2
    fresh = train(config, stop_at=1, fresh=True)
    moved, stopped = fresh.notes
    assert moved == f"The run in {tmp_path / 'run'} was moved to {tmp_path / 'run.old-1'}."
    assert stopped == "Stopped at step 1 of 6. The same command without --fresh continues the run from its last save."
    assert train(config).trained_steps == 5


def test_errors_come_before_anything_is_written(tiny_base, alpaca_file, tmp_path):
    for settings, error in (
        ({"lora__targets": ["q_prj"]}, ModelError),
        ({"data__train": str(tmp_path / "nowhere.jsonl")}, ConfigError),
        ({"data__max_seq_len": 8}, DataError),
    ):
        config = run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)
        with pytest.raises(error):
            train(load_config(config))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_subsets_of_layers_are_trained_alone(tied, alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, tie_word_embeddings=tied)
    config = run_config(base, alpaca_file, tmp_path / "run", lora__targets=["q_proj", "model.layers.1.mlp.up_proj"])
    assert train(load_config(config)).status == "finished"
    assert record(tmp_path / "run")["parameters"]["adapted"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_the_public_train_stays_a_function():
    """`qlora.train` is a package too, and Python sets that name on its first import."""
    import qlora

    for _ in range(2):
        assert callable(qlora.train)


def test_processes_that_accelerate_did_not_join_are_reported(tiny_base, alpaca_file, tmp_path, monkeypatch):
    """Each would train the whole run and write into one directory."""
    Accelerator(cpu=True)  # has looked at the environment already, and found one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2 processes, but accelerate joined 1"):
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_fewer_steps_than_were_done_are_refused(finished):
    before = contents(finished[1])
    for start in (train, plan_run):
        with pytest.raises(ConfigError, match=r"has done 6 steps already, more than the 4 of the config"):
            start(load_config(finished[1] / "config.yaml", ["train.max_steps=4"]))
    assert contents(finished[1]) == before


def test_an_id_without_an_embedding_is_reported_before_training(alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, vocab_size=257)  # the end token's id is 257
    with pytest.raises(DataError, match="has id 257, but the model embeds 257 tokens"):
        train(load_config(run_config(base, alpaca_file, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["train", "eval"])
def test_an_example_longer_than_the_models_positions_is_reported_before_training(where, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, max_position_embeddings=40)
    fitting = write_jsonl(tmp_path / "fitting.jsonl", [{"text": "a" * 38}] * 4)
    longer = write_jsonl(tmp_path / "longer.jsonl", [{"text": "a"}, {"text": "a" * 39}])
    sources = {"data__train": str(fitting), "data__eval": str(fitting), f"data__{where}": str(longer)}
    config = run_config(base, fitting, tmp_path / "run", **sources, train__max_steps=1)
    with pytest.raises(DataError, match="longest example has 41 tokens, .* has positions for 40"):
        train(load_config(config))
    assert not (tmp_path / "run").exists()
    assert plan_run(load_config(config, [f"data.{where}={fitting}"])).total_steps == 1


@pytest.mark.parametrize(("installed", "name", "message"), [
    (["tensorboard"], "tensorbord", "'tensorbord' is unknown; accelerate has .*tensorboard"),
    ([], "tensorboard", "tensorboard is not installed; run pip install tensorboard"),
])  # fmt: skip
def test_an_unavailable_tracker_is_reported(installed, name, message, tiny_base, alpaca_file, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: installed)
    with pytest.raises(ConfigError, match=rf"train\.trackers: {message}"):
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__trackers=[name])))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", [train, plan_run])
@pytest.mark.parametrize("mine", ["config.yaml", "adapter/adapter_config.json", "checkpoints/mine"])
def test_a_folder_with_something_else_in_it_is_not_taken_for_a_run(mine, call, tiny_base, alpaca_file, tmp_path):
    path = tmp_path / "run" / mine
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"no run\.json, so it is not a run"):
        call(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run")))
    assert contents(tmp_path / "run") == {path: b"mine"}


def test_an_output_directory_that_is_a_file_is_reported(tiny_base, alpaca_file, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match=r"train\.output_dir: .*run is a file"):
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run")))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("name", ["adapter", "checkpoints"])
def test_a_file_where_a_run_has_a_folder_is_reported(name, finished, tmp_path):
    folder = shutil.copytree(finished[1], tmp_path / "run", ignore=shutil.ignore_patterns(name))
    (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"train\.output_dir: .*{name} is a file"):
        train(load_config(folder / "config.yaml", [f"train.output_dir={folder}"]))
    assert (folder / name).read_text() == "mine"


def test_a_plan_for_the_directory_of_another_run_is_refused(finished):
    before = contents(finished[1])
    with pytest.raises(ConfigError, match=r"lora\.rank: 4 → 8"):
        plan_run(load_config(finished[1] / "config.yaml", ["lora.rank=8"]))
    assert contents(finished[1]) == before


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tiny_base, alpaca_file, tmp_path, monkeypatch):
    """A killed process has written all that it logged."""
    original, found = MetricsLog._write, []

    def write(self, values):
        original(self, values)
        found.append(metrics(tmp_path / "run")[-1] == values)

    monkeypatch.setattr(MetricsLog, "_write", write)
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=2)))
    assert found == [True] * 4  # two steps, and an evaluation before and after


def test_a_run_with_relative_paths_is_found_again_from_another_folder(tiny_base, alpaca_file, tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    (here / "base").symlink_to(tiny_base)
    (here / "rows.jsonl").symlink_to(alpaca_file)
    (here / "mine.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
                                     "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    settings = {
        "model__base": "base", "data__train": "rows.jsonl", "data__eval": "rows.jsonl",
        "data__chat_template": "mine.jinja", "data__cache_dir": "cache",
        "train__output_dir": "run", "train__max_steps": 1,
    }  # fmt: skip
    config = load_config(run_config(tiny_base, alpaca_file, here / "run", **settings))
    monkeypatch.chdir(here)
    train(config)
    monkeypatch.chdir(elsewhere)
    values = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert values["model"]["base"] == str(here / "base")
    assert values["data"]["train"] == values["data"]["eval"]
    assert [source["path"] for source in values["data"]["train"]] == [str(here / "rows.jsonl")]
    assert values["data"]["cache_dir"] == str(here / "cache")
    assert values["data"]["chat_template"] == str(here / "mine.jinja")
    assert load_run("../here/run")[1].chat_template.startswith("{% for m in messages %}<{{ m.role }}>")
    merge("../here/run", "out")
    assert verify("../here/run", "out").matches
    assert sorted(path.name for path in elsewhere.iterdir()) == ["out"]


def test_a_tilde_is_the_home(tiny_base, alpaca_file, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    (home / "base").symlink_to(tiny_base)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    settings = {"model__base": "~/base", "train__output_dir": "~/run", "train__max_steps": 1}
    result = train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    assert result.run_dir == home / "run"
    assert yaml.safe_load((home / "run" / "config.yaml").read_text())["model"]["base"] == str(home / "base")
    merge("~/run", "~/out")
    assert verify("~/run", "~/out").matches
    assert {path.name for path in home.iterdir()} == {"base", "run", "out"}
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(("every", "evaluated"), [(1.0, [0, 2]), (1, [0, 1, 2])])
def test_one_point_zero_is_the_whole_run_and_one_is_each_step(every, evaluated, tiny_base, alpaca_file, tmp_path):
    settings = {"train__max_steps": 2, "train__eval_every": every}
    result = train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    assert list(result.eval_losses) == evaluated


def test_a_step_that_overflows_is_skipped_and_has_no_norm(tiny_base, alpaca_file, tmp_path, monkeypatch):
    calls = []

    def overflow_in_step_two(model, batch):
        calls.append(batch)
        loss = supervised_loss(model, batch)
        if len(calls) in (3, 4):
            loss.register_hook(lambda grad: grad * float("inf"))
        return StepLoss(loss)

    learn_by(monkeypatch, overflow_in_step_two)
    settings = {"model__compute_dtype": "float16", "train__max_steps": 3, "data__eval": None}
    result = train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))
    assert (result.status, len(result.losses)) == ("finished", 3)
    lines = metrics(tmp_path / "run")
    assert [line["grad_norm"] is None for line in lines] == [False, True, False]
    shares = [line["zero_update_share"] for line in lines]
    assert shares[0] is None
    assert shares[1] == shares[2] < 1  # of the first step's update, the last there was


FALCON = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
FALCON["initializer_range"] = 0.5  # logits large enough that a factor shows


def test_a_run_that_can_not_have_the_right_loss_is_refused(tiny_base, alpaca_file, tmp_path, monkeypatch):
    """The architecture computes its logits by another formula than its config tells."""
    monkeypatch.setattr("qlora.model.loss.logit_transform", lambda _config: (0.25, None))
    with pytest.raises(ModelError, match="LlamaForCausalLM computes its logits"):
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=1)))
    assert not (tmp_path / "run").exists()


def test_layers_whose_weight_is_read_are_left_and_named(alpaca_file, tmp_path, seed):
    """Falcon H1 has a state and attention in every layer, and multiplies its logits by a key of its own."""
    base = make_base(tmp_path / "base", seed, FalconH1Config, lm_head_multiplier=0.25, **FALCON)
    path = run_config(base, alpaca_file, tmp_path / "run", train__max_steps=1, model__compute_dtype="float32")
    with pytest.raises(ModelError, match="'out_proj' is model.layers.0.mamba.out_proj, whose weight"):
        plan_run(load_config(path, ["lora.targets=[out_proj]"]))
    assert "their weights: 2 × out_proj" in plan_run(load_config(path)).summary()
    train(load_config(path))
    values = record(tmp_path / "run")
    left = [f"model.layers.{layer}.mamba.out_proj" for layer in (0, 1)]
    assert values["parameters"]["read_directly"] == left
    assert not {*left} & {*values["parameters"]["adapted"], *values["parameters"]["quantized"]}
    assert values["in_use"]["states"] == {"FalconH1Mixer": "documents"}
    assert values["in_use"]["packing_fill"] > 0.5


def test_a_run_whose_every_step_overflows_is_not_finished(tiny_base, alpaca_file, tmp_path, monkeypatch):
    def overflow(model, batch):
        loss = supervised_loss(model, batch)
        loss.register_hook(lambda grad: grad * float("inf"))
        return StepLoss(loss)

    learn_by(monkeypatch, overflow)
    settings = {"model__compute_dtype": "float16", "train__max_steps": 3, "data__eval": None}
    with pytest.raises(ModelError):
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)))


def test_a_run_reports_its_rows_and_what_it_uses(tiny_base, alpaca_file, tmp_path, capsys):
    settings = {"data__max_seq_len": 60, "train__max_steps": 1, "data__eval": None}
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings)), show_progress=True)
    message = capsys.readouterr().err
    report = RunDirectory(tmp_path / "run").read_record().data[0]
    assert report["overlong"]["dropped"] + report["examples"] == report["rows"] == 40
    assert f"40 rows as alpaca, {report['examples']} examples" in message
    assert f"{report['overlong']['dropped']} documents dropped because of max_seq_len" in message
    assert "in 4 bits" in message
    assert "not paged" in message


def test_metrics_of_a_loss_are_logged_by_name_in_training_and_evaluation(tiny_base, alpaca_file, tmp_path, monkeypatch):
    def compute(model, batch):
        total = supervised_loss(model, batch)
        return StepLoss(total, {"half": total / 2})

    learn_by(monkeypatch, compute, ("half",))
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=2)))
    for line in metrics(tmp_path / "run"):
        prefix = "eval_" * ("eval_loss" in line)
        assert line[f"{prefix}half"] == pytest.approx(line[f"{prefix}loss"] / 2)
        assert line.keys() == {f"{prefix}half"} | (EVAL_KEYS if prefix else STEP_KEYS)


def test_the_record_says_what_was_in_use_at_the_end(tiny_base, alpaca_file, tmp_path, monkeypatch):
    calls = []

    def run_out_in_step_two(model, batch):
        calls.append(model.training)
        if 2 < sum(calls) <= 4:  # twice: the weight cache goes, then the level of recomputation rises
            raise torch.OutOfMemoryError("no room")
        return StepLoss(supervised_loss(model, batch))

    learn_by(monkeypatch, run_out_in_step_two)
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=3))
    planned = plan_run(config).in_use
    assert (planned.recompute, planned.micro_batch_parts) == ("none", 1)
    assert planned.weights_kept > 0
    assert train(config).status == "finished"
    assert len([line for line in metrics(tmp_path / "run") if "out_of_memory" in line]) == 2
    found = RunDirectory(tmp_path / "run").read_record().in_use
    changed = {"recompute": "mlp", "weights_kept": 0, "memory": found.memory, "recompute_why": found.recompute_why}
    assert found == replace(planned, **changed)


def test_packed_or_not_an_epoch_is_the_same_tokens(tiny_base, alpaca_file, tmp_path):
    """Rows are as long as all examples together, so that a step is an epoch: the same window, packed or not."""
    results = []
    for packing in (True, False):
        config = run_config(
            tiny_base, alpaca_file, tmp_path / str(packing), data__packing=packing, data__max_seq_len=128,
            train__gradient_accumulation_steps=20, train__max_steps=3, model__compute_dtype="float32",
            lora__dtype="float32", train__optimizer="adamw_32bit",
        )  # fmt: skip
        results.append(train(load_config(config)))
    packed, apart = results
    assert packed.losses == pytest.approx(apart.losses, rel=1e-4)
    assert list(packed.eval_losses.values()) == pytest.approx(list(apart.eval_losses.values()), rel=1e-4)
    lines = [metrics(tmp_path / str(packing))[-1] for packing in (True, False)]
    assert lines[0]["eval_supervised_tokens"] == lines[1]["eval_supervised_tokens"]


XGLM = {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
MIXING = "XGLMForCausalLM lets documents packed into one sequence change each other"


@pytest.mark.parametrize(
    ("config_class", "sizes", "text", "reason"),
    [
        (XGLMConfig, XGLM, "aaaaaaaa", MIXING),
        (XGLMConfig, XGLM, "abcddcba", MIXING),  # a palindrome must not hide it
        (BloomConfig, {"n_layer": 2, "n_head": 4}, "aaaaaaaa", "BloomForCausalLM takes no positions"),
    ],
)
def test_a_base_that_mixes_packed_documents_is_not_packed(config_class, sizes, text, reason, tmp_path, seed):
    """The run says so, records it, and is continued without packing. To insist on packing is an error."""
    base = make_base(tmp_path / "base", seed, config_class, **sizes)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text}] * 4)
    settings = {"data__eval": None, "train__max_steps": 2, "train__save_every": 1}
    path = run_config(base, data, tmp_path / "run", **settings)
    with pytest.raises(ModelError, match=rf"{reason}.* set data\.packing: auto, which then does"):
        train(load_config(path, ["data.packing=true"]))
    assert not (tmp_path / "run").exists()
    for stop_at in (1, None):
        result = train(load_config(path), stop_at=stop_at)
        values = record(tmp_path / "run")
        assert values["in_use"]["unpacked_why"].startswith(reason)
        assert values["in_use"]["packing_fill"] is None
        assert any(f"not packed, because {reason}" in note for note in values["data"][0]["notes"])
    plain = train(load_config(run_config(base, data, tmp_path / "plain", data__packing=False, **settings)))
    assert result.losses == plain.losses
    previewed = preview(load_config(path))
    assert (previewed.packing_fill is None) == (config_class is BloomConfig)  # the other shows only with weights
    assert any("not packed" in note for note in previewed.reports[0].notes) == (config_class is BloomConfig)


def test_several_sources_are_trained_on_by_their_weights(tiny_base, alpaca_file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"row {number}"} for number in range(8)])
    sources = [{"path": str(alpaca_file), "weight": 0.5}, {"path": str(other), "weight": 2, "format": "text"}]
    config = run_config(
        tiny_base, alpaca_file, tmp_path / "run", data__train=sources, data__eval=str(other), train__max_steps=1
    )
    assert train(load_config(config)).status == "finished"
    values = record(tmp_path / "run")
    assert [(each["format"], each["examples"], each["drawn"]) for each in values["data"]] == [
        ("alpaca", 40, 20), ("text", 8, 16), ("text", 8, 8),
    ]  # fmt: skip
    assert values["examples"] == {"train": 36, "eval": 8}


def test_rows_of_another_objective_are_refused_with_the_remedy(tiny_base, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}] * 4)
    with pytest.raises(ConfigError, match=r"can't learn from the preference rows of .*set data.format: chosen"):
        train(load_config(run_config(tiny_base, data, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stop_at", [0, 2, 3])
def test_a_step_to_stop_at_that_is_past_is_refused(stop_at, tiny_base, alpaca_file, tmp_path):
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", data__eval=None))
    assert train(config, stop_at=3).steps == 3
    with pytest.raises(ConfigError, match=f"stop_at: {stop_at} should be after step 3"):
        train(config, stop_at=stop_at)
    assert train(config, stop_at=4).steps == 4
