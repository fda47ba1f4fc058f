"""Small valid files of every kind that is read, from which inputs are made."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import save_checkpoint
from qlora.lora import add_lora
from qlora.optim import FlatParameters, make_optimizer
from qlora.training.progress import Progress
from scripts.dev.fuzzing.altering import contents

CONFIG = {
    "model": {"base": "x", "revision": None, "quantization": "nf4", "double_quant": True, "attention": "auto"},
    "lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["q_proj"], "rslora": False},
    "data": {"train": [{"path": "a.jsonl", "weight": 2, "columns": {"text": "b"}}], "eval": 0.1, "max_seq_len": 64},
    "train": {"output_dir": "runs/x", "betas": [0.9, 0.99], "learning_rate": 1e-4, "eval_every": 0.5},
    "export": {"dtype": "float16", "max_shard_size": "5GB"},
}
TURNS = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
CALLS = [{"type": "function", "id": "abcdefgh1", "function": {"name": "f", "arguments": {"x": 1}}}]
ROWS: list[dict[str, Any]] = [
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
    {"messages": [*TURNS, {"role": "assistant", "content": "", "tool_calls": CALLS, "weight": 0}], "tools": CALLS},
    {"prompt": "a", "completion": "b"}, {"text": "a", "label": 1}, {"input_ids": [1, 2], "labels": [-100, 2]},
    {"prompt": TURNS[:2], "chosen": TURNS[2:], "rejected": TURNS[2:]}, {"messages": TURNS, "label": True},
    {"message_tree_id": "a", "prompt": {"text": "a", "role": "prompter", "replies": [{"text": "b", "role": "x"}]}},
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m['content'] | trim }}{% else %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% set x = namespace(a=1) %}{% endfor %}"
    "{{ tools | tojson }}{{ raise_exception('no') if messages|length > 9 }}{{ strftime_now('%d') }}"
)
ENCODINGS, KINDS = (
    ["utf-8", "latin-1", "utf-16", "utf-7", "idna", "cp037", "x"],
    ["auto", "lines", "text", "csv", "json"],
)


class Samples:
    """Valid files of every kind, from which inputs are made.

    Args:
        folder: Folder to make them in.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import save_file
        from tokenizers import Tokenizer, models
        from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
        add_lora(self.model, rank=2, alpha=4)
        flat = FlatParameters((name, each) for name, each in self.model.named_parameters() if each.requires_grad)
        self.optimizer = make_optimizer("adamw_32bit", flat)
        origin = {"settings": {}}
        save_checkpoint(folder / "checkpoint", self.model, self.optimizer, vars_of(Progress()), "base", origin)
        self.checkpoint = contents(folder / "checkpoint")
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
        )
        model = AutoModelForCausalLM.from_config(config)
        words = {word: number for number, word in enumerate(["<s>", "</s>", "a", "b", "c", "[UNK]"])}
        backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        self.tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE}
        GenerationConfig(eos_token_id=[1, 2], temperature=0.5, do_sample=True).save_pretrained(folder / "base")
        self.tokenizer.save_pretrained(folder / "base")
        self.about = contents(folder / "base")
        model.save_pretrained(folder / "base")
        (folder / "base" / "model.safetensors").unlink()
        names = sorted(model.state_dict())
        for number, part in enumerate((names[::2], names[1::2])):
            save_file(
                {name: model.state_dict()[name].clone() for name in part}, folder / "base" / f"{number}.safetensors"
            )
        index = {"weight_map": {name: f"{number % 2}.safetensors" for number, name in enumerate(names)}}
        (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        self.base = {name: content for name, content in contents(folder / "base").items() if name not in self.about}
        self.rows = row_files()
        self.run = {"config.yaml": json.dumps(CONFIG).encode(), "run.json": json.dumps(RECORD).encode()}
        self.run["metrics.jsonl"] = (
            b'{"step": 0, "eval_loss": 2.5}\n{"step": 1, "loss": 2.25, "tokens": 7}\n{"step": 2}\n'
        )


RECORD: dict[str, Any] = {
    "versions": {"qlora": "0.1.0"}, "hardware": {"gpus": []}, "seed": 0,
    "base": {"name": "x", "revision": None, "commit": None, "files": {"config.json": "00"}},
    "quantization": {"kind": "nf4", "double_quant": True, "block_size": 64, "from_4bit_checkpoint": False},
    "total_steps": 3,
    "in_use": {
        "device": "cpu", "processes": 1, "compute_dtype": "bfloat16", "attention": "sdpa", "activations": "torch",
        "dequantize": None, "recompute": "none", "recompute_why": "", "tiled": False, "weights_kept": 0,
        "memory": {"available": 1, "estimated": None, "measured": None}, "optimizer": "adamw_8bit",
        "optimizer_state_paged": False, "rounding": "stochastic", "micro_batch_parts": 1, "deterministic": None,
        "packing_fill": None,
    },
    "continued_from": None,
    "parameters": {
        "num_parameters": 1, "num_trained": 1, "quantized_share": 1.0, "adapted_share": 1.0, "base_bytes": 1,
        "quantized": ["a"], "unquantized": [], "trained_rows": {"b": [0, 1]}, "shared_rows": False, "adapted": ["a"],
    },
    "data": [{"source": "a", "digest": "00"}], "examples": {"train": 1, "eval": 0}, "status": "finished", "steps": 3,
}  # fmt: skip


def vars_of(progress: Progress) -> dict[str, Any]:
    """Return a progress as a checkpoint stores it."""
    return {name: getattr(progress, name) for name in progress.__slots__}


def row_files() -> dict[str, bytes]:
    """Return a file of rows of every type, plain and compressed, by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{"text": "a", "turns": [{"role": "user", "content": "b"}], "n": 1}] * 3)
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    files = {
        "rows.json": json.dumps(ROWS, indent=1).encode(), "rows.jsonl": lines, "rows.txt": lines,
        "rows.csv": b'a,b\n1,"x\n""y"\n3,4\n', "rows.tsv": b"a\tb\n1\t2\n",
    }  # fmt: skip
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    return files | packed | {"rows.parquet": parquet.getvalue(), "rows.arrow": arrow.getvalue()}
