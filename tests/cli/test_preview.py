"""`qlora preview`: what it shows, as text, as JSON and as a page in a real browser."""

import json
import re
import shutil
import subprocess

import pytest
from transformers import GPT2Config

from qlora.config import load_config
from qlora.training import train
from tests.cli import run
from tests.moe import make_moe
from tests.tiny import make_base, run_config, write_jsonl

CHROMIUM = shutil.which("chromium")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
HEADLESS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


@pytest.fixture
def config(tmp_path, tiny_base, alpaca_file):
    return run_config(tiny_base, alpaca_file, tmp_path / "run")


def rows_file(tmp_path, *rows):
    return write_jsonl(tmp_path / "mine.jsonl", list(rows))


def test_supervised_text_is_in_brackets(config, tmp_path):
    data = rows_file(tmp_path, {"instruction": "How?", "output": "So [it] is."})
    shown = run("preview", config, f"data.train={data}", "data.eval=null", "-n", "1").out
    assert "### Response:\n⟦So [it] is.</s>⟧" in shown
    assert shown.count("⟦") == shown.count("⟧") == 1 + 1  # the key, and the answer


def test_samples_join_to_what_is_trained(config):
    report = run("preview", config, "-n", "3", "--json").json()
    assert len(report["samples"]) == 3
    for sample in report["samples"]:
        text = "".join(piece["text"] for piece in sample["pieces"])
        learnt = "".join(piece["text"] for piece in sample["pieces"] if piece["weight"])
        word, count = re.search(r"Repeat (\w+) (\d+) times", text).groups()
        assert learnt == " ".join([word] * int(count)) + "</s>"
        assert sample["num_supervised"] == len(learnt.encode()) - len("</s>") + 1


def test_it_shows_the_run_that_training_makes(config):
    report = run("preview", config, "--json").json()
    settings = load_config(config)
    train(settings)
    record = json.loads((config.with_suffix("") / "run.json").read_text())
    assert report["total_steps"] == record["total_steps"]
    assert [report["train_examples"], report["eval_examples"]] == [
        record["examples"]["train"],
        record["examples"]["eval"],
    ]
    assert [one["digest"] for one in report["reports"]] == [one["digest"] for one in record["data"]]
    assert round(report["packing_fill"], 4) == record["in_use"]["packing_fill"]


def test_a_template_by_name_is_shown_with_the_tokens_that_it_lacks(config):
    shown = run("preview", config, "data.chat_template=llama3", "data.max_seq_len=512").out
    assert "chat template: llama3 (by name)" in shown
    assert 'set data.new_tokens: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]' in shown


def test_an_unknown_template_is_one_error_with_the_closest_name(config):
    message = run("preview", config, "data.chat_template=llama-3").error()
    assert "'llama-3' is neither a jinja file nor a template's name; did you mean llama3" in message


def test_bad_rows_are_shown_and_the_rest_is_too(config, tmp_path):
    data = rows_file(tmp_path, {"instruction": "a", "output": "b"}, {"instruction": "a", "output": 3})
    arguments = ("preview", config, f"data.train={data}", "data.eval=null")
    refused = run(*arguments)
    assert refused.code == 1
    assert "1 row: column 'output' should be text, not 3." in refused.out
    assert f"{data}:2: {{'instruction': 'a', 'output': 3}}" in refused.out
    assert "this config can't be trained: data.on_bad_row: error, and 1 row can't be used." in refused.out
    assert "⟦b</s>⟧" in refused.out
    assert "1 bad row dropped" in run(*arguments, "data.on_bad_row=drop").out


def test_the_numbers_of_what_was_left_out_are_in_the_json(config, tmp_path):
    rows = [{"instruction": f"Q{number % 4}", "output": "A"} for number in range(9)]
    data = rows_file(tmp_path, *rows, {"instruction": 3, "output": "A"}, *rows)
    settings = ("data.max_rows=10", "data.deduplicate=true", "data.on_bad_row=drop", "data.eval=0.1")
    values = json.loads(run("preview", config, f"data.train={data}", *settings, "--json").out)
    (report,) = values["reports"]
    assert {key: report[key] for key in ("rows", "bad_rows", "examples", "deduplicated", "drawn")} == {
        "rows": 10, "bad_rows": 1, "examples": 9, "deduplicated": 5, "drawn": 4,
    }  # fmt: skip
    assert (values["train_examples"], values["eval_examples"]) == (4, 0)
    assert report["problems"] == [{
        "cause": "column 'instruction' should be text, not 3.",
        "count": 1,
        "examples": [f"{data}:10: {{'instruction': 3, 'output': 'A'}}"],
    }]  # fmt: skip
    assert report["notes"] == [
        "max_rows: at most 10 rows were read",
        "none of its examples is held out: 0.1 (data.eval) of 4 rows rounds to 0",
        "no example is held out, so there is no evaluation",
    ]


def test_rows_for_another_objective_are_shown_and_reported(config, tmp_path):
    data = rows_file(tmp_path, {"prompt": "Say", "chosen": "yes", "rejected": "no"})
    shown = run("preview", config, f"data.train={data}", "data.eval=null")
    assert "⟦yes</s>⟧" in shown.out
    assert "⟦no</s>⟧" in shown.out
    assert "train.objective: sft can't learn from the preference rows" in shown.out


PAIR = {"prompt": "Say", "chosen": "yes, certainly", "rejected": "no"}


@pytest.fixture
def pairs_config(config, tmp_path):
    """Return the arguments that preview three pairs."""
    data = rows_file(tmp_path, *({**PAIR, "prompt": f"Say {name}"} for name in ("a", "b", "c")))
    return "preview", config, f"data.train={data}", "data.eval=null", "train.objective=dpo"


def test_the_prompt_of_a_pair_is_shown_once(pairs_config):
    shown = run(*pairs_config, "-n", "2").out
    assert shown.count("Say a") == shown.count("Say c") == 1
    assert "Say b" not in shown
    assert "### Response:\n– chosen: " in shown
    assert "⟦yes, certainly</s>⟧\n– rejected: " in shown
    assert "3 pairs, " in shown


@pytest.mark.parametrize(("width", "is_beside"), [(120, True), (80, False)])
def test_the_answers_of_a_pair_are_side_by_side_on_a_wide_terminal(pairs_config, monkeypatch, width, is_beside):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = run(*pairs_config, "-n", "1").out.splitlines()
    (line,) = (line for line in lines if "yes, certainly" in line)
    assert line.startswith("\x1b[32myes, certainly\x1b[0m")  # green
    assert ("\x1b[32mno\x1b[0m" in line) == is_beside
    assert sum("\x1b[32mno\x1b[0m" in line for line in lines) == 1


def test_both_answers_of_a_pair_are_in_the_json_and_the_page(pairs_config, tmp_path):
    report = run(*pairs_config, "-n", "1", "--json", "--html", tmp_path / "page.html").json()
    assert [(sample["number"], sample["counts_as"]) for sample in report["samples"]] == [(0, "chosen"), (1, "rejected")]
    assert report["group_size"] == 2
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("Say a") == 1
    assert re.findall(r'<span class="supervised">([^<]*)</span>', page) == ["yes, certainly", "no"]


def test_the_ratings_of_answers_are_shown_and_not_the_answers_of_other_rows(config, tmp_path):
    rows = ({"prompt": f"Say {number}", "completion": f"yes {number}", "label": number > 1} for number in range(3))
    arguments = ("preview", config, f"data.train={rows_file(tmp_path, *rows)}", "data.eval=null", "train.objective=kto")
    shown = run(*arguments).out
    assert re.findall(r"example (\d) \((\w+)\)", shown) == [("0", "bad"), ("1", "bad"), ("2", "good")]
    assert re.findall(r"⟦(.*)⟧", shown)[1::2] == [f"yes {number}</s>" for number in range(3)]
    assert "3 rated answers and as many" in shown
    samples = run(*arguments, "--json").json()["samples"]
    assert [sample["counts_as"] for sample in samples] == ["bad", "bad", "good"]


@pytest.mark.parametrize("how", ["head", "tokens"])
def test_the_labels_of_texts_are_shown(config, tmp_path, how):
    data = rows_file(tmp_path, {"text": "Hi", "label": "spam"}, {"text": "Ho", "label": "ham"})
    settings = (f"data.train={data}", "data.eval=null", "train.objective=classify", f"train.classify_by={how}")
    samples = run("preview", config, *settings, "--json").json()["samples"]
    assert sorted(sample["counts_as"] for sample in samples) == ["ham", "spam"]


def test_the_lengths_are_drawn_and_those_too_long_marked(config, tmp_path):
    data = rows_file(tmp_path, *({"text": "x" * length} for length in (5, 20, 21, 40, 500)))
    arguments = ("preview", config, f"data.train={data}", "data.eval=null", "data.max_seq_len=64")
    lines = run(*arguments).out.splitlines()
    bars = [line.split() for line in lines if "█" in line]
    assert [int(bar[2]) for bar in bars] == [1, 2, 1, 1]
    assert len(bars[1][1]) == max(len(bar[1]) for bar in bars)
    assert [line for line in lines if "longer than max_seq_len" in line and "█" in line] == [
        line for line in lines if "257–512" in line
    ]
    assert "1 document dropped because of max_seq_len" in "\n".join(lines)


def test_layers_that_become_linear_in_training_are_counted(alpaca_file, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, GPT2Config, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    report = run("preview", run_config(base, alpaca_file, tmp_path / "run"), "--json").json()
    assert report["adapted"] == {"c_attn": 2, "c_proj": 4, "c_fc": 2}
    assert report["problems"] == []


def test_no_model_is_loaded(config, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for weights in base.glob("*.safetensors*"):
        weights.unlink()
    report = run("preview", config, f"model.base={base}", "--json").json()
    assert report["steps_per_epoch"] > 0


@pytest.mark.parametrize(("targets", "adapted"), [
    ("all-linear", dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", *EXPERTS), 2)),
    ("[v_proj, experts.down_proj]", {"v_proj": 2, "experts.down_proj": 2}),
    ("[q_projj]", "lora.targets: 'q_projj' matches no linear layer"),
])  # fmt: skip
def test_adapted_layers_and_experts_are_counted(targets, adapted, config, tmp_path):
    base = make_moe(tmp_path / "base", "mixtral", seed=0)
    found = run("preview", config, f"model.base={base}", f"lora.targets={targets}", "--json")
    report = json.loads(found.out)
    if isinstance(adapted, str):
        assert (found.code, report["adapted"]) == (1, {})
        assert adapted in report["problems"][0]
        return
    assert report["adapted"] == adapted
    shown = run("preview", config, f"model.base={base}", f"lora.targets={targets}").out
    assert "2 × experts.down_proj" in " ".join(shown.split())


@pytest.fixture
def page(config, tmp_path):
    """Return a page about rows that look like markup."""
    data = rows_file(
        tmp_path,
        {"instruction": "<script>document.title = 'run'</script>", "output": "<b>bold</b> & so"},
        {"instruction": "a", "output": "x" * 30},
    )
    target = tmp_path / "page.html"
    run("preview", config, f"data.train={data}", "data.eval=null", "--html", target, "--json")
    return target


def test_the_page_needs_nothing_but_itself_and_escapes_all_text(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\b(src|href|url)\s*[=(]", text)
    assert "<script" not in text
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; so" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_page(page, tmp_path):
    command = [CHROMIUM, *HEADLESS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    assert "<title>run.yaml: what is supervised</title>" in shown  # and no script has changed it
    answers = re.findall(r'<span class="supervised">([^<]*)</span>', shown)
    assert answers == ["&lt;b&gt;bold&lt;/b&gt; &amp; so", "x" * 30]
    widths = [float(width) for width in re.findall(r'class="bar" style="width: ([\d.]+)%"', shown)]
    assert widths
    assert max(widths) == 100


def test_a_page_that_can_not_be_written_is_reported(config, tmp_path):
    refused = run("preview", config, "--html", tmp_path / "absent" / "page.html")
    assert "page.html: can't be written: No such file or directory" in refused.error()


@pytest.mark.parametrize(("overrides", "expected"), [
    (["train.class_weights={oak: 2}"], "train.class_weights: oak is no label; the labels are ash, elm."),
    (["train.early_stopping={metric: eval_accurracy}"], "train.early_stopping.metric: eval_accurracy is not evaluated"),
    (["eval.metrics=[exact_match]"], "eval.metrics: no held-out row has an answer in text to compare with"),
])  # fmt: skip
def test_what_training_would_refuse_is_a_problem(overrides, expected, config, tmp_path):
    data = rows_file(tmp_path, *({"text": f"leaf {n}", "label": ("ash", "elm")[n % 2]} for n in range(8)))
    given = [f"data.train={data}", "data.eval=0.5", "train.objective=classify", "train.eval_every=1"]
    assert run("preview", config, *given, "--json").json()["problems"] == []
    found = run("preview", config, *given, *overrides, "--json")
    (problem,) = json.loads(found.out)["problems"]
    assert (found.code, expected in problem) == (1, True), problem


def test_a_metric_of_a_users_file_is_named_but_not_run(config, tmp_path):
    (tmp_path / "mine.py").write_text("raise RuntimeError")
    given = ["data.eval=0.5", f"eval.metrics={tmp_path / 'mine.py'}:score", "train.keep_best=eval_score"]
    given.append("train.best_mode=max")
    assert run("preview", config, *given, "--json").json()["problems"] == []
