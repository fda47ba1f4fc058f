"""Runs that classify images: of each family, resumed, replayed, merged, and predicted by transformers alone."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from qlora.config import RunConfig, load_config
from qlora.data import LABEL
from qlora.data.images import PIXELS
from qlora.errors import ConfigError, DataError, ExportError, ModelError
from qlora.export import merge
from qlora.model import generate, load_run, predict
from qlora.nf4 import NF4Linear
from qlora.processes import Processes
from qlora.proof import verify
from qlora.training import evaluate, preview, train
from qlora.training.assemble import assemble
from qlora.training.replay import replay, save_step
from tests.cli import run as command
from tests.tiny_images import FAMILIES, LABELS, image_config, make_image_base, write_images
from tests.training.ranks import needs_fork, train_in_two
from tests.training.same_run import assert_same_run, lines_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("test", 4)):
        write_images(folder / split, count, np.random.default_rng(count))
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return make_image_base(tmp_path_factory.mktemp("vit") / "base")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-of-images"))


def config_of(base, images, folder, **train):
    return RunConfig.model_validate(image_config(base, images, folder, **train))


@pytest.fixture(scope="module")
def trained(vit, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(config_of(vit, images, folder / "run"))
    merge(folder / "run", folder / "merged", dtype="float32")
    return folder / "run", folder / "merged"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_merges_and_is_read_by_transformers_and_peft(family, images, tmp_path):
    base, run, merged = make_image_base(tmp_path / "base", family), tmp_path / "run", tmp_path / "merged"
    result = train(config_of(base, images, run, max_steps=4, eval_every=4, save_every=4))
    assert result.eval_metrics["accuracy"] > 0.9
    merge(run, merged, dtype="float32")
    report = verify(run, merged)
    assert report.matches, report.problems
    assert report.clients["peft"].loads
    assert verify(run).matches
    predictions = predict(merged, images / "test")
    model, processor = (auto.from_pretrained(merged) for auto in (AutoModelForImageClassification, AutoImageProcessor))
    pixels = torch.cat([
        processor(images=Image.open(each.id), return_tensors="pt")["pixel_values"] for each in predictions
    ])  # fmt: skip
    with torch.no_grad():
        logits = model.eval()(pixels).logits
    names = [*model.config.id2label.values()]
    assert names == sorted(LABELS)
    for own, given, probabilities in zip(predict(run, images / "test"), predictions, logits.softmax(-1), strict=True):
        assert own.label == given.label == names[int(probabilities.argmax())]
        assert [*given.probabilities.values()] == pytest.approx(probabilities.tolist(), abs=0.02)  # in bf16 and fp32
        assert own.probabilities == pytest.approx(given.probabilities, abs=0.02)
    # PEFT with the base's dequantized weights: the adapter and the head with its bias.
    ours, _ = load_run(run)
    plain = AutoModelForImageClassification.from_pretrained(base, num_labels=len(names))
    for name, module in ours.named_modules():
        if isinstance(module, NF4Linear):
            plain.get_submodule(name.removesuffix(".base")).weight.data = module.dequantize(torch.float32)
    by_peft = PeftModel.from_pretrained(plain, run / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(by_peft(pixels).logits, logits, atol=1e-4)


@pytest.mark.parametrize("family", ["dinov2", "swin"])
def test_step_0_is_the_base_and_only_adapters_and_head_are_trained(family, images, tmp_path):
    base = make_image_base(tmp_path / "base", family)
    config = config_of(base, images, tmp_path / "run", max_steps=1)
    assembly = assemble(config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})}),
                        Processes())  # fmt: skip
    model = assembly.model.eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"classifier.rows.weight", "classifier.rows.bias"} == {name for name in trained if "lora" not in name}
    pixels = torch.randn(2, 3, 16, 16)
    plain = AutoModelForImageClassification.from_pretrained(base, num_labels=3)
    plain.classifier.load_state_dict({
        name: getattr(model.classifier.rows, name).detach() for name in ("weight", "bias")
    })  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(model(pixel_values=pixels).logits, plain.eval()(pixels).logits, atol=1e-5)


def test_a_resumed_run_is_the_same_bit_for_bit(vit, images, tmp_path):
    whole, parted = (config_of(vit, images, tmp_path / name, micro_batch_size=3) for name in ("whole", "parted"))
    train(whole)
    train(parted, stop_at=3)
    train(parted)
    assert_same_run(tmp_path / "parted", tmp_path / "whole")


@needs_fork
def test_micro_batches_and_processes_do_not_change_the_loss(vit, images, tmp_path):
    keys = {"max_steps": 3, "class_weights": "balanced"}
    path = tmp_path / "two.yaml"
    one = image_config(vit, images, tmp_path / "one", **keys)
    small = image_config(vit, images, tmp_path / "small", micro_batch_size=1, gradient_accumulation_steps=4, **keys)
    path.write_text(json.dumps(image_config(vit, images, tmp_path / "two", micro_batch_size=2, **keys)))
    train(RunConfig.model_validate(one))
    train(RunConfig.model_validate(small))
    train_in_two(path)
    for name in ("small", "two"):
        for mine, other in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / name), strict=True):
            for key in mine.keys() & {"loss", "accuracy", "eval_loss", "eval_macro_f1"}:
                assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
            assert mine.get("eval_confusion") == other.get("eval_confusion")


def test_a_saved_step_of_images_is_replayed(vit, images, tmp_path):
    config = config_of(vit, images, tmp_path / "run", max_steps=1)
    train(config)
    assembly = assemble(config, Processes())
    step = tmp_path / "run" / "steps" / "0.safetensors"
    step.parent.mkdir()
    about = {"loss": 1.0, "grad_norm": 1.0, "loss_scale": 1.0, "rows": {str(images): [1]}, "label_weights": None}
    save_step(step, assembly.loop_parts, 0, 1, about)
    recorded = lines_of(tmp_path / "run")[1]["loss"]
    found = replay(config, step)
    assert found.is_finite
    assert found.loss == pytest.approx(recorded, rel=1e-5)


def test_evaluation_estimate_preview_and_page_work_without_a_tokenizer(trained, vit, images, tmp_path):
    run, merged = trained
    report = evaluate(run)
    assert {each["label"] for each in report.labels} == {*LABELS}
    assert np.sum(report.confusion) == 12
    assert evaluate(run, images / "test").metrics == report.metrics
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(image_config(vit, images, tmp_path / "run")))
    look = preview(load_config(path), 3)
    assert (look.unit, look.train_examples, look.packing_fill) == ("images", 24, None)
    assert all(sample.image.startswith("data:image/png;base64,") for sample in look.samples)
    assert command("preview", path, "--html", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").read_text().count("<img src") == 5
    shown = command("estimate", path)
    assert shown.code == 0, shown.err
    assert "4 images" in shown.out
    assert command("train", path, "--dry-run").code == 0
    assert command("eval", path).code == 0  # the base, with a head that knows nothing yet
    out = tmp_path / "predictions.jsonl"
    assert command("predict", merged, "--data", images / "test", "-o", out).code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["label"] for line in lines] == [each.label for each in predict(run, images / "test")]


def test_every_image_below_a_folder_is_predicted_whatever_its_folders_are_called(trained, images, tmp_path):
    run, _ = trained
    renamed = tmp_path / "renamed"
    shutil.copytree(run, renamed)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["columns"] = {"image": "file"}
    (renamed / "config.yaml").write_text(yaml.safe_dump(config))
    flat = tmp_path / "flat"
    shutil.copytree(images / "test" / "red", flat)
    (flat / "notes.json").write_text("{}")
    assert [each.id for each in predict(renamed, flat)] == [str(flat / f"{number}.png") for number in range(4)]
    assert len(predict(run, images)) == 36
    (flat / "2.png").write_text("no image")
    with pytest.raises(DataError, match=r"1 row can't be classified"):
        predict(run, flat)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        predict(run, empty)


def test_a_base_that_interpolates_takes_another_size(images, tmp_path):
    result = train(config_of(make_image_base(tmp_path / "base", "dinov2", image_size=8), images, tmp_path / "run",
                             max_steps=1, eval_every=1))  # fmt: skip
    assert 0 <= result.eval_metrics["accuracy"] <= 1


def test_a_base_with_batch_norms_is_refused(images, tmp_path):
    config = {"model_type": "mobilevit", "architectures": ["MobileViTForImageClassification"]}
    base = make_image_base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has batch norms, whose statistics would change"):
        train(config_of(base, images, tmp_path / "run"))


def test_what_does_not_apply_to_images_is_refused_in_a_sentence(trained, vit, tiny_base, images, tmp_path):
    run, merged = trained
    with pytest.raises(ExportError, match="GGUF"):
        merge(run, tmp_path / "out", format="gguf")
    for model in (run, merged):
        with pytest.raises(ModelError, match="no head that answers could come from"):
            generate(str(model), "Hello")
    with pytest.raises(ConfigError, match=r"data\.format: images needs a base that classifies images"):
        train(config_of(tiny_base, images, tmp_path / "run"))
    text = image_config(vit, images, tmp_path / "run")
    del text["data"]["format"]
    with pytest.raises(ConfigError, match=r"set data\.format: images"):
        train(RunConfig.model_validate(text))
    for section, key, value, message in (
        ("train", "classify_by", "tokens", "set it to head"),
        ("train", "objective", "sft", "set classify"),
        ("train", "neftune_alpha", 5, "is for texts"),
        ("data", "new_tokens", ["<a>"], "is for texts"),
        ("data", "packing", True, "true is for texts"),
        ("data", "chat_template", "chatml", "is for texts"),
    ):
        wrong = image_config(vit, images, tmp_path / "run")
        wrong[section][key] = value
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate(wrong)
    small = make_image_base(tmp_path / "small", image_size=8)
    message = r"preprocessor_config\.json gives 16 × 16 pixels, but .*small takes 8 × 8; set its size to 8"
    with pytest.raises(ModelError, match=message):
        train(config_of(small, images, tmp_path / "run"))


def test_a_base_that_has_the_labels_already_keeps_its_head(trained, images, tmp_path):
    _, merged = trained
    assembly = assemble(config_of(merged, images, tmp_path / "run"), Processes())
    weight = AutoModelForImageClassification.from_pretrained(merged).classifier.weight
    assert torch.equal(assembly.model.classifier.rows.weight.float(), weight.bfloat16().float())
    first = assembly.plan.datasets.train[0]
    assert first.values[PIXELS].shape == (3, 16, 16)
    assert int(first.values[LABEL]) == 0
