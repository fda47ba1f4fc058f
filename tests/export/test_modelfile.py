"""Modelfiles: Ollama's template writes conversations as the trained one does, or the file says that it can't."""

import re

import pytest

from qlora.data import apply_template
from qlora.data.named_templates import template_names
from qlora.data.template import render
from qlora.export.gguf.modelfile import UNKNOWN, UNKNOWN_OF_ADAPTER, find_turns, write_modelfile
from tests.tiny import make_tokenizer

# Templates that write a system message into the user's turn, or refuse it.
UNWRITABLE = {"gemma", "llama2", "mistral", "mistral-nemo"}
CONVERSATIONS = (
    [("user", "What is it?")],
    [("system", "Be brief."), ("user", "Hi\n\nthere")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e"), ("user", "f")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")],
)


def run_go(template, turns):
    """Run a template as Ollama does, for the few actions that are in one."""
    outside, loop, end = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()
    condition = re.fullmatch(r"\{\{ if not \.System \}\}(.*)\{\{ end \}\}", outside, re.DOTALL)
    has_system = any(role == "system" for role, _ in turns)
    text = condition[1] if condition and not has_system else ""
    branches = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', loop, re.DOTALL))
    for role, content in turns:
        text += branches[role].replace("{{ .Content }}", content)
    return text + end


@pytest.mark.parametrize("name", template_names())
def test_a_template_by_name_is_written_as_it_renders_or_not_at_all(name):
    tokenizer = make_tokenizer()
    apply_template(tokenizer, name)
    found = find_turns(tokenizer)
    assert (found is None) == (name in UNWRITABLE)
    for turns in CONVERSATIONS if found is not None else ():
        messages = [{"role": role, "content": content} for role, content in turns]
        assert run_go(found.as_go(), turns) == render(tokenizer, messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }} {{ m.content }}{% endfor %}>",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}>",
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim | upper }}{% endfor %}<assistant>",
        "{% for m in messages %}{{ '{{' }}{{ m.role }}>{{ m.content }}{% endfor %}{{ '{{' }}assistant>",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_does_more_is_left_to_ollama(template, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert find_turns(tokenizer) is None
    write_modelfile(tmp_path / "mine.gguf", tokenizer, [tokenizer.eos_token_id])
    text = (tmp_path / "Modelfile").read_text()
    assert UNKNOWN in text
    assert "TEMPLATE" not in text
    write_modelfile(tmp_path / "mine-lora.gguf", tokenizer, [], adapter_for="base-model")
    text = (tmp_path / "Modelfile").read_text()
    assert UNKNOWN_OF_ADAPTER in text
    assert "chat_template.jinja" not in text


def test_the_file_names_the_model_the_template_and_the_ends(tmp_path):
    tokenizer = make_tokenizer()
    apply_template(tokenizer, "chatml")
    write_modelfile(tmp_path / "mine.gguf", tokenizer, [tokenizer.eos_token_id])
    first, *_, last = (tmp_path / "Modelfile").read_text().splitlines()
    assert first == "FROM ./mine.gguf"
    assert last == f'PARAMETER stop "{tokenizer.eos_token}"'
    write_modelfile(tmp_path / "mine-lora.gguf", tokenizer, [], adapter_for="base-model")
    assert "FROM ./base.gguf\nADAPTER ./mine-lora.gguf\n" in (tmp_path / "Modelfile").read_text()
