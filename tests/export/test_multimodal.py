"""Releases of multimodal bases: the text part is merged, everything else travels under its own name."""

import json
import os
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora.export import merge
from qlora.files import BaseFiles
from qlora.model import build_skeleton
from qlora.model.base_weights import BaseWeights
from qlora.model.text_only import tensors_of_text
from qlora.proof import verify
from scripts.dev.bench import proof_families as families
from tests.multimodal import FAMILIES, make_multimodal

# Families whose files have other names than their modules, and the one with most parts; QLORA_SWEEP=1 checks all.
CHECKED = tuple(FAMILIES) if os.environ.get("QLORA_SWEEP") else ("llava", "qwen2_5_vl", "gemma4")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(request, alpaca_file, tmp_path_factory):
    """A base of a family, in either layout, and its run; not to be changed."""
    folder, seed = tmp_path_factory.mktemp(request.param), random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    base = make_multimodal(folder / "base", request.param, seed, is_published=seed % 2 == 0)
    (base / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return base, families.train_run(base, alpaca_file, folder / "run")


@pytest.mark.parametrize("trained", CHECKED, indirect=True)
def test_a_release_matches_the_run_and_peft_on_the_whole_model(trained, tmp_path):
    pytest.importorskip("peft")
    base, run = trained
    proof = families.prove(base, run, tmp_path, "AutoModelForImageTextToText")
    assert proof.problems["dequantized"] == []
    assert all("is worse than the adapter's" in problem for problem in proof.problems["original"])
    assert abs(proof.max_kl) < 1e-6
    assert proof.peft_difference < 5e-5 < proof.update / 100

    merged = tmp_path / "dequantized"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert {*before} == {*after}
    files = BaseFiles.resolve(str(base))
    of_text = tensors_of_text(build_skeleton(files), BaseWeights(files).shapes)
    others = {*before} - of_text
    assert others
    assert all(torch.equal(before[name].float(), after[name]) for name in others)
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == files.config["architectures"]
    assert config["text_config"].get("dtype", "float32") == "float32"
    assert (merged / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    assert json.loads((merged / "chat_template.json").read_text()) == {"chat_template": TEMPLATE}
    assert (merged / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize("trained", ["llava"], indirect=True)
def test_the_text_part_as_gguf(trained, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    _, run = trained
    merge(run, tmp_path / "out", "float16", format="gguf")
    report = verify(run, tmp_path / "out")
    assert report.problems == []
    merge(run, tmp_path / "whole", "float16")
    path = next((tmp_path / "out").glob("*.gguf")).name
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=path, dtype=torch.float32)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    ids = torch.randint(4, 256, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, whole(input_ids=ids).logits, atol=1e-4, rtol=0)
