"""Formats of model families by their publishers' descriptions: strings built turn by turn."""

import json


def chatml(messages, tools, is_prompt):
    """Return ChatML, without the line end after a last answer, which no server reads."""
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return text + "<|im_start|>assistant\n" if is_prompt else text.removesuffix("\n")


def phi4(messages, tools, is_prompt):
    """Return every turn after its role, without line ends."""
    text = "".join(f"<|im_start|>{turn['role']}<|im_sep|>{turn['content']}<|im_end|>" for turn in messages)
    return text + "<|im_start|>assistant<|im_sep|>" * is_prompt


def llama2(messages, tools, is_prompt):
    """Return a text for each question with its answer; the system message is in the first question."""
    system, turns = _split(messages)
    if system is not None:
        turns[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0]}"
    text = ""
    for number, turn in enumerate(turns):
        text += f" {turn.strip()} </s>" if number % 2 else f"<s>[INST] {turn.strip()} [/INST]"
    return text


def mistral(messages, tools, is_prompt):
    """Return the format of tokenizer version 3, on SentencePiece; system message and tools are in the last question."""
    system, turns = messages[0]["content"], messages[1:]
    if messages[0]["role"] != "system":
        system, turns = None, messages
    last = [turn for turn in turns if turn["role"] == "user"][-1]
    text = "<s>"
    for turn in turns:
        said = turn["content"]
        if "tool_calls" in turn:
            calls = [call["function"] | {"id": call["id"]} for call in turn["tool_calls"]]
            text += f"[TOOL_CALLS] {_json(calls)}</s>"
        elif turn["role"] == "assistant":
            text += f" {said.strip()}</s>"
        elif turn["role"] == "tool":
            text += f'[TOOL_RESULTS] {{"content": {said}, "call_id": "{turn["tool_call_id"]}"}}[/TOOL_RESULTS]'
        else:
            if tools and turn == last:
                text += f"[AVAILABLE_TOOLS] {_json(tools)}[/AVAILABLE_TOOLS]"
            text += f"[INST] {f'{system}{chr(10) * 2}' if system is not None and turn is last else ''}{said}[/INST]"
    return text


def _json(value):
    return json.dumps(value, ensure_ascii=False)


def _split(messages):
    """Return the system message, or None, and the contents of the turns."""
    contents = [turn["content"] for turn in messages]
    return (contents[0], contents[1:]) if messages[0]["role"] == "system" else (None, contents)
