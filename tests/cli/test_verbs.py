"""Every verb, end to end on a tiny base: what it writes, reports and refuses."""

import json
import os
import re
import shutil
import signal
from datetime import datetime

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.checkpoint import RunDirectory
from qlora.cli.init import recipe_folder
from qlora.config import load_config
from qlora.data import encode_prompt
from qlora.errors import DataError
from qlora.model import answer, load_run
from qlora.training import train as qlora_train
from qlora.training.metrics import MetricsLog
from tests.cli import run
from tests.tiny import run_config, write_jsonl

RECIPES = sorted(path.stem for path in recipe_folder().glob("*.yaml"))
STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_base, alpaca_file):
    """A config that trains the tiny base."""
    return run_config(tiny_base, alpaca_file, tmp_path_factory.mktemp("verbs") / "run")


@pytest.fixture(scope="module")
def trained(config):
    """Return the report of `train --json`."""
    file = config.with_name("report.json")
    report = run("train", config, "train.seed=5", "--json", "--report", file).json()
    assert json.loads(file.read_text()) == report
    return report


@pytest.fixture(scope="module")
def run_dir(config, trained):
    """The run that the other verbs use."""
    return config.with_suffix("")


@pytest.fixture(scope="module")
def merged(run_dir):
    """Return the merged run, and the report of `merge --json`."""
    folder = run_dir.with_name("merged")
    return folder, run("merge", run_dir, "-o", folder, "--json").json()


@pytest.fixture
def asked(monkeypatch):
    """Replace the model's answers by their number; return the conversations that it was asked."""
    seen = []

    def generate(model, tokenizer, messages, max_new_tokens, temperature, **_):
        seen.append(([dict(message) for message in messages], (max_new_tokens, temperature)))
        return f"answer {len(seen)}"

    monkeypatch.setattr("qlora.model.answer", generate)
    return seen


def files_of(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_init_lists_every_recipe_with_its_first_line():
    done = run("init")
    assert done.code == 0
    assert RECIPES
    for name in RECIPES:
        line = next(line for line in done.out.splitlines() if line.split() and line.split()[0] == name)
        first = (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert line.removeprefix(name).strip() == first.removeprefix("# ")


@pytest.mark.parametrize("option", ["-o", "--output"])
def test_init_writes_a_recipe_as_it_is(tmp_path, option):
    target = tmp_path / "new" / "mine.yaml"
    done = run("init", RECIPES[0], option, target)
    assert done.code == 0
    assert done.out == f"Wrote {target}. Next: qlora preview {target}\n"
    assert target.read_bytes() == (recipe_folder() / f"{RECIPES[0]}.yaml").read_bytes()


def test_init_writes_here_by_the_recipes_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("init", RECIPES[-1]).code == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{RECIPES[-1]}.yaml"]


def test_init_overwrites_nothing(tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    done = run("init", RECIPES[0], "-o", target)
    assert done.code == 2
    assert str(target) in done.error()
    assert "-o" in done.error()
    assert target.read_text() == "mine"


@pytest.mark.parametrize("place", ["mine.yaml", "sub/mine.yaml"])
def test_init_into_a_place_that_can_not_be_written_is_reported(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / place
    done = run("init", RECIPES[0], "-o", target)
    assert done.code == 2
    assert f"{target} can't be written: " in done.error()
    assert (tmp_path / "file").read_text() == "mine"


def test_init_names_the_recipes_when_asked_for_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("init", "gpt9")
    assert done.code == 2
    assert "'gpt9'" in done.error()
    assert [name for name in RECIPES if name not in done.error()] == []
    assert list(tmp_path.iterdir()) == []


def test_train_reports_what_the_run_came_to(trained, run_dir):
    assert (trained["run_dir"], trained["status"], trained["steps"]) == (str(run_dir), "finished", STEPS)
    lines = RunDirectory(run_dir).read_metrics()
    assert trained["losses"] == [line["loss"] for line in lines if "loss" in line]
    assert len(trained["losses"]) == STEPS
    assert sorted(map(int, trained["eval_losses"])) == [0, 3, 6]
    assert trained["eval_losses"]["6"] < trained["eval_losses"]["0"]


def test_train_leaves_a_whole_run_behind(trained, run_dir):
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["seed"] == 5
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in (run_dir / "adapter").iterdir()
    }
    assert [path.name for path in RunDirectory(run_dir).list_checkpoints()] == ["step-000003", "step-000006"]


def test_train_again_does_nothing_more(config, trained, run_dir):
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    adapter = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    again = run("train", config, "train.seed=5", "--json").json()
    assert (again["status"], again["steps"], again["losses"]) == ("finished", STEPS, trained["losses"])
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    assert (run_dir / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_train_prints_the_first_and_last_loss_for_people(config, trained):
    done = run("train", config, "train.seed=5")
    assert done.code == 0
    assert "Run finished." in done.out
    assert f"{trained['losses'][0]:.4f} → {trained['losses'][-1]:.4f}" in done.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_train_exits_with_a_shells_code_of_the_signal(tmp_path, tiny_base, alpaca_file, monkeypatch, number, code):
    original = MetricsLog.log_step

    def log_step(self, progress, report):
        original(self, progress, report)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "log_step", log_step)
    done = run("train", run_config(tiny_base, alpaca_file, tmp_path / "run", data__eval=None), "--json")
    assert done.code == code
    report = json.loads(done.out)
    assert (report["status"], report["steps"], report["signal"]) == ("interrupted", 1, number)


@pytest.mark.parametrize("packing", [True, False])
def test_a_dry_run_prints_the_plan_and_writes_nothing(packing, tmp_path, tiny_base, alpaca_file):
    path = run_config(tiny_base, alpaca_file, tmp_path / "run", data__packing=packing)
    before = files_of(tmp_path)
    plan = run("train", path, "--dry-run", "--json").json()
    assert plan["total_steps"] == STEPS
    # Four of 32 examples a step; packed, a row of 128 tokens holds one or two.
    assert (4 <= plan["steps_per_epoch"] < 8) if packing else (plan["steps_per_epoch"] == 8)
    assert (plan["train_examples"], plan["eval_examples"]) == (32, 8)
    assert plan["base_parameters"] > plan["trained_parameters"] > 0
    assert plan["compute_dtype"] in ("bfloat16", "float32")
    done = run("train", path, "--dry-run")
    assert done.code == 0
    assert "nothing was written" in done.out
    assert "40 rows as alpaca" in done.out
    assert re.search(r"^  activation checkpointing  none \(it takes .* stay free\)$", done.out, re.MULTILINE)
    assert re.search(r"^  loss  +plain torch \(the fused cross-entropy is for CUDA\)$", done.out, re.MULTILINE)
    assert not re.search(r"^  [\w ]*why ", done.out, re.MULTILINE)
    assert files_of(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


def test_eval_of_a_run_is_the_loss_that_training_ended_with(run_dir, trained):
    report = run("eval", run_dir, "--json").json()
    assert report["loss"] == pytest.approx(trained["eval_losses"]["6"], rel=1e-3)
    assert report["perplexity"] == pytest.approx(torch.tensor(report["loss"]).exp().item(), rel=1e-4)
    assert report["examples"] == 8
    assert str(run_dir) in report["model"]


def test_eval_of_a_config_is_the_loss_that_training_began_with(config, trained):
    # The run's rows were held out by its own seed.
    seeded = config.with_name("seeded.yaml")
    values = json.loads(config.read_text())
    values["train"]["seed"] = 5
    seeded.write_text(json.dumps(values))
    report = run("eval", seeded, "--json").json()
    assert report["loss"] == pytest.approx(trained["eval_losses"]["0"], rel=1e-3)
    assert report["model"] == values["model"]["base"]


@pytest.mark.parametrize("target", ["run", "config"])
def test_eval_takes_another_file(config, run_dir, tmp_path, target):
    answers = ["tin tin", "moss", "é漢", "moss"]
    data = write_jsonl(tmp_path / "other.jsonl", [{"instruction": "Say", "output": answer} for answer in answers])
    if target == "config":  # training rows that are left out are not left out here
        values = json.loads(config.read_text())
        config = tmp_path / "limited.yaml"
        config.write_text(json.dumps({**values, "data": {**values["data"], "max_rows": 2, "deduplicate": True}}))
    report = run("eval", run_dir if target == "run" else config, "--data", data, "--batch-size", 2, "--json").json()
    num_bytes = sum(len(answer.encode()) for answer in answers)
    assert report["examples"] == 4
    assert report["supervised_tokens"] == num_bytes + 4
    bits = report["loss"] * report["supervised_tokens"] / torch.tensor(2.0).log().item()
    assert report["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)


def test_eval_of_answers_without_text_has_no_bits_per_byte(run_dir, tmp_path):
    data = write_jsonl(tmp_path / "silent.jsonl", [{"instruction": "Say nothing", "output": ""}])
    report = run("eval", run_dir, "--data", data, "--json").json()
    assert (report["examples"], report["supervised_tokens"]) == (1, 1)  # the end token
    assert report["loss"] > 0
    assert report["bits_per_byte"] is None


def test_eval_prints_the_same_numbers_for_people(run_dir):
    report = run("eval", run_dir, "--json").json()
    done = run("eval", run_dir)
    assert f"{report['perplexity']:.6g}" in done.out
    assert f"{report['loss']:.6g}" in done.out


def test_eval_with_nothing_held_out_names_the_remedy(tmp_path, tiny_base, alpaca_file):
    path = run_config(tiny_base, alpaca_file, tmp_path / "run", data__eval=None)
    done = run("eval", path)
    assert done.code == 2
    assert "data.eval" in done.error()
    assert "--data" in done.error()


def test_merge_writes_a_folder_that_transformers_loads_alone(merged, run_dir):
    folder, report = merged
    assert (report["out_dir"], report["run_dir"]) == (str(folder), str(run_dir))
    assert (report["dtype"], report["onto"], report["merged"]) == ("float16", "dequantized", 14)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()) == model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run_dir / "adapter").chat_template


def test_merge_follows_its_options(run_dir, tmp_path):
    folder = tmp_path / "out"
    options = ["--dtype", "float32", "--onto", "original", "--max-shard-size", "200KB"]
    done = run("merge", run_dir, "-o", folder, *options)
    assert done.code == 0
    assert f"Merged 14 layers into {folder}." in done.out
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.float32}
    assert json.loads((folder / "merge_report.json").read_text())["onto"] == "original"


def test_merge_takes_its_defaults_from_the_runs_config(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("dtype: float16", "dtype: bfloat16"))
    assert run("merge", copy, "-o", tmp_path / "out", "--json").json()["dtype"] == "bfloat16"


def test_verify_finds_the_merged_model_to_be_the_runs(merged, run_dir):
    report = run("verify", run_dir, merged[0], "--json").json()
    assert report["matches"]
    assert report["problems"] == []
    assert report["tensors_checked"] == merged[1]["tensors"]
    assert report["mean_kl"] < 0.01
    done = run("verify", run_dir, merged[0])
    assert done.code == 0
    assert f"{merged[0]} is what {run_dir} trained." in done.out


def test_verify_exits_with_1_when_a_weight_is_another(merged, run_dir, tmp_path, seed):
    copy = tmp_path / "copy"
    shutil.copytree(merged[0], copy)
    tensors = load_file(copy / "model.safetensors")
    name = sorted(tensors)[seed % len(tensors)]
    tensors[name].view(-1)[seed % tensors[name].numel()] += 0.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    done = run("verify", run_dir, copy, "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert not report["matches"]
    assert any(name in problem for problem in report["problems"])
    assert "is NOT" in run("verify", run_dir, copy).out


def test_generate_answers_as_the_model_does(run_dir):
    model, tokenizer = load_run(run_dir)
    ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": "Repeat tin 3 times"}])])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    options = ["--prompt", "Repeat tin 3 times", "--max-new-tokens", 12]
    assert run("generate", run_dir, *options, "--json").json() == {"prompt": "Repeat tin 3 times", "answer": answer}
    assert run("generate", run_dir, *options).out == answer + "\n"


def test_generate_takes_a_model_folder(merged):
    report = run("generate", merged[0], "--prompt", "Repeat tin 3 times", "--max-new-tokens", 4, "--json").json()
    assert report["prompt"] == "Repeat tin 3 times"
    assert isinstance(report["answer"], str)


def test_generate_samples_by_its_seed(tiny_base):
    options = ["--prompt", "Hi", "--temperature", 1, "--max-new-tokens", 24]
    first, again, other = (run("generate", tiny_base, *options, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again
    assert first != other


PROMPTS = [
    {"id": 7, "prompt": "Repeat tin 3 times"},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Répète 漢"}], "tags": ["a"]},
    {"instruction": "Repeat", "input": "oak"},
]


def test_generate_answers_a_file_as_it_answers_each_prompt(run_dir, tmp_path):
    prompts, output = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS), tmp_path / "new" / "answers.jsonl"
    options = ["--max-new-tokens", 12, "--system", "Be short."]
    report = run("generate", run_dir, "--prompts", prompts, "-o", output, *options, "--json").json()
    assert report == {"prompts": 3, "output": str(output)}
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    model, tokenizer = load_run(run_dir)
    system, user = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Repeat tin 3 times"}
    conversations = [
        [system, user],
        PROMPTS[1]["messages"],
        [system, {"role": "user", "content": "Repeat\n\noak"}],
    ]
    answers = [answer(model, tokenizer, messages, max_new_tokens=12) for messages in conversations]
    assert rows == [row | {"answer": text} for row, text in zip(PROMPTS, answers, strict=True)]


def test_generate_reads_prompts_from_a_table(tiny_base, tmp_path, asked):
    (tmp_path / "prompts.csv").write_text("id,prompt\n1,Hi\n2,Why?\n")
    output = tmp_path / "answers.jsonl"
    assert run("generate", tiny_base, "--prompts", tmp_path / "prompts.csv", "-o", output).code == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"id": "1", "prompt": "Hi", "answer": "answer 1"},
        {"id": "2", "prompt": "Why?", "answer": "answer 2"},
    ]


def test_generate_names_rows_that_can_not_be_written_before_it_loads_the_model(tmp_path):
    lines, table = tmp_path / "prompts.jsonl", tmp_path / "prompts.parquet"
    lines.write_text('{"prompt": "Hi", "note": "\\ud83d"}\n{"prompt": "Hi", "note": "\\ud83d\\ude42"}\n')
    Dataset.from_dict({"prompt": ["Hi", "Why?"], "at": [datetime(2024, 2, 3), None]}).to_parquet(table)
    for path, place, reason in ((lines, ":1", "half a surrogate pair"), (table, " row 1", "datetime is not JSON")):
        done = run("generate", tmp_path / "no-model", "--prompts", path, "-o", tmp_path / "answers.jsonl")
        assert done.code == 1
        assert "1 row can't be answered:" in done.error()
        assert f"{path}{place}: " in done.error()
        assert reason in done.error()


@pytest.mark.parametrize("unfinished", ["", '{"prompt": "Re'])
def test_generate_continues_an_interrupted_file_with_the_same_answers(tiny_base, tmp_path, monkeypatch, unfinished):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    options = ["--prompts", prompts, "--temperature", 2, "--max-new-tokens", 6]
    assert run("generate", tiny_base, *options, "-o", tmp_path / "whole.jsonl").code == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    output, calls = tmp_path / "answers.jsonl", []

    def interrupted(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(*arguments, **settings)

    monkeypatch.setattr("qlora.model.answer", interrupted)
    done = run("generate", tiny_base, *options, "-o", output)
    assert done.code == 130
    (partial,) = tmp_path.glob("answers.jsonl.*.partial")
    assert "1 of 3 prompts are answered, in " in done.err
    assert partial.name in done.err
    assert partial.read_text() == whole.splitlines(keepends=True)[0]
    assert not output.exists()
    with partial.open("a") as file:
        file.write(unfinished)
    assert run("generate", tiny_base, *options, "--seed", 1, "-o", output).code == 0
    assert len(calls) == 5  # another seed starts over
    output.unlink()
    assert "Continuing after 1 of 3 prompts." in run("generate", tiny_base, *options, "-o", output).err
    assert len(calls) == 7
    assert output.read_text() == whole
    assert list(tmp_path.glob("*.partial")) == []


def test_generate_names_every_bad_row_before_it_loads_the_model(tmp_path):
    rows = [
        PROMPTS[0], {"question": "Why?"}, {"prompt": 3}, {"prompt": "Hi", "answer": "Hello"},
        {"messages": [{"role": "assistant", "content": "Hi"}]}, {"prompt": "Look", "images": ["a.png"]},
    ]  # fmt: skip
    prompts, output = write_jsonl(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    with prompts.open("a") as file:
        file.write("{broken\n")
    done = run("generate", tmp_path / "no-model", "--prompts", prompts, "-o", output)
    assert done.code == 1
    first, *problems = done.error().splitlines()
    assert first == "6 rows can't be answered:"
    assert [f"{prompts}:{number}" in line for number, line in enumerate(problems, start=2)] == [True] * 6
    expected = ["nothing before", "should be text", "already has a column 'answer'", "already an answer", "images"]
    assert [words for words, line in zip(expected, problems, strict=False) if words not in line] == []
    assert not output.exists()


def test_generate_names_the_prompts_that_the_template_refuses(tiny_base, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = refusal + "{% for message in messages %}{{ message.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    done = run("generate", model, "--prompts", prompts, "-o", tmp_path / "answers.jsonl")
    assert done.code == 1
    assert "1 row can't be answered:" in done.error()
    assert f"{prompts}:2: the chat template refuses this conversation: no system" in done.error()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--prompt TEXT or --prompts FILE"),
        (["--prompt", "x", "--prompts", "y"], "--prompt TEXT or --prompts FILE"),
        (["--prompts", "y"], "go together"),
        (["--prompt", "x", "-o", "z"], "go together"),
        (["--prompt", "x", "--top-p", "0.9"], "--temperature above 0"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "1.1"], "--top-p"),
    ],
)
def test_generate_refuses_options_that_do_not_go_together(options, message):
    done = run("generate", "no-model", *options)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())


@pytest.mark.parametrize("place", ["there.jsonl", "there.jsonl/answers.jsonl"])
def test_generate_overwrites_nothing(tmp_path, place):
    (tmp_path / "there.jsonl").write_text("mine")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    done = run("generate", "no-model", "--prompts", prompts, "-o", tmp_path / place)
    assert done.code == 2
    assert str(tmp_path / place) in done.error()
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_generate_samples_from_the_most_likely_tokens_alone(tiny_base):
    options = ["--prompt", "Hi", "--max-new-tokens", 12]
    greedy = run("generate", tiny_base, *options).out
    sampled = [*options, "--temperature", 3, "--seed", 3]
    assert run("generate", tiny_base, *sampled, "--top-p", 0.001).out == greedy
    assert run("generate", tiny_base, *sampled).out != greedy


def test_generate_puts_the_system_message_first(run_dir, asked):
    report = run("generate", run_dir, "--prompt", "Hi", "--system", "Be short.", "--temperature", 0.5, "--json").json()
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert asked == [(messages, (256, 0.5))]
    assert report["answer"] == "answer 1"


def test_chat_keeps_what_was_said_until_it_is_left(run_dir, asked):
    done = run("chat", run_dir, "--max-new-tokens", 7, stdin="One\n\n  Two \n/exit\nThree\n")
    assert done.code == 0
    first, second, third = ({"role": "user", "content": text} for text in ("One", "Two", "Three"))
    assert asked == [
        ([first], (7, 0.7)),
        ([first, {"role": "assistant", "content": "answer 1"}, second], (7, 0.7)),
    ]
    assert third not in [message for messages, _ in asked for message in messages]


def test_chat_forgets_on_reset_and_ends_with_its_input(run_dir, asked):
    done = run("chat", run_dir, stdin="One\n/reset\nTwo")
    assert done.code == 0
    assert [messages for messages, _ in asked] == [[{"role": "user", "content": text}] for text in ("One", "Two")]


def test_chat_starts_over_with_each_system_message(run_dir, asked):
    lines = ["One", "/reset", "Two", "/system  Be kind. ", "Three", "/system", "Four"]
    assert run("chat", run_dir, "--system", "Be short.", stdin="\n".join(lines)).code == 0
    heard = [" / ".join(message["content"] for message in messages) for messages, _ in asked]
    assert heard == ["Be short. / One", "Be short. / Two", "Be kind. / Three", "Four"]


def test_chat_greets_with_model_template_and_commands(run_dir, asked):
    done = run("chat", run_dir, stdin="/help\n/usr/bin is what?")
    greeting, commands, unknown = done.err.splitlines()[-3:]  # after the bar of the weights that load
    assert greeting == f"{run_dir}, chat template: alpaca"
    assert [name for name in ("/exit", "/reset", "/system TEXT", "Ctrl-D") if name not in commands] == []
    assert unknown.startswith("Unknown command /help: /reset ")
    assert [messages[-1]["content"] for messages, _ in asked] == ["/usr/bin is what?"]


def test_chat_continues_after_a_conversation_that_the_template_refuses(run_dir, monkeypatch):
    def refuse(model, tokenizer, messages, *_, **__):
        if messages[0]["role"] == "system":
            raise DataError("no system messages")
        return print([message["content"] for message in messages])

    monkeypatch.setattr("qlora.model.answer", refuse)
    done = run("chat", run_dir, "--system", "Be short.", stdin="One\n/system\nTwo")
    assert done.code == 0
    assert "no system messages\n" in done.err
    assert done.out == "> > > ['Two']\n> "


@pytest.fixture
def without_system(tmp_path, tiny_base):
    """A model whose template leaves system messages out."""
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    text = "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder


LEFT_OUT = "the chat template leaves out this conversation's system turn"


def test_generate_refuses_a_prompt_that_the_template_leaves_out(without_system):
    assert LEFT_OUT in run("generate", without_system, "--prompt", "Hi", "--system", "Be short.").error()
    assert run("generate", without_system, "--prompt", "Hi", "--max-new-tokens", 1).code == 0


def test_chat_refuses_a_system_message_that_the_template_leaves_out(without_system, asked):
    done = run("chat", without_system, "--system", "Be short.", stdin="One\n/system\nTwo")
    assert done.code == 0
    assert LEFT_OUT in done.err
    assert [[message["content"] for message in messages] for messages, _ in asked] == [["Two"]]


def test_chat_shows_the_answer_without_the_prompt(run_dir):
    options = ["--max-new-tokens", 12, "--temperature", 0]
    answer = run("generate", run_dir, "--prompt", "Repeat tin 3 times", *options).out
    done = run("chat", run_dir, *options, stdin="Repeat tin 3 times\n\n")
    assert done.code == 0
    assert done.out.replace("> ", "").strip() == answer.strip()


def test_doctor_shows_versions_hardware_and_what_is_used():
    report = run("doctor", "--json").json()
    assert report["versions"]["torch"] == torch.__version__
    assert report["in_use"]["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    done = run("doctor")
    assert done.code == 0
    # In parentheses is the error of a weight that is drawn each time; free memory changes from one call to the other.
    expected = [torch.__version__, *(text.partition(" (")[0] for text in report["in_use"].values())]
    expected, shown = (re.sub(r"\d+\.\d GiB", "some GiB", text) for text in ("\n".join(expected), done.out))
    assert [text for text in expected.splitlines() if text not in shown] == []
    recipe = re.search(r"^  qlora init (\w+) -o my.yaml", done.out, re.MULTILINE)[1]
    assert recipe in run("init").out
    assert "qlora train my.yaml" in done.out.splitlines()[-1]
    assert report["next"] == [line.strip() for line in done.out.partition("\nnext\n")[2].splitlines()]


def test_a_checkpoint_is_evaluated_merged_and_verified_by_its_path(run_dir, merged, tmp_path):
    checkpoint = run_dir / "checkpoints" / "step-000003"
    final = run("eval", run_dir, "--json").json()["loss"]
    assert run("eval", run_dir / "adapter", "--json").json()["loss"] == final
    assert run("eval", checkpoint, "--json").json()["loss"] > final
    out = tmp_path / "merged"
    assert run("merge", checkpoint, "-o", out, "--json").json()["step"] == 3
    assert "| steps | 3 |" in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == {path.name for path in merged[0].iterdir()}
    assert run("verify", checkpoint, out, "--json").json()["matches"]
    assert run("verify", run_dir / "adapter", merged[0], "--json").json()["matches"]

    done = run("verify", run_dir, out, "--json")
    assert done.code == 1
    assert json.loads(done.out)["problems"] == [
        "it was merged at step 3, but the run's adapter is that of step 6. Merge again, or add --checkpoint 3."
    ]
    for chosen in ("3", "last"):
        done = run("verify", run_dir, out, "--checkpoint", chosen, "--json")
        assert (done.code, chosen) in ((0, "3"), (1, "last"))
    assert run("eval", run_dir, "--checkpoint", "6", "--json").json()["loss"] == final
    assert "keeps none; set train.keep_best" in run("eval", run_dir, "--checkpoint", "best").error()
    assert "should be best, last, or the step" in run("eval", run_dir, "--checkpoint", "-1").error()
    assert "step-000004 does not exist; the checkpoints" in run("eval", run_dir, "--checkpoint", "4").error()
    assert "is not a run's output_dir" in run("eval", checkpoint, "--checkpoint", "3").error()


def test_merge_update_goes_by_the_adapter_and_the_options(run_dir, merged, tmp_path):
    out, checkpoint = tmp_path / "merged", run_dir / "checkpoints" / "step-000003"
    shutil.copytree(merged[0], out)
    before = files_of(out)
    for named in (run_dir, run_dir / "adapter"):
        done = run("merge", named, "-o", out, "--update")
        assert f"{out} already holds this merge: nothing was written." in done.out
        assert files_of(out) == before
    os.utime(checkpoint / "adapter_model.safetensors", (1, 1))  # older than the merge
    bfloat16 = ("--dtype", "bfloat16")
    for number, (named, options) in enumerate([(checkpoint, ()), (checkpoint, bfloat16), (run_dir, bfloat16)], start=1):
        done = run("merge", named, "-o", out, "--update", *options)
        assert f"{out} held another merge: moved it to {out}.old-{number}." in done.err
        assert run("verify", named, out, "--json").json()["matches"]
    assert files_of(tmp_path / "merged.old-1").keys() == {tmp_path / "merged.old-1" / path.name for path in before}
    report = json.loads((out / "merge_report.json").read_text())
    del report["adapter"]  # as 0.1.0 wrote it
    (out / "merge_report.json").write_text(json.dumps(report))
    assert run("verify", run_dir, out, "--json").json()["matches"]
    assert "held another merge" in run("merge", run_dir, "-o", out, "--update", *bfloat16).err


def test_merge_without_update_writes_over_nothing(run_dir, merged):
    before = files_of(merged[0])
    assert (
        "already holds a merge; choose another folder, or add --update"
        in run("merge", run_dir, "-o", merged[0]).error()
    )
    assert files_of(merged[0]) == before


def test_a_checkpoint_of_an_interrupted_run_is_tried_and_merged(config, run_dir, tmp_path):
    """Its tokenizer is made as in training: no adapter/ has it yet."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    record = json.loads((folder / "run.json").read_text()) | {"status": "interrupted", "steps": 3}
    (folder / "run.json").write_text(json.dumps(record))
    checkpoint = folder / "checkpoints" / "step-000003"
    for verb, *arguments in (("generate", "--prompt", "Repeat oak 2 times"), ("merge", "-o", tmp_path / "not")):
        done = run(verb, folder, *arguments)
        assert done.code == 1
        assert done.error() == (
            f"{folder} has not finished. Continue it with qlora train, or name the adapter to use: {checkpoint}."
        )
    then = run("generate", run_dir / "checkpoints" / "step-000003", "--prompt", "Repeat oak 2 times", "--json").json()
    now = run("generate", checkpoint, "--prompt", "Repeat oak 2 times", "--json").json()
    assert now["answer"] == then["answer"]
    run("merge", checkpoint, "-o", tmp_path / "merged")
    assert run("verify", checkpoint, tmp_path / "merged", "--json").json()["matches"]
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter_model.safetensors is missing or damaged" in run("merge", checkpoint, "-o", tmp_path / "no").error()


def test_the_adapter_of_a_finished_run_is_used_while_the_run_is_extended(config, run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    longer = ["train.seed=5", f"train.output_dir={folder}", "train.max_steps=9"]
    assert qlora_train(load_config(config, longer), stop_at=7).status == "interrupted"
    done = run("merge", folder, "-o", tmp_path / "not")
    assert done.code == 1
    assert f"{folder}/checkpoints/step-000007 or {folder}/adapter" in done.error()
    assert run("merge", folder / "adapter", "-o", tmp_path / "merged", "--json").json()["step"] == 6
    assert run("verify", folder / "adapter", tmp_path / "merged", "--json").json()["matches"]


def test_a_checkpoint_that_was_removed_is_named_with_those_that_are_there(run_dir):
    for verb, *arguments in (("eval",), ("verify",), ("generate", "--prompt", "Hi")):
        done = run(verb, run_dir / "checkpoints" / "step-000009", *arguments)
        assert done.code == 1
        assert "step-000009 does not exist; the checkpoints of " in done.error()
        assert "are: step-000003, step-000006." in done.error()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/mine", "merged", "absent"])
def test_a_folder_of_a_run_that_is_no_adapter_is_refused(name, run_dir, tmp_path):
    done = run("verify", run_dir / name)
    assert done.code == 1
    assert f"{run_dir / name} is not a run, its adapter/ or one of its checkpoints" in done.error()
