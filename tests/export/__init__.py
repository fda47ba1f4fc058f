"""Shared helpers: changes to a merged folder."""

import json

from safetensors.torch import load_file, save_file


def change_tensors(folder, change):
    """Load the tensors of a merged folder, change them and save them."""
    path = folder / "out" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def forget_adapter(folder):
    """Remove the adapter's hash from a merge report, as in those of qlora 0.1.0, so that the tensors are compared."""
    path = folder / "merge_report.json"
    report = json.loads(path.read_text())
    del report["adapter"]
    path.write_text(json.dumps(report))
