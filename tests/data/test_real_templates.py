"""Chat templates of real models, against their own generation marks, what a server feeds, and ids made elsewhere."""

import json
import random
from difflib import SequenceMatcher

import numpy as np
import pytest

from qlora.data.encode import ExampleEncoder
from qlora.data.examples import Conversation
from qlora.errors import DataError
from tests.data.chats import answers, chat, encode, family_tokenizer, real_tokenizer, stretches, supervised_texts
from tests.reference import served
from tests.tiny import only

KINDS = ("single", "multi", "system", "reasoning", "tools")

# How the encoder refuses a conversation.
PLACE, UNENDED, LEFT_OUT, REFUSED = "place", "unended", "left out", "refused"
REFUSALS = {
    PLACE: "rendering of the answer does not begin with its prompt",
    UNENDED: "begins another turn after an answer without ending the answer",
    LEFT_OUT: "the chat template leaves out",
    REFUSED: "the chat template refuses this conversation",
}

# Text that TRL's marks include but we don't supervise, before an answer and after it; then kinds that differ.
# In front: a part of the generation prompt. A server feeds it, so the model never writes it; ours is right.
# Behind: the newline after the end token. A server stops before it, so theirs learns what is never asked for.
SAME, NEWLINE = ("", ""), ("", "\n")
THINK = ("<think>\n", "\n")
NO_THOUGHT = ("<think>\n\n</think>\n\n", "\n")
# The prompt opens a thought by default; that of an answer without one has thinking switched off.
SWITCHED_OFF = dict.fromkeys(("single", "multi", "system", "tools"), {("<think></think>", "\n")})
# The EOS that closes a conversation, after the end token of its last answer and a line end.
CLOSED = ("", "\n<|endoftext|>")
PLAIN_TEXT_ONLY = {"reasoning": LEFT_OUT, "tools": LEFT_OUT}
# The prompt opens a thought that the rendering of an answer without one closes at once, in other characters.
THOUGHTS_ONLY = {"single": PLACE, "multi": PLACE, "system": PLACE, "tools": PLACE}
# Templates that are made for images: they read content as parts.
READ_PARTS = ("idefics3", "llava_next")
MARKS = {
    "cohere": (SAME, PLAIN_TEXT_ONLY),
    # An end of two tokens, of which none is this tokenizer's EOS.
    "cohere2": (("", "<|END_OF_TURN_TOKEN|>"), PLAIN_TEXT_ONLY),
    "deepseekv3": (None, THOUGHTS_ONLY | {"reasoning": LEFT_OUT, "tools": LEFT_OUT}),
    # A call is followed by the opening of its result at once, and its prompt after a result does not open the turn
    # that the rendering of the answer opens. Theirs marks neither, but with this prompt a model has to write both.
    "diffusion_gemma": (
        NEWLINE,
        {"tools": {("", "-<|tool_response>"), ("-<|turn>model\n", "\n"), NEWLINE}},
    ),
    "gemma": (NEWLINE, PLAIN_TEXT_ONLY | {"system": REFUSED}),
    "gemma3": (NEWLINE, PLAIN_TEXT_ONLY),
    "glm4moe": (SAME, {}),
    "gptoss": (("<|start|>assistant", ""), {}),
    "idefics3": (NEWLINE, PLAIN_TEXT_ONLY),
    "lfm2": (NEWLINE, PLAIN_TEXT_ONLY),
    "llama3": (SAME, PLAIN_TEXT_ONLY),
    "llava_next": (("", " "), PLAIN_TEXT_ONLY),
    "nemotron_3_nano": (THINK, SWITCHED_OFF),
    "nemotron_3_super": (THINK, SWITCHED_OFF),
    "nemotron_3_ultra": (THINK, SWITCHED_OFF),
    "phi3": (CLOSED, PLAIN_TEXT_ONLY),
    "phi3_5": (CLOSED, PLAIN_TEXT_ONLY),
    "qwen2_5": (("\n", "\n"), {"reasoning": LEFT_OUT}),
    "qwen2_5_vl": (NEWLINE, PLAIN_TEXT_ONLY),
    "qwen3": (NEWLINE, {}),
    "qwen3_5_nothink": (NO_THOUGHT, {"reasoning": {THINK}}),
    "qwen3_5_think": (THINK, {}),
    "qwen3_6": (THINK, {}),
    "qwen3_instruct_2507": (NEWLINE, {"reasoning": LEFT_OUT}),
    "qwen3_vl": (NEWLINE, {"reasoning": LEFT_OUT}),
}

# Result for each of KINDS: w, a whole document; a, one per answer, because earlier turns are changed, a token would
# join an earlier answer to its prompt, or an earlier answer has no end token; -, the template leaves out a part; ?, its
# rendering of an answer does not begin with its prompt, or it begins another turn after an answer without an end; !,
# it raises an error, like templates that need tools, columns of their own, or lists with methods.
WHOLE, PER_ANSWER = "w", "a"
CODES = {LEFT_OUT: "-", PLACE: "?", UNENDED: "?", REFUSED: "!"}
SERVED = {
    "Apertus-8B-Instruct": "waa-?",
    "Apriel-1.6-15b-Thinker-fixed": "?????",
    "Bielik-11B-v3.0-Instruct": "wwwww",
    "ByteDance-Seed-OSS": "wwwww",
    "Cohere2MoE": "???w?",
    "CohereForAI-c4ai-command-r-plus-tool_use": "!!!!?",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "???-?",
    "GLM-4.6": "waaaa",
    "GLM-4.7-Flash": "waaaa",
    "GLM-5.2": "waaaa",
    "GigaChat3-10B-A1.8B": "www-w",
    "GigaChat3.1-10B-A1.8B": "www-w",
    "HuggingFaceTB-SmolLM3-3B": "www--",
    "Kimi-K2-Instruct": "www-!",
    "Kimi-K2-Thinking": "www-!",
    "LFM2-8B-A1B": "www--",
    "LFM2.5-Instruct": "www--",
    "MiMo-VL": "www-w",
    "MiroThinker": "!!!!!",
    "Mistral-Small-3.2-24B-Instruct-2506": "www-a",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "wwwaw",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "!!!!a",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "!!!!a",
    "Qwen-QwQ-32B": "???-?",
    "Qwen-Qwen2.5-7B-Instruct": "www-w",
    "Qwen-Qwen3-0.6B": "waaaa",
    "Qwen3-Coder": "www-w",
    "Qwen3.5-4B": "waaaa",
    "Reka-Edge": "wwwaw",
    "StepFun3.5-Flash": "waaaa",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "???--",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "???--",
    "deepseek-ai-DeepSeek-V3.1": "www--",
    "deepseek-ai-DeepSeek-V3.2": "???a?",
    "deepseek-ai-DeepSeek-V4": "wwwaw",
    "fireworks-ai-llama-3-firefunction-v2": "!!!!!",
    "google-gemma-2-2b-it": "ww!--",
    "google-gemma-4-31B-it-interleaved": "???-?",
    "google-gemma-4-31B-it": "???-?",
    "ibm-granite-granite-3.3-2B-Instruct": "www--",
    "llama-cpp-deepseek-r1": "???-!",
    "llama-cpp-rwkv-world": "waa--",
    "meetkai-functionary-medium-v3.1": "www-w",
    "meetkai-functionary-medium-v3.2": "www-!",
    "meta-llama-Llama-3.1-8B-Instruct": "www-w",
    "meta-llama-Llama-3.2-3B-Instruct": "www-w",
    "meta-llama-Llama-3.3-70B-Instruct": "www-w",
    "microsoft-Phi-3.5-mini-instruct": "waa--",
    "mistralai-Ministral-3-14B-Reasoning-2512": "www-w",
    "mistralai-Mistral-Nemo-Instruct-2407": "ww--a",
    "moonshotai-Kimi-K2": "www-w",
    "openai-gpt-oss-120b": "waaaa",
    "stepfun-ai-Step-3.5-Flash": "waaaa",
    "unsloth-Apriel-1.5": "www-a",
    "unsloth-mistral-Devstral-Small-2507": "www-w",
}


def outcome(encoder, conversation):
    """Result for a conversation: the first words of its error, or its documents."""
    try:
        return encode(encoder, conversation).documents
    except DataError as error:
        return next((name for name, words in REFUSALS.items() if words in str(error)), str(error))


def marked(tokenizer, conversation, as_parts):
    """The last span of each answer within the template's generation marks, by transformers."""
    found, messages = [], conversation.messages
    if as_parts:
        messages = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    for turn in answers(conversation):
        encoded = tokenizer.apply_chat_template(
            messages[: turn + 1],
            tools=conversation.tools,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        mask = np.array(encoded["assistant_masks"], dtype=int)
        begin, end = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0]))))[-2:]
        found.append(tokenizer.decode(encoded["input_ids"][begin:end]))
    return found


def whole(tokenizer, conversation):
    """Ids and marks of a whole conversation, by transformers."""
    encoded = tokenizer.apply_chat_template(
        conversation.messages, tools=conversation.tools, return_assistant_tokens_mask=True, return_dict=True
    )
    return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]


def around(theirs, ours):
    """Text that a span has in addition to another, before and after it; after a minus, text that it lacks."""
    at, own, length = SequenceMatcher(None, theirs, ours, autojunk=False).find_longest_match()
    pairs = ((theirs[:at], ours[:own]), (theirs[at + length :], ours[own + length :]))
    return tuple(more + f"-{less}" if less else more for more, less in pairs)


@pytest.mark.parametrize("name", MARKS)
def test_supervised_tokens_are_those_of_generation_marks_except_what_a_server_writes_or_never_reads(
    realdata, name, seed
):
    rng = random.Random(seed)
    tokenizer = family_tokenizer(realdata, realdata / "chat_templates" / "trl" / f"{name}_training.jinja")
    encoder = ExampleEncoder(tokenizer)
    usual, others = MARKS[name]
    for kind in KINDS:
        conversation = chat(rng, kind)
        found = outcome(encoder, conversation)
        if not isinstance(found, str):
            ours = [text for document in found for text in supervised_texts(encoder, document)]
            theirs = marked(tokenizer, conversation, as_parts=name in READ_PARTS)
            if usual == SAME and len(found) == 1:
                assert (only(found).input_ids.tolist(), only(found).loss_mask.tolist()) == whole(
                    tokenizer, conversation
                )
            found = {around(*pair) for pair in zip(theirs, ours, strict=True)}
        wanted = others.get(kind, {usual})
        assert (kind, found) == (kind, wanted)


def test_every_template_with_marks_is_in_the_table(realdata):
    paths = (realdata / "chat_templates" / "trl").glob("*_training.jinja")
    assert {path.stem.removesuffix("_training") for path in paths} == MARKS.keys()


@pytest.mark.parametrize("name", SERVED)
def test_every_real_template_is_followed_exactly_or_refused(realdata, name, seed):
    rng = random.Random(seed)
    tokenizer = family_tokenizer(realdata, realdata / "chat_templates" / "llama_cpp" / f"{name}.jinja")
    encoder, codes = ExampleEncoder(tokenizer), ""
    for kind in KINDS:
        conversation = chat(rng, kind)
        found = outcome(encoder, conversation)
        if isinstance(found, str):
            codes += CODES[found]
            continue
        codes += WHOLE if len(found) == 1 else PER_ANSWER
        begins = [(document, begin) for document in found for begin, _ in stretches(document)]
        for (document, begin), turn in zip(begins, answers(conversation), strict=True):
            turns, thinks = conversation.messages[:turn], "reasoning_content" in conversation.messages[turn]
            asked = [
                served.prompt(tokenizer, turns, conversation.tools, **options)
                for options in ({}, {"enable_thinking": thinks})
            ]
            assert document.input_ids[:begin].tolist() in asked
    assert codes == SERVED[name]


def test_every_real_template_is_in_the_table(realdata):
    assert {path.stem for path in (realdata / "chat_templates" / "llama_cpp").glob("*.jinja")} == SERVED.keys()


VICUNA = (
    "{{ bos_token }} A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "{% for m in messages %}{% if m.role == 'user' %} USER: {{ m.content }} "
    "{% else %} ASSISTANT: {{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token }} [INST] {{ system if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
GOLDEN = "data/axolotl_fixtures/conversation"
# What old tokenizers made of an end token that had no blank in front: its characters.
AS_TEXT = [".</", "s", ">"]


def golden(realdata, name, template):
    """Ids and mask made with another program, without padding, and ours of the same conversation."""
    tokenizer = real_tokenizer(realdata, "tinyllama_chat_hf")
    rows = json.loads((realdata / f"{GOLDEN}.json").read_text(encoding="utf-8"))["conversations"]
    theirs = json.loads((realdata / f"{GOLDEN}.{name}.json").read_text(encoding="utf-8"))
    kept = sum(theirs["attention_mask"])
    ids, mask = theirs["input_ids"][:kept], [label != -100 for label in theirs["labels"][:kept]]
    if "system" in template:  # Llama-2's own, of which the ids hold the only copy
        system = tokenizer.decode(ids)
        system = system[system.index("<<SYS>>") : system.index(rows[0]["value"])]
        template = "{% set system = " + repr(system) + " %}" + template
    tokenizer.chat_template = template
    messages = [{"role": {"human": "user", "gpt": "assistant"}[row["from"]], "content": row["value"]} for row in rows]
    document = only(encode(ExampleEncoder(tokenizer), Conversation(messages)).documents)
    return tokenizer, (ids, mask), (document.input_ids.tolist(), document.loss_mask.tolist())


def test_a_llama2_chat_is_the_ids_and_labels_made_elsewhere(realdata):
    tokenizer, (ids, mask), ours = golden(realdata, "tokenized_llama2chat", LLAMA2)
    # Theirs learns one token more: the BOS of a turn that never comes.
    assert (ids.pop(), mask.pop()) == (tokenizer.bos_token_id, True)
    assert ours == (ids, mask)


def test_a_vicuna_chat_is_the_ids_and_labels_made_elsewhere(realdata):
    tokenizer, (ids, mask), ours = golden(realdata, "tokenized", VICUNA)
    # Theirs learns the characters of an end token in front of each end token; all else is the same.
    spelled = tokenizer.convert_tokens_to_ids(AS_TEXT)
    places = [place for place in range(len(ids)) if ids[place : place + 3] == spelled]
    assert all(mask[place] and ids[place + 3] == tokenizer.eos_token_id for place in places)
    for place in reversed(places):
        ids[place : place + 3], mask[place : place + 3] = [tokenizer.convert_tokens_to_ids(".")], [True]
    assert len(places) == 6
    assert ours == (ids, mask)
