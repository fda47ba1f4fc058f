"""Releases in the clients that serve them: the run's answers, rounding, and every other difference."""

import json
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlavaConfig, PreTrainedConfig

from qlora.config import load_config
from qlora.errors import ExportError
from qlora.export import merge
from qlora.export.merged import read_merged
from qlora.model import open_source
from qlora.own_process import KilledProcessError
from qlora.proof import engines, verify
from qlora.proof.engines import ENGINES, Engine, Prompt, Release, Reply, cache_bytes
from qlora.proof.served import serve
from qlora.training import train
from tests.cli import run as run_command
from tests.export.test_gguf import train_tokenizer
from tests.tiny import make_base, run_config

TRANSFORMERS = next(engine for engine in ENGINES if engine.name == "transformers")


def serve_altered(merged, alter):
    """Return the result of a client that answers as transformers does, altered by a function."""

    def answer(release, prompts):
        return [alter(reply) for reply in TRANSFORMERS.answer(release, prompts)]

    engine = Engine("transformers", ("safetensors",), answer)
    return serve(open_source(merged / "run"), read_merged(merged / "out"), "cpu", [engine])["transformers"]


def test_a_release_gives_the_runs_answers_in_transformers(merged):
    report = run_command("verify", merged / "run", merged / "out", "--clients", "--json").json()
    served = report["served"]["transformers"]
    assert report["matches"]
    assert served["equal"] + served["rounded"] == served["prompts"] == 6
    assert served["equal"] >= 3
    assert "pip install vllm" in report["served"]["vllm"]["reason"]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda reply: replace(reply, prompt_ids=[256, *reply.prompt_ids]), "it feeds the tokens [256, 256, "),
        (lambda reply: replace(reply, ids=reply.ids[:3]), "it ends the answer after "),
        (lambda reply: replace(reply, ids=[*reply.ids[:2], 7, *reply.ids[3:]]), "token 3 of the answer is '("),
    ],
    ids=["prompt", "end", "token"],
)
def test_a_client_that_does_something_else_is_reported(alter, message, merged):
    served = serve_altered(merged, alter)
    assert len(served.problems) >= 3
    assert any(message in problem for problem in served.problems)
    assert str(served) == f"{TRANSFORMERS.version}: differs, see above"


def fail(*_):
    raise RuntimeError("out of\n  everything")


FAILING = replace(TRANSFORMERS, name="torch", answer=fail)
REASON = "not compared: it failed: RuntimeError: out of everything"


def test_a_client_that_fails_is_no_mismatch(merged, monkeypatch):
    monkeypatch.setattr("qlora.proof.served.ENGINES", (FAILING, TRANSFORMERS))
    report = verify(merged / "run", merged / "out", in_clients=True)
    assert report.matches, report.problems
    assert str(report.served["torch"]) == f"{FAILING.version}: {REASON}"
    assert report.served["transformers"].prompts == 6
    done = run_command("verify", merged / "run", merged / "out", "--clients")
    assert done.code == 0
    assert REASON in done.out
    assert f"{merged / 'out'} is what {merged / 'run'} trained." in done.out


def test_a_client_that_crashes_is_an_answer(merged):
    def crash(number):
        def answer(*_):
            raise KilledProcessError(number)

        return Engine(number.name, ("safetensors",), answer, ("transformers",), after_crash="; build it without AMX")

    crashing = [crash(number) for number in (signal.SIGILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)]
    served = serve(open_source(merged / "run"), read_merged(merged / "out"), "cpu", crashing)
    killed = "it failed: a signal killed its process"
    assert served["SIGILL"].reason == f"{killed} (SIGILL); build it without AMX"
    assert served["SIGSEGV"].reason == f"{killed} (SIGSEGV); build it without AMX"
    assert served["SIGABRT"].reason == f"{killed} (SIGABRT)"
    assert served["SIGKILL"].reason == f"{killed} (SIGKILL); memory probably ran out"


def test_a_release_that_no_client_could_run_is_an_error(merged, monkeypatch):
    monkeypatch.setattr("qlora.proof.served.ENGINES", (FAILING,))
    done = run_command("verify", merged / "run", merged / "out", "--clients")
    assert done.code == 1
    assert REASON in done.out
    assert f"{merged / 'out'} is what {merged / 'run'} trained, but no client could run it." in done.out


def test_a_base_that_the_temporary_folder_has_no_room_for_is_refused(merged, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    merge(merged / "run", tmp_path / "out", format="lora-gguf")
    monkeypatch.setattr("qlora.proof.served.free_bytes", lambda _: 1000)
    engine = replace(TRANSFORMERS, formats=("lora-gguf",), answer=lambda *_: pytest.fail("run"))
    source, release = open_source(merged / "run"), read_merged(tmp_path / "out")
    with pytest.raises(ExportError, match=r"No space left on device\. It takes \d.* Set TMPDIR"):
        serve(source, release, "cpu", [engine])


def test_clients_are_not_run_on_a_release_that_differs(own, monkeypatch):
    path = own / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    monkeypatch.setattr(import_module("qlora.proof.verify"), "serve", lambda *_: pytest.fail("run"))
    report = verify(own / "run", own / "out", in_clients=True)
    assert not report.matches
    assert str(report.served["transformers"]).endswith(": not compared: the release itself is not what the run trained")


def test_without_a_folder_or_a_client_nothing_is_verified(merged, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"--clients .* name its folder"):
        verify(merged / "run", in_clients=True)
    monkeypatch.setattr("qlora.proof.served.ENGINES", (replace(TRANSFORMERS, name="no-such-client"),))
    with pytest.raises(ExportError, match=r"no client of safetensors is installed: pip install no-such-client"):
        verify(merged / "run", merged / "out", in_clients=True)


@pytest.fixture(scope="module")
def mergeable(alpaca_file, realdata, tmp_path_factory):
    """A run on a base whose tokenizer has merges, without which llama.cpp loads no file; not to be changed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    folder = tmp_path_factory.mktemp("mergeable")
    text = (realdata / "data/tinyshakespeare/input.txt").read_text()[:20000]
    # 256 values in a row, as K-quants have in a block.
    base = make_base(folder / "base", 5, vocab_size=608, hidden_size=256, intermediate_size=512, head_dim=64)
    train_tokenizer(("a regex of its own",), False, text).save_pretrained(base)
    train(load_config(run_config(base, alpaca_file, folder / "run")))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "dtype"),
    [("gguf", "float16"), ("gguf", "q8_0"), ("gguf", "q4_0"), ("gguf", "q4_k_m"), ("lora-gguf", "float32")],
)
def test_llama_cpp_gives_the_runs_answers(format, dtype, mergeable, tmp_path):
    merge(mergeable, tmp_path / "out", dtype, "original", format=format)
    report = verify(mergeable, tmp_path / "out", in_clients=True)
    served = report.served["llama-cpp-python"]
    assert report.matches, report.problems
    assert served.equal + served.rounded == served.prompts == (4 if format == "lora-gguf" else 6)


@pytest.mark.slow
def test_llama_cpp_with_another_template_is_reported(mergeable, tmp_path):
    merge(mergeable, tmp_path / "out", "float16", format="gguf")
    other = tmp_path / "other.gguf"
    content = (tmp_path / "out" / "out-f16.gguf").read_bytes()
    assert content.count(b"### Response:") > 0
    other.write_bytes(content.replace(b"### Response:", b"### Answer!!:"))
    run_it = engines._answer_in_llama_cpp
    altered = Engine("llama-cpp-python", ("gguf",), lambda given, prompts: run_it(replace(given, path=other), prompts))
    served = serve(open_source(mergeable), read_merged(tmp_path / "out"), "cpu", [altered])["llama-cpp-python"]
    assert len(served.problems) == 2
    assert all("it feeds the tokens" in problem for problem in served.problems)


def test_a_client_is_found_by_any_of_its_distributions():
    assert Engine("no-such-client", (), list).version is None
    assert Engine("no-such-client", (), list, ("pytest",)).version == pytest.__version__


@pytest.mark.parametrize("name", ["vllm", "llama-cpp-python"])
@pytest.mark.parametrize("adapter", [None, Path("adapter.gguf")])
def test_clients_that_may_crash_answer_in_a_process_of_their_own(adapter, name, monkeypatch):
    release = Release(Path("release"), "float16", "cpu", 512, adapter=adapter)
    prompts = [Prompt("A text", is_message=False), Prompt("A message", is_message=True)]
    seen = []

    def answer(*given):
        seen.append(given)
        return [Reply([1, 2], [3]), Reply([4], [])]

    def call(function, *args):
        assert function is getattr(import_module(function.__module__), function.__qualname__)
        seen.append("another process")
        return json.loads(json.dumps(function(*json.loads(json.dumps(args)))))

    monkeypatch.setattr(engines, "ENGINES", [replace(engine, answer=answer) for engine in ENGINES])
    monkeypatch.setattr(engines, "call_in_own_process", call)
    engine = next(engine for engine in engines.ENGINES if engine.name == name)
    assert engine.run(release, prompts) == answer()
    assert seen[:2] == ["another process", (release, prompts)]


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_answers(merged):
    release = Release(merged / "out", "float16", "cpu")
    prompts = [Prompt("A text", is_message=False), Prompt("A message", is_message=True)]
    assert replace(TRANSFORMERS, own_process=True).run(release, prompts) == TRANSFORMERS.run(release, prompts)


LLAMA_65B = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 64, "hidden_size": 8192}


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        (LlamaConfig(**LLAMA_65B), "float16", 80 * 64 * 128 * 2 * 2 * 1024),
        (LlamaConfig(**LLAMA_65B), "float32", 80 * 64 * 128 * 2 * 4 * 1024),
        (LlamaConfig(**LLAMA_65B, head_dim=256), "bfloat16", 80 * 64 * 256 * 2 * 2 * 1024),
        (LlavaConfig(text_config=LlamaConfig(**LLAMA_65B)), "float16", 80 * 64 * 128 * 2 * 2 * 1024),
        (LlamaConfig(**(LLAMA_65B | {"num_key_value_heads": 8})), "float16", 1 << 30),
        (PreTrainedConfig(), "float16", 1 << 30),
    ],
    ids=["fp16", "fp32", "head_dim", "multimodal", "grouped", "unknown"],
)
def test_vllms_cache_holds_the_context(config, dtype, expected):
    assert cache_bytes(config, dtype, 1024) == expected
