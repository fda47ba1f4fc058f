"""Configs, tokenizers and cards of GGUF files; what has no place there is refused."""

import threading
from types import SimpleNamespace

import pytest
import transformers

from qlora.errors import ModelError
from qlora.export.card import read_license
from qlora.files import BaseFiles
from qlora.files.gguf_config import COMMON_KEYS, GEMMA_KEYS, complete_config
from qlora.files.gguf_folder import gguf_folder
from qlora.files.lock import wait_for_lock
from tests.gguf_files import write_gguf_of

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
GEMMA_27B = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128, "num_hidden_layers": 62}


def test_a_scaling_of_gemma_3_is_that_of_its_global_layers(tmp_path, seed):
    fields = {**LINEAR, "rope.freq_base_swa": 20_000.0, "/general.license": "gemma"}
    _, path = write_gguf_of("gemma3", tmp_path / "a.gguf", seed, fields, num_hidden_layers=1)
    files = BaseFiles.resolve(str(path))
    assert files.config["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert files.config["dtype"] == "float32"
    assert read_license(files.folder) == {"license": "gemma"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention.scale": 0.1}, r"has llama\.attention\.scale: 0\.1.*, which has no place in transformers' config"),
        ({"rope.dimension_count": 8}, r"has llama\.rope\.dimension_count: 8, which has no place"),
        ({"attention.sliding_window": 8}, r"has llama\.attention\.sliding_window: 8, which has no place"),
        ({"rope.scaling.type": "yarn"}, "of the type yarn without a factor"),
        ({"rope.scaling.type": "longrope"}, "of the type longrope, which is not supported"),
        ({"/general.name": "mistral"}, "transformers reads llama as mistral"),
        ({"/general.architecture": "gpt-oss"}, "of the architecture gpt-oss; those supported are llama, qwen2"),
        ({"/general.architecture": "t5"}, "of the architecture t5; those supported are llama, qwen2"),
        ({"/general.type": "adapter"}, "is an adapter for llama.cpp, without its base. Use the same adapter in PEFT's"),
        ({"attention.head_count": None}, r"lacks llama\.attention\.head_count; download it again"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_with_more_than_a_config_holds_is_refused(fields, message, tmp_path, seed):
    fields = {"rope.scaling.finetuned": True} | fields
    _, path = write_gguf_of("llama", tmp_path / "a.gguf", seed, fields, num_hidden_layers=1)
    with pytest.raises(ModelError, match=message):
        BaseFiles.resolve(str(path))


@pytest.mark.parametrize(("num_layers", "expected"), [(62, 168), (34, 128)])
def test_gemma_27b_scales_attention_by_its_width_per_head(num_layers, expected):
    config = transformers.Gemma3TextConfig(**{**GEMMA_27B, "num_hidden_layers": num_layers})
    own = {key: getattr(config, name) for key, name in {**COMMON_KEYS, **GEMMA_KEYS}.items()}
    fields = {f"gemma3.{key}": value for key, value in own.items()}
    fields |= {"general.architecture": "gemma3", "gemma3.attention.key_length": 128}
    complete_config(config, fields, {}, SimpleNamespace())
    assert config.query_pre_attn_scalar == expected


def test_a_second_process_waits_for_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="truncated or damaged"):
        gguf_folder(tmp_path / "no.gguf", "digest")
    root = tmp_path / "qlora" / "gguf"
    (lock,) = root.glob("*.lock")
    found = []
    with wait_for_lock(lock):
        other = threading.Thread(target=lambda: found.append(gguf_folder(tmp_path / "no.gguf", "digest")))
        other.start()
        other.join(timeout=0.2)
        assert other.is_alive()
        lock.with_suffix("").mkdir()
    other.join(timeout=10)
    assert found == [lock.with_suffix("")]


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"a\.gguf: .* can't be written to .*; set XDG_CACHE_HOME"):
        gguf_folder(tmp_path / "a.gguf", "digest")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a-00001-of-00003.gguf", r"is one of 3 parts; join them with llama\.cpp's gguf-split --merge"),
        ("missing.gguf", r"The GGUF file .*/missing\.gguf does not exist"),
    ],
)
def test_parts_and_missing_files_are_refused_by_name(name, message, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"a-0000{number}-of-00003.gguf").touch()
    with pytest.raises(ModelError, match=message):
        BaseFiles.resolve(str(tmp_path / name))
    with pytest.raises(ModelError, match="is one of 3 parts"):
        BaseFiles.resolve(str(tmp_path))
