"""`qlora quantize`: what it writes, reports and refuses."""

from qlora.model import load_base
from tests.cli import run


def test_it_reports_what_it_wrote(tiny_base, tmp_path):
    report = run("quantize", tiny_base, "-o", tmp_path / "4bit", "--json").json()
    assert (report["quantized"], report["dtype"]) == (14, "bfloat16")
    assert report["num_bytes"] < 0.6 * report["base_bytes"]
    model, _ = load_base(str(tmp_path / "4bit"))
    assert model.model.layers[0].mlp.up_proj.quant_state.nested


def test_without_double_quantization_the_statistics_are_in_fp32(tiny_base, tmp_path):
    assert run("quantize", tiny_base, "-o", tmp_path / "4bit", "--no-double-quant").code == 0
    model, _ = load_base(str(tmp_path / "4bit"))
    assert not model.model.layers[0].mlp.up_proj.quant_state.nested


def test_a_folder_that_is_there_is_kept(tiny_base, tmp_path):
    assert run("quantize", tiny_base, "-o", tmp_path / "4bit").code == 0
    done = run("quantize", tiny_base, "-o", tmp_path / "4bit")
    assert (done.code, "already exists" in done.err) == (1, True)
