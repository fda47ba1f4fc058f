"""What these tests share: a merged folder, changed."""

import json

from safetensors.torch import load_file, save_file


def change_tensors(folder, change):
    """Loads what merge wrote, changes its tensors and saves them."""
    path = folder / "out" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def forget_adapter(folder):
    """Leaves the adapter's hash out of a merge's report, as qlora 0.1.0 did: only the tensors tell whose it is."""
    path = folder / "merge_report.json"
    report = json.loads(path.read_text())
    del report["adapter"]
    path.write_text(json.dumps(report))
