"""Training state on disk: it is restored completely, and a damaged file is reported."""

import json
import shutil

import pytest
import torch

from qlora.checkpoint import (
    check_whole,
    checkpoint_bytes,
    drop_old_checkpoints,
    load_state,
    newest_whole,
    quarantine,
    read_origin,
    save_checkpoint,
)
from qlora.errors import CheckpointError
from qlora.lora import add_lora
from qlora.model import load_base
from qlora.optim import OPTIMIZERS, FlatParameters, make_optimizer
from tests.files.test_atomic import no_room_for

FILES = ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "origin.json", "progress.json"]
ORIGIN = {"settings": {"lora.rank": 4}, "base": {"config.json": "ab"}}
PROGRESS = {"step": 3, "tokens": 40, "supervised_tokens": 7, "loss_scale": {}}


def make_parts(base, optimizer="paged_adamw_8bit", rounding="stochastic", rank=4, seed=0):
    model, _ = load_base(str(base))
    add_lora(model, rank=rank, seed=seed)
    flat = FlatParameters((name, value) for name, value in model.named_parameters() if value.requires_grad)
    return model, make_optimizer(optimizer, flat, rounding=rounding, seed=seed)


def take_step(optimizer, generator):
    for parameter in optimizer.flat._parameters:  # not the padding between them, which never has a gradient
        parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step(1e-3)


def trained(model):
    return torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad])


@pytest.fixture
def saved(tiny_base, tmp_path, generator):
    """A checkpoint after three steps, with its model and optimizer."""
    model, optimizer = make_parts(tiny_base)
    for _ in range(3):
        take_step(optimizer, generator)
    folder = tmp_path / "checkpoints" / "step-000003"
    save_checkpoint(folder, model, optimizer, PROGRESS, "base", ORIGIN)
    return folder, model, optimizer


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_bit_for_bit(name, rounding, tiny_base, tmp_path, generator, seed):
    model, optimizer = make_parts(tiny_base, name, rounding)
    for _ in range(3):
        take_step(optimizer, generator)
    save_checkpoint(tmp_path / "state", model, optimizer, PROGRESS, "base", ORIGIN)

    other_model, other = make_parts(tiny_base, name, rounding, seed=9)
    assert not torch.equal(trained(other_model), trained(model))
    assert load_state(tmp_path / "state", other_model, other) == PROGRESS
    assert torch.equal(trained(other_model), trained(model))
    for one in (optimizer, other):
        torch_generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            take_step(one, torch_generator)
    assert torch.equal(trained(other_model), trained(model))
    for key, value in optimizer.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_the_manifest_names_every_file_with_its_size_and_hash(saved):
    manifest = json.loads((saved[0] / "manifest.json").read_text())
    assert sorted(manifest) == FILES
    assert sorted(path.name for path in saved[0].iterdir()) == sorted([*FILES, "manifest.json"])
    assert all(entry["bytes"] == (saved[0] / name).stat().st_size for name, entry in manifest.items())
    check_whole(saved[0])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_named(damage, name, saved, seed):
    path = saved[0] / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[seed % len(content)] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged".replace(".", r"\.")):
        load_state(*saved)


def test_a_folder_without_a_manifest_is_not_a_complete_checkpoint(saved):
    (saved[0] / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_state(*saved)
    (saved[0] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_state(*saved)


def test_the_state_of_another_optimizer_is_refused(saved, tiny_base):
    for name, rounding in (("paged_adamw_32bit", "stochastic"), ("paged_adamw_8bit", "master")):
        with pytest.raises(CheckpointError, match="optimizer state has"):
            load_state(saved[0], *make_parts(tiny_base, name, rounding))


def test_the_state_of_other_adapters_is_refused(saved, tiny_base):
    with pytest.raises(CheckpointError, match="factors"):
        load_state(saved[0], *make_parts(tiny_base, rank=8))


def test_a_full_disk_leaves_no_checkpoint_and_is_reported(tiny_base, tmp_path, saved):
    folder, model, optimizer = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, folder.with_name("step-000004")):
        with no_room_for(8_000), pytest.raises(CheckpointError, match=rf"{target.name} can't be written.*MB are free"):
            save_checkpoint(target, model, optimizer, PROGRESS, "base", ORIGIN)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_only_the_newest_checkpoints_are_kept(saved):
    folders = [saved[0]] + [saved[0].with_name(f"step-{step:06d}") for step in (6, 9, 12)]
    for folder in folders[1:]:
        shutil.copytree(saved[0], folder)
    drop_old_checkpoints(folders, 2)
    assert sorted(path.name for path in saved[0].parent.iterdir()) == ["step-000009", "step-000012"]
    drop_old_checkpoints(folders[2:], 5)
    assert len(list(saved[0].parent.iterdir())) == 2


def copies(saved, *steps):
    folders = [saved[0].with_name(f"step-{step:06d}") for step in steps]
    for folder in folders:
        shutil.copytree(saved[0], folder)
    return folders


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_checkpoint_is_reported_and_skipped(name, saved):
    older, newer, newest = copies(saved, 6, 9, 12)
    (newest / name).unlink()
    (newer / name).write_bytes(b"\0" * 100)
    found, damaged = newest_whole([saved[0], older, newer, newest])
    assert found == older
    assert list(damaged) == [newest, newer]
    assert all(name in what for what in damaged.values())
    shutil.rmtree(older)
    shutil.rmtree(saved[0])
    assert newest_whole([newer, newest])[0] is None


@pytest.mark.parametrize("text", ["{}", "[]", '{"progress.json": 3}'])
def test_a_manifest_that_lacks_files_is_not_a_complete_checkpoint(text, saved):
    (saved[0] / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        check_whole(saved[0])


def test_a_damaged_checkpoint_can_be_quarantined_repeatedly(saved):
    first, second = copies(saved, 6, 9)
    quarantine(first)
    second.rename(first)
    (first / "progress.json").unlink()
    assert quarantine(first).name == "step-000006.damaged"
    assert {path.name for path in saved[0].parent.iterdir()} == {"step-000003", "step-000006.damaged"}
    assert not (saved[0].parent / "step-000006.damaged" / "progress.json").exists()


def test_a_checkpoint_contains_its_origin(saved):
    assert read_origin(saved[0]) == ORIGIN


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_save_takes_no_more_space_than_predicted(name, rounding, tiny_base, tmp_path):
    model, optimizer = make_parts(tiny_base, name, rounding)
    save_checkpoint(tmp_path / "state", model, optimizer, PROGRESS, "base", ORIGIN)
    taken = sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
    assert taken <= checkpoint_bytes(model, optimizer) <= taken + (1 << 20)
