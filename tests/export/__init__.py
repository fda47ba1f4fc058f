"""What these tests share: a merged folder, changed."""

from safetensors.torch import load_file, save_file


def change_tensors(folder, change):
    """Loads what merge wrote, changes its tensors and saves them."""
    path = folder / "out" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
