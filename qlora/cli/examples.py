"""Examples of each verb, which its help ends with."""

EXAMPLES = {
    "init": ("qlora init", "qlora init llama3_8b_24gb -o my.yaml", "qlora init --from axolotl.yml -o my.yaml"),
    "explain": ("qlora explain train.learning_rate", "qlora explain data"),
    "preview": ("qlora preview my.yaml", "qlora preview my.yaml -n 20 --html preview.html"),
    "estimate": ("qlora estimate my.yaml --gpu 24GB", "qlora estimate my.yaml data.max_seq_len=8192"),
    "tune": ("qlora tune my.yaml --budget 30m -o tuned.yaml",),
    "train": (
        "qlora train my.yaml",
        "qlora train my.yaml train.max_steps=100 train.output_dir=runs/short",
        "qlora train my.yaml --fresh",
        "torchrun --standalone --nproc_per_node 2 -m qlora train my.yaml",
    ),
    "report": ("qlora report runs/mine", "qlora report runs", "qlora report runs/mine runs/other -o compare.html"),
    "eval": ("qlora eval runs/mine", "qlora eval runs/mine --data test.jsonl --metric exact_match"),
    "generate": (
        'qlora generate runs/mine --prompt "What is LoRA?"',
        "qlora generate runs/mine --prompts questions.jsonl -o answers.jsonl",
    ),
    "chat": ("qlora chat runs/mine", 'qlora chat merged/mine --system "Answer in one sentence."'),
    "predict": ("qlora predict runs/labels --data texts.csv -o labelled.jsonl",),
    "merge": (
        "qlora merge runs/mine -o merged/mine",
        "qlora merge runs/mine -o merged/mine --onto best",
        "qlora merge runs/mine -o merged/mine-gguf --format gguf --dtype q8_0",
    ),
    "verify": (
        "qlora verify runs/mine merged/mine",
        "qlora verify runs/mine merged/mine --clients",
        "qlora verify runs/mine",
    ),
    "quantize": ("qlora quantize meta-llama/Llama-3.1-8B -o base-4bit",),
    "doctor": ("qlora doctor", "qlora doctor --check-resume my.yaml"),
}


def examples_of(verb: str) -> str:
    """Return a verb's examples as the end of its help, a paragraph each."""
    return "\n\n".join(["Examples:", *(f"  {example}" for example in EXAMPLES[verb])])
