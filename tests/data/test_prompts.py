"""Prompts from a file: those that the template would not write in full are refused."""

import json

import pytest

from qlora.data.prompts import check_prompts, read_prompts
from qlora.errors import DataError
from tests.data.chats import PROMPT, TOOLS, TURN
from tests.tiny import make_tokenizer

END = "{{ eos_token }}"
WITHOUT_SYSTEM = TURN.replace("messages %}", "messages if m.role != 'system' %}") + END + "{% endfor %}" + PROMPT
FIRST_ONLY = TURN.replace("messages %}", "messages[:1] %}") + END + "{% endfor %}" + PROMPT

SYSTEM, FIRST, SECOND = ({"role": role, "content": role * 2} for role in ("system", "user", "user"))
ROWS = [
    {"prompt": [FIRST]},
    {"prompt": [SYSTEM, FIRST]},
    {"prompt": [FIRST], "tools": TOOLS},
    {"prompt": [FIRST, SECOND | {"content": "Why?"}]},
]


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (WITHOUT_SYSTEM, {2: "system turn", 3: "tools"}),
        (FIRST_ONLY, {2: "the user turn's text, 'useruser'", 3: "tools", 4: "the user turn's text, 'Why?'"}),
    ],
)
def test_what_the_template_would_leave_out_of_prompts_is_refused(tmp_path, template, lost):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(DataError) as caught:
        check_prompts(make_tokenizer(chat_template=template), read_prompts(str(path)))
    _, *lines = str(caught.value).splitlines()
    for line, (number, said) in zip(lines, lost.items(), strict=True):
        assert line.strip().startswith(f"{path}:{number}: the chat template leaves out ")
        assert said in line
