"""Conversations to test chat templates with; every turn has words that no other turn has.

A word such as `a3x` is said by turn 3. Its letter is its kind: `s` a system prompt, `u` a user's text, `a` an
answer that is supervised, `m` one that is masked, `r` reasoning, `c` a call, `t` a tool's result, `d` its description.
"""

from typing import Any

Row = dict[str, Any]

TOOL = {
    "type": "function",
    "function": {
        "name": "d0xlookup",
        "description": "d1x finds a word",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "d2x the key"}}},
    },
}


def turn(role: str, content: Any, **keys: Any) -> Row:
    """Return a turn of a conversation."""
    return {"role": role, "content": content, **keys}


def call(number: int, key: str | None = None) -> Row:
    """Return a call of the tool, with an argument of its own; the id has the length that Mistral's templates demand."""
    function = {"name": "d0xlookup", "arguments": {"key": key or f"c{number}x"}}
    return {"type": "function", "id": f"callnum0{number}", "function": function}


def calling(number: int, *calls: int, content: str = "", **keys: Any) -> list[Row]:
    """Return a turn that calls the tool once or several times, and the results."""
    made = [call(each) for each in calls or (number,)]
    results = [
        turn("tool", f"t{number + place}x found", name="d0xlookup", tool_call_id=one["id"])
        for place, one in enumerate(made, start=1)
    ]
    return [turn("assistant", content, tool_calls=made, **keys), *results]


def dialogue(*answers: Any, **keys: Any) -> list[Row]:
    """Return each answer after a question; every answer has the keys."""
    turns = []
    for place, answer in enumerate(answers):
        turns += [turn("user", f"u{2 * place}x asks for u{2 * place}xb?"), turn("assistant", answer, **keys)]
    return turns


def part(text: str, **keys: Any) -> Row:
    """Return a part of a turn's content."""
    return {"type": "text", "text": text, **keys}


def conversations(end: str) -> dict[str, Row]:
    """Return rows by the feature that they test.

    Args:
        end: The tokenizer's end token, as text.
    """
    asked, system = turn("user", "u0x asks for u0xb?"), turn("system", "s0x is kind")
    thinking = {"reasoning_content": "r1x weighs it."}
    masked_in_front = [part("m1x", train=False), part(" is a1x")]
    code = "a1x:\n```python\ndef a1xb(n):\n\treturn {'k': [n]}  # {{ a1xc }} {% if a1xd %}\n```\na1xe"
    rows: dict[str, list[Row]] = {
        "one answer": dialogue("a1x says a1xb."),
        "three answers": dialogue("a1x says a1xb.", "a3x says so", "a5x!"),
        "system": [system, *dialogue("a1x says a1xb.")],
        "system, three answers": [system, *dialogue("a1x says a1xb.", "a3x says so", "a5x!")],
        "call": [asked, *calling(1), turn("assistant", "a3x is it.")],
        "call, question behind": [
            asked, *calling(1), turn("assistant", "a3x is it."), turn("user", "u4x thanks"), turn("assistant", "a5x"),
        ],
        "call with words": [asked, *calling(1, content="a1x looks."), turn("assistant", "a3x is it.")],
        "two calls": [asked, *calling(1, 1, 2), turn("assistant", "a4x is it.")],
        "call alone": [asked, *calling(1)[:1]],
        "reasoning": dialogue("a1x says a1xb.", **thinking),
        "reasoning in two answers": [
            *dialogue("a1x says a1xb.", **thinking),
            turn("user", "u2x?"), turn("assistant", "a3x", reasoning_content="r3x again\nand r3xb"),
        ],
        "reasoning once": [*dialogue("a1x says a1xb.", **thinking), turn("user", "u2x?"), turn("assistant", "a3x")],
        "reasoning, call": [
            asked, *calling(1, **thinking), turn("assistant", "a3x is it.", reasoning_content="r3x knows."),
        ],
        "thought in the content": dialogue("<think>\na1x weighs\n</think>\n\na1xb says."),
        "thoughts in the contents": dialogue("<think>a1x weighs</think>a1xb says.", "<think>\na3x\n</think>\na3xb"),
        "words about tags": dialogue("a1x opens <think> and a1xb closes </think>, a1xc.", "a3x </think> a3xb"),
        "unicode": dialogue("a1x 漢字 é ñ 🙂👍🏽 שלום a1xb —", "🙂a3x ‘q’ a3xb漢"),
        "code": dialogue(code, "a3x `x`"),
        "blanks in front": dialogue("  a1x says", "\n\n a3x says", "\ta5x"),
        "blanks behind": dialogue("a1x says  ", "a3x says\n\n", "a5x \n"),
        "blanks inside": dialogue("a1x   a1xb\n\n\n  a1xc", "a3x \t a3xb"),
        "signs at the borders": dialogue("(a1x)", "...a3x...", "</a5x>", '"a7x"', "#a9x]", "'s a11x"),
        "empty answer": dialogue("a1x", "", "a5x"),
        "empty question": [turn("user", ""), turn("assistant", "a1x"), turn("user", "u2x"), turn("assistant", "a3x")],
        "empty system": [turn("system", ""), *dialogue("a1x")],
        "two answers in a row": [asked, turn("assistant", "a1x says"), turn("assistant", "a2x adds")],
        "two questions in a row": [asked, turn("user", "u1x too?"), turn("assistant", "a2x says")],
        "question at the end": [*dialogue("a1x says", "a3x says"), turn("user", "u4x?")],
        "masked answer in front": [
            turn("assistant", "m0x hello", train=False), turn("user", "u1x"), turn("assistant", "a2x"),
        ],
        "masked turns": [
            *dialogue("m1x drafts", loss=False), turn("user", "u2x"), turn("assistant", "m3x drafts", masked=True),
            turn("user", "u4x"), turn("assistant", "a5x", weight=1), turn("user", "u6x"),
            turn("assistant", "m7x", trainable=False),
        ],
        "masked part in front": dialogue([part("m1x drafts, ", train=False), part("a1x is learned")], "a3x"),
        "masked part behind": dialogue("a1x", [part("a3x is learned "), part("m3x is not", loss_mask=0)], "a5x"),
        "masked part inside": dialogue([part("a1x("), part("m1xb", weight=0), part(")a1xc")], "a3x"),
        "masked part, its words in the reasoning": dialogue(masked_in_front, "a3x", reasoning_content="r1x reads m1x."),
        "masked part, its words in the reasoning, call": [
            asked, *calling(1, content=masked_in_front, reasoning_content="m1x is r1x"), turn("assistant", "a3x"),
        ],
        "parts": dialogue([part("a1x "), part("a1xb")]),
        "end token in a question": [turn("user", f"u0x means {end} u0xb?"), turn("assistant", "a1x"), *dialogue()],
        "end token behind an answer": dialogue(f"a1x{end}"),
        "end token in an answer": dialogue(f"a1x {end} a1xb", "a3x"),
        "end token in reasoning": dialogue("a1x", reasoning_content=f"r1x {end} r1xb"),
        "end token in a call": [asked, turn("assistant", "", tool_calls=[call(1, f"c1x {end} c1xb")])],
        "same question twice": [asked, turn("assistant", "a1x"), asked, turn("assistant", "a3x")],
        "same question twice in a row": [asked, asked, turn("assistant", "a2x")],
        "long": dialogue("a1x " * 1 + "word, and more words; " * 200 + "a1xb", "a3x"),
    }  # fmt: skip
    return {
        name: {"messages": turns} | ({"tools": [TOOL]} if any("tool_calls" in one for one in turns) else {})
        for name, turns in rows.items()
    }
