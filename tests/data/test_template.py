"""Templates: which one is used, BOS exactly once, and prompts equal to those of training."""

import json
import random

import pytest
from transformers import AutoTokenizer

from qlora.data.encode import ExampleEncoder
from qlora.data.examples import Completion, Conversation
from qlora.data.template import adds_bos, apply_template, encode_prompt, render
from qlora.errors import DataError
from tests.data import chats
from tests.tiny import make_tokenizer, only

REAL = ("minimind", "tinyllama_chat_hf", "mistral7b_v01_hf")
OWN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Of realdata/chat_templates/llama_cpp: those that write a past turn as when it was the last. The tokenizers here know
# none of their control tokens, which are then plain text.
REAL_TEMPLATES = (
    "ByteDance-Seed-OSS",
    "GigaChat3-10B-A1.8B",
    "HuggingFaceTB-SmolLM3-3B",
    "MiMo-VL",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen3-Coder",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-2-2b-it",
    "ibm-granite-granite-3.3-2B-Instruct",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "moonshotai-Kimi-K2",
)


@pytest.fixture
def real_tokenizer(realdata):
    """Loads a tokenizer of realdata, with its own template."""
    return lambda name: chats.real_tokenizer(realdata, name)


def words(rng):
    """Text that starts with a letter and has spaces, newlines and characters of several bytes inside."""
    text = "".join(rng.choices("abcdefgh XYZ 0123.,()\né漢🙂", k=rng.randrange(1, 40)))
    return rng.choice("abcdefghXYZ") + text + rng.choice("xyz")


def conversation(rng, num_answers, system=False):
    roles = ["system"] * system + ["user", "assistant"] * num_answers
    return [{"role": role, "content": words(rng)} for role in roles]


def encode_all(tokenizer, messages):
    return chats.encode(ExampleEncoder(tokenizer), Conversation(messages)).documents


def encode(tokenizer, messages):
    return only(encode_all(tokenizer, messages))


def wrong_prefixes(tokenizer, messages):
    """Answers whose trained ids do not begin with the prompt that generation encodes."""
    documents = [document.input_ids.tolist() for document in encode_all(tokenizer, messages)]
    prompts = {
        turn: encode_prompt(tokenizer, messages[:turn])
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    if len(documents) == 1:
        documents *= len(prompts)
    pairs = zip(prompts.items(), documents, strict=True)
    return [turn for (turn, prompt), ids in pairs if ids[: len(prompt)] != prompt]


def test_auto_keeps_the_tokenizers_own_template():
    tokenizer = make_tokenizer(chat_template=OWN)
    used = apply_template(tokenizer, "auto")
    assert tokenizer.chat_template == OWN
    assert "own" in used


def test_auto_takes_alpaca_if_there_is_none_and_reports_it():
    tokenizer, asked = make_tokenizer(), make_tokenizer()
    used = apply_template(tokenizer, "auto")
    apply_template(asked, "alpaca")
    assert tokenizer.chat_template == asked.chat_template
    assert "alpaca" in used
    assert "none" in used


PROCESSOR_FILES = {
    "chat_template.json": json.dumps({"chat_template": OWN}),
    "processor_config.json": json.dumps({"processor_class": "SomeProcessor", "chat_template": OWN}),
}


@pytest.mark.parametrize("name", PROCESSOR_FILES)
def test_auto_takes_the_template_of_a_processor_where_the_tokenizer_has_none(tmp_path, name):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(PROCESSOR_FILES[name], encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert apply_template(tokenizer, "auto") == f"{name} of the base (the tokenizer has none)"
    assert tokenizer.chat_template == OWN


def test_the_tokenizers_own_template_comes_before_a_processors(tmp_path):
    make_tokenizer(chat_template="{{ 'own' }}").save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(PROCESSOR_FILES["chat_template.json"], encoding="utf-8")
    assert apply_template(AutoTokenizer.from_pretrained(tmp_path), "auto") == "the tokenizer's own"


def test_a_processor_without_a_template_is_passed_over(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "SomeProcessor"}', encoding="utf-8")
    assert apply_template(AutoTokenizer.from_pretrained(tmp_path), "auto") == "alpaca (the tokenizer has none)"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[1]", "is not a JSON object"),
        ("{", "is not a JSON object"),
        ('{"chat_template": {"a": "b"}}', "several templates"),
    ],
)
def test_a_damaged_file_of_a_processor_is_named(tmp_path, content, problem):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(content, encoding="utf-8")
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(DataError, match=f"data.chat_template: .*chat_template.json.* {problem}"):
        apply_template(tokenizer, "auto")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alpaca", "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHo</s>### Instruction:\nBye\n\n### Response:\n"),
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_a_built_in_template_replaces_the_own_one(name, text):
    tokenizer = make_tokenizer(add_bos=False, chat_template=OWN)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Bye"},
    ]
    assert apply_template(tokenizer, name) == f"{name} (by name)"
    assert render(tokenizer, messages, add_generation_prompt=True) == text


def test_a_jinja_file_is_used_as_it_is(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(OWN, encoding="utf-8")
    tokenizer = make_tokenizer()
    assert apply_template(tokenizer, str(path)) == str(path)
    assert render(tokenizer, [{"role": "user", "content": "é"}], add_generation_prompt=True) == "<user>é</s><assistant>"


@pytest.mark.parametrize("name", ["alpacca", "none/mine.jinja", ""])
def test_an_unknown_template_is_refused_with_the_known_ones(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(chat_template=OWN)
    with pytest.raises(DataError, match=f"data.chat_template: '{name}'.*auto, alpaca, chatml"):
        apply_template(tokenizer, name)
    assert tokenizer.chat_template == OWN


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 'x' + nothing }}", "nothing"),
        ("{% for tool in messages[0].tools.names %}{% endfor %}", "tools"),
        ("{% for x in none %}{% endfor %}", "iterable"),
    ],
    ids=["refusal", "undefined", "attribute", "type"],
)
def test_a_template_that_fails_is_a_data_error_with_its_reason(template, reason):
    with pytest.raises(DataError, match=f"template.*{reason}"):
        render(make_tokenizer(chat_template=template), [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", ["auto", "alpaca", "chatml"])
def test_bos_is_there_once_or_not_at_all(add_bos, name, seed):
    tokenizer, rng = make_tokenizer(add_bos), random.Random(seed)
    apply_template(tokenizer, name)
    messages = conversation(rng, 2)
    encoder = ExampleEncoder(tokenizer)
    examples = [Conversation(messages), Completion(words(rng), words(rng)), Completion("", words(rng))]
    all_ids = [only(chats.encode(encoder, example).documents).input_ids.tolist() for example in examples]
    all_ids += [encode_prompt(tokenizer, messages[:1]), encode_prompt(tokenizer, messages[:3])]
    assert adds_bos(tokenizer) == add_bos
    assert [ids.count(tokenizer.bos_token_id) for ids in all_ids] == [int(add_bos)] * len(all_ids)
    if add_bos:
        assert {ids[0] for ids in all_ids} == {tokenizer.bos_token_id}


@pytest.mark.parametrize("name", REAL)
def test_bos_is_there_once_or_not_at_all_with_real_tokenizers(real_tokenizer, name, seed):
    tokenizer, rng = real_tokenizer(name), random.Random(seed)
    apply_template(tokenizer, "alpaca")
    messages = conversation(rng, 2)
    encoder = ExampleEncoder(tokenizer)
    examples = [Conversation(messages), Completion(words(rng), words(rng)), Completion("", words(rng))]
    all_ids = [only(chats.encode(encoder, example).documents).input_ids.tolist() for example in examples]
    all_ids += [encode_prompt(tokenizer, messages[:1]), encode_prompt(tokenizer, messages[:3])]
    by_itself = tokenizer("Words").input_ids.count(tokenizer.bos_token_id)
    assert by_itself == (name != "minimind")
    assert [ids.count(tokenizer.bos_token_id) for ids in all_ids] == [by_itself] * len(all_ids)


@pytest.mark.parametrize("name", ["minimind", "tinyllama_chat_hf"])
def test_an_own_template_alone_decides_on_bos_as_in_a_server(real_tokenizer, name, seed):
    tokenizer = real_tokenizer(name)
    messages = conversation(random.Random(seed), 2)
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert apply_template(tokenizer, "auto") == "the tokenizer's own"
    assert encode_prompt(tokenizer, messages[:3]) == prompt
    assert encode(tokenizer, messages).input_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("num_answers", [1, 3])
@pytest.mark.parametrize("name", ["alpaca", "chatml"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_prompt_is_how_the_trained_ids_begin(add_bos, name, num_answers, seed):
    tokenizer = make_tokenizer(add_bos)
    apply_template(tokenizer, name)
    assert wrong_prefixes(tokenizer, conversation(random.Random(seed), num_answers, system=True)) == []


@pytest.mark.parametrize("num_answers", [1, 3])
@pytest.mark.parametrize("template", ["auto", "alpaca", "chatml"])
@pytest.mark.parametrize("name", REAL)
def test_a_prompt_is_how_the_trained_ids_begin_with_real_tokenizers(real_tokenizer, name, template, num_answers, seed):
    tokenizer, rng = real_tokenizer(name), random.Random(seed)
    apply_template(tokenizer, template)
    assert wrong_prefixes(tokenizer, conversation(rng, num_answers, system=True)) == []


@pytest.mark.parametrize("num_answers", [1, 3])
@pytest.mark.parametrize("template", REAL_TEMPLATES)
def test_a_prompt_is_how_the_trained_ids_begin_with_real_templates(
    real_tokenizer, realdata, template, num_answers, seed
):
    rng = random.Random(seed)
    messages = conversation(rng, num_answers)
    for name in ("minimind", "tinyllama_chat_hf"):
        tokenizer = real_tokenizer(name)
        apply_template(tokenizer, str(realdata / "chat_templates" / "llama_cpp" / f"{template}.jinja"))
        examples = encode_all(tokenizer, messages)
        supervised = "".join(tokenizer.decode(example.input_ids[example.loss_mask]) for example in examples)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        asked = [message["content"] for message in messages if message["role"] == "user"]
        position = 0
        for answer in answers:
            position = supervised.find(answer, position) + len(answer)
            assert position >= len(answer)
        assert [text for text in asked if len(text) > 12 and text in supervised] == []
        assert wrong_prefixes(tokenizer, messages) == []


@pytest.mark.parametrize(
    ("name", "template", "answer"),
    [
        ("mistral7b_v01_hf", "mistralai-Mistral-Nemo-Instruct-2407", "(Yes)"),  # '](' is one token
        ("qwen3", None, "\n\nYes"),  # '\n\n\n' is one token
    ],
)
def test_an_answer_is_supervised_from_its_first_character(real_tokenizer, realdata, name, template, answer):
    tokenizer = real_tokenizer(name)
    path = realdata / "chat_templates" / "llama_cpp" / f"{template}.jinja"
    apply_template(tokenizer, str(path) if template else "chatml")
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
    example = encode(tokenizer, messages)
    assert tokenizer.decode(example.input_ids[example.loss_mask]).startswith(answer)
    assert wrong_prefixes(tokenizer, messages) == []


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", ["alpaca", "chatml", "file"])
def test_the_template_travels_with_the_tokenizer(tmp_path, add_bos, name, seed):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}" + OWN, encoding="utf-8")
    tokenizer, messages = make_tokenizer(add_bos), conversation(random.Random(seed), 2)
    apply_template(tokenizer, str(path) if name == "file" else name)
    tokenizer.save_pretrained(tmp_path / "saved")
    path.unlink()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert apply_template(loaded, "auto") == "the tokenizer's own"
    assert encode_prompt(loaded, messages[:3]) == encode_prompt(tokenizer, messages[:3])
    before, after = encode(tokenizer, messages), encode(loaded, messages)
    assert after.input_ids.tolist() == before.input_ids.tolist()
    assert after.loss_mask.tolist() == before.loss_mask.tolist()
