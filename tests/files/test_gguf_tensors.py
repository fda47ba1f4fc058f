"""Tensors of GGUF files by rows: equal to what the gguf package decodes, in the order that transformers uses."""

import numpy as np
import pytest
import torch

from qlora.files.gguf_tensors import GGUFTensors, Place

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
HEADS, ROWS, COLUMNS = 2, 12, 512


def in_pairs(name, values):
    """Reorder rows as files of Llama have those of queries."""
    halves = values.reshape(HEADS, ROWS // HEADS // 2, 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def open_tensor(folder, kind, seed, restore):
    """Return a reader of a file with a tensor of random codes, and the tensor as the gguf package decodes it."""
    of = getattr(gguf.GGMLQuantizationType, kind)
    block, num_bytes = gguf.GGML_QUANT_SIZES[of]
    raw = np.random.default_rng(seed).integers(0, 60, (ROWS, COLUMNS // block * num_bytes), dtype=np.uint8)
    (folder / "a.gguf").write_bytes(b"header" + raw.tobytes())
    place = Place(int(of), (ROWS, COLUMNS), len(b"header"), raw.nbytes)
    reader = GGUFTensors(folder / "a.gguf", {"q": place}, {"wq": ["q"]}, {"wq": (ROWS, COLUMNS)}, restore)
    plain = {"F32": np.float32, "F16": np.float16}
    decoded = raw.view(plain[kind]) if kind in plain else gguf.quants.dequantize(raw, of)
    return reader, torch.from_numpy(restore("q", np.asarray(decoded, np.float32)).copy())


@pytest.mark.parametrize("restore", [lambda name, values: values, in_pairs], ids=["as stored", "in pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_tensor(kind, restore, tmp_path, seed):
    reader, expected = open_tensor(tmp_path, kind, seed, restore)
    assert reader.dtype("wq") == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert list(reader) == ["wq"]
    for rows in (slice(None), slice(0, 1), slice(5, 11), slice(4, 4)):
        assert torch.equal(reader.read("wq", rows).float(), expected[rows]), rows


@pytest.mark.parametrize(
    "restore", [lambda name, values: values.T, lambda name, values: values - 1, lambda name, values: values[:, ::-1]]
)
def test_other_changes_of_a_tensor_are_made_to_all_of_it(restore, tmp_path, seed):
    reader, expected = open_tensor(tmp_path, "Q8_0", seed, restore)
    reader._shapes = {"wq": tuple(expected.shape)}
    assert torch.equal(reader.read("wq"), expected)
    assert torch.equal(reader.read("wq", slice(2, 5)), expected[2:5])


def test_experts_are_read_one_by_one(monkeypatch, tmp_path, seed):
    """Gates and up projections joined: only the experts asked for are decoded."""
    generator = np.random.default_rng(seed)
    gate, up = (generator.standard_normal((6, 3, 32), dtype=np.float32) for _ in range(2))
    (tmp_path / "a.gguf").write_bytes(gate.tobytes() + up.tobytes())
    places = {name: Place(0, gate.shape, start, gate.nbytes) for name, start in (("gate", 0), ("up", gate.nbytes))}
    reader = GGUFTensors(
        tmp_path / "a.gguf", places, {"both": ["gate", "up"]}, {"both": (6, 6, 32)}, lambda name, values: values
    )
    decoded, decode = [], reader._decode
    monkeypatch.setattr(reader, "_decode", lambda source, rows=None: decoded.append(rows) or decode(source, rows))
    expected = torch.from_numpy(np.concatenate([gate, up], axis=1))
    assert torch.equal(reader.read("both"), expected)
    decoded.clear()
    assert torch.equal(reader.read("both", slice(2, 4)), expected[2:4])
    assert [rows.tolist() for rows in decoded] == [[2, 3], [2, 3]]
