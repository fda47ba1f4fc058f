"""What a GGUF file says besides its weights, as a folder of transformers: config, tokenizer, generation settings.

transformers converts them; the folder is cached by the file's contents, because that takes seconds for a large
vocabulary. The table of the tensors is cached with them, as places in the file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.files.atomic import atomic_folder
from qlora.files.gguf_config import check_architecture, complete_config
from qlora.files.json_files import read_object
from qlora.files.lock import wait_for_lock

TABLE_FILE = "gguf.json"
FORMAT = 2
# Keys of a model card by a GGUF file's.
CARD_KEYS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}


def gguf_folder(path: Path, digest: str) -> Path:
    """Return a folder with the config.json, tokenizer and generation config of a GGUF file, and :data:`TABLE_FILE`.

    A process that finds another writing the folder waits for it.

    Args:
        path: The GGUF file.
        digest: Hash of its contents.

    Raises:
        ModelError: The gguf package is missing, the file is damaged, its architecture or a key of it is not supported,
            or the cache can't be written.
    """
    import transformers

    key = hashlib.sha256(f"{digest} {transformers.__version__} {FORMAT}".encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora" / "gguf"
    folder = root / key
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(root / f"{key}.lock"):
            if not folder.is_dir():  # otherwise another process has written it meanwhile
                with atomic_folder(folder, OSError) as staging:
                    _write(path, staging)
    except OSError as error:
        raise ModelError(
            f"{path}: its config and tokenizer can't be written to {root} ({error}); set XDG_CACHE_HOME to a folder "
            "that can be written."
        ) from error
    return folder


def read_table(folder: Path) -> dict[str, Any]:
    """Read the table of a GGUF file's tensors: `tensors` by name, and `config`, which transformers' tables need."""
    return read_object(folder / TABLE_FILE, ModelError, f"delete the folder {folder}, which is written again")


def _write(path: Path, folder: Path) -> None:
    try:
        import gguf
    except ImportError:
        raise ModelError(f"{path}: reading GGUF needs the gguf package: pip install gguf.") from None
    from transformers import AutoConfig, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        reader = gguf.GGUFReader(path)
        read = [key for key in reader.fields if not key.startswith("tokenizer.") or key.endswith("_token_id")]
        fields = {key: reader.fields[key].contents() for key in read}
        tensors = {
            tensor.name: {
                "kind": int(tensor.tensor_type),
                "shape": [int(size) for size in reversed(tensor.shape.tolist())],
                "start": int(tensor.data_offset),
                "bytes": int(tensor.n_bytes),
            }
            for tensor in reader.tensors
        }
    except Exception as error:  # a damaged file can make the reader raise anything
        raise ModelError(f"{path} is truncated or damaged ({error}); download it again.") from None
    architecture = check_architecture(fields, path)
    try:
        parsed = load_gguf_checkpoint(str(path))["config"]
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        complete_config(config, fields, tensors, path)
    except ModelError:
        raise
    except Exception as error:  # a file can make the conversion raise anything
        raise ModelError(
            f"{path}: transformers can't read this GGUF file of {architecture}: {type(error).__name__}: {error}. Use "
            "the same model in 16-bit safetensors."
        ) from error
    if config.num_hidden_layers > len(tensors):
        raise ModelError(f"{path} has {len(tensors)} tensors, too few for its layers; download it again.")
    ids = {int(fields[key]) for kind in ("eos", "eot") if (key := f"tokenizer.ggml.{kind}_token_id") in fields}
    if not ids and tokenizer.eos_token_id is None:
        raise ModelError(f"{path} has no end token; use the same model in 16-bit safetensors.")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": sorted(ids)} if ids else {}
    generation = {"bos_token_id": tokenizer.bos_token_id, **ends}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    card = [f"{key}: {json.dumps(fields[name])}\n" for key, name in CARD_KEYS.items() if name in fields]
    if card:
        (folder / "README.md").write_text("".join(["---\n", *card, "---\n"]), encoding="utf-8")
    table = {"architecture": architecture, "config": parsed, "tensors": tensors}
    (folder / TABLE_FILE).write_text(json.dumps(table), encoding="utf-8")
