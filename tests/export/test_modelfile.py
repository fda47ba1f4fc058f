"""Modelfiles: Ollama's template writes conversations as the trained one does, or the file says that it can't."""

import re

import pytest

from qlora.data import apply_template
from qlora.data.named_templates import template_names
from qlora.data.template import render
from qlora.export.gguf.modelfile import TRIMS, UNKNOWN, UNKNOWN_OF_ADAPTER, find_turns, write_modelfile
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
    """Run a template as Go's text/template does, for the actions that Modelfiles are written with.

    An action begins at the first two braces, wherever they are, and ends at the next two closing ones.
    """
    nodes = iter([*re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL), None])
    system = "\n\n".join(content for role, content in turns if role == "system")

    def parse():
        """Return the nodes up to an `else` or `end`, and that."""
        found = []
        for node in nodes:
            if node is None or re.fullmatch(r"\{\{ (else if .*|end) \}\}", node):
                return found, node
            if node.startswith("{{ if ") or node.startswith("{{ range "):
                branches, ending = [], node
                while ending != "{{ end }}":
                    body, following = parse()
                    branches.append((ending, body))
                    ending = following
                found.append(branches)
            else:
                found.append(node)
        raise AssertionError(template)

    def run(found, turn):
        text = ""
        for node in found:
            if isinstance(node, str):
                quoted = re.fullmatch(r'\{\{ "(.*)" \}\}', node)
                text += quoted[1] if quoted else turn[1] if node == "{{ .Content }}" else node
                continue
            for condition, body in node:
                if condition == "{{ range .Messages }}":
                    text += "".join(run(body, each) for each in turns)
                elif condition == "{{ if not .System }}":
                    text += "" if system else run(body, turn)
                elif turn[0] == re.fullmatch(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', condition)[1]:
                    text += run(body, turn)
                    break
        return text

    return run(parse()[0], None)


def read_modelfile(text):
    """Read commands as Ollama's parser does: a value ends at the first line break or space after its closing quotes.

    Characters that are not printable are dropped, except spaces, tabs and line breaks within quotes.
    """

    def unquoted(value):
        for quotes in ('"""', '"'):
            if value.startswith(quotes):
                is_closed = value.endswith(quotes) and len(value) >= 2 * len(quotes)
                return value[len(quotes) : -len(quotes)] if is_closed else None
        return value

    commands, rest = [], text
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, value, rest = re.match(r"((?:PARAMETER )?\w+) ()(.*)", rest, re.DOTALL).groups()
        while rest:
            character, rest = rest[0], rest[1:]
            if character in "\r\n" and unquoted(value.strip()) is not None:
                break
            value += character if character.isprintable() or character in " \t\r\n" else ""
        commands.append((name, unquoted(value.strip())))
    return commands


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
        "{% for m in messages %}{{ m.role }}>{{ m.content }}\u200b{% endfor %}assistant>",
        '{% for m in messages %}{{ m.role }}>{{ m.content }}"""{% endfor %}assistant>',
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


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '{{' }}{{ m.role }}}}{{ m.content }}\n{% endfor %}{{ '{{' }}assistant}}",
        "{% for m in messages %}{{ m.role }}: {{ '{' }}{{ m.content }}}{% endfor %}assistant: {",
        '{% for m in messages %} \t{{ m.role }}"" \n\n {{ m.content }}  {% endfor %} \tassistant"" \n\n ',
        "{% for m in messages %}{{ m.role }}-}} - {{ m.content }} -{% endfor %}assistant-}} - ",
        '{"messages": [{% for m in messages %}{"{{ m.role }}": "{{ m.content }}"}{% endfor %}{"assistant": "',
    ],
)
def test_ollama_reads_braces_quotes_and_whitespace_back(template, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens(['<"end" of it\\>'])
    write_modelfile(tmp_path / "mine one.gguf", tokenizer, [257, len(tokenizer) - 1])
    commands = read_modelfile((tmp_path / "Modelfile").read_text())
    (_, path), (_, found), *stops = commands
    assert path == "./mine one.gguf"
    assert stops == [("PARAMETER stop", "</s>"), ("PARAMETER stop", '<"end" of it\\>')]
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        assert run_go(found, turns) == render(tokenizer, messages, add_generation_prompt=True)


def test_a_template_that_trims_messages_says_so(tmp_path):
    tokenizer = make_tokenizer()
    apply_template(tokenizer, "llama3")
    write_modelfile(tmp_path / "mine.gguf", tokenizer, [257])
    assert TRIMS in (tmp_path / "Modelfile").read_text()
    apply_template(tokenizer, "chatml")
    write_modelfile(tmp_path / "mine.gguf", tokenizer, [257])
    assert TRIMS not in (tmp_path / "Modelfile").read_text()


def test_the_file_names_the_model_the_template_and_the_ends(tmp_path):
    tokenizer = make_tokenizer()
    apply_template(tokenizer, "chatml")
    write_modelfile(tmp_path / "mine.gguf", tokenizer, [tokenizer.eos_token_id])
    first, *_, last = (tmp_path / "Modelfile").read_text().splitlines()
    assert first == "FROM ./mine.gguf"
    assert last == f'PARAMETER stop "{tokenizer.eos_token}"'
    write_modelfile(tmp_path / "mine-lora.gguf", tokenizer, [], adapter_for="base-model")
    assert "FROM ./base.gguf\nADAPTER ./mine-lora.gguf\n" in (tmp_path / "Modelfile").read_text()
