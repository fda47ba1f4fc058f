"""Images as documents: read from rows and folders, prepared as the model's own processor prepares them."""

import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor

from qlora.data import EncodeOptions, Labels, Source, build_datasets, collate, find_labels, make_example
from qlora.data.images import PIXELS, ImageEncoder, ImageProcessor, as_data_uri, normalize, open_image
from qlora.errors import DataError, ModelError
from qlora.model.processor import load_image_processor
from qlora.training.given import as_config
from tests.tiny import write_jsonl
from tests.tiny_images import LABELS, write_images

SIZES = {"size": {"height": 12, "width": 16}}
PROCESSORS = {
    "resized": ViTImageProcessor(**SIZES),
    "cropped": BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
    "by a share": ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.8),
    "not normalized": ViTImageProcessor(**SIZES, do_normalize=False),
    "scaled": ViTImageProcessor(**SIZES, rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 0.5, 2]),
}


def processor_of(folder, processor):
    processor.save_pretrained(folder)
    return load_image_processor(folder)


@pytest.fixture
def processor(tmp_path):
    return processor_of(tmp_path / "processor", PROCESSORS["resized"])


@pytest.fixture
def images(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        write_images(tmp_path / "images" / split, count, np.random.default_rng(count))
    return tmp_path / "images"


def build(processor, *sources, tmp_path, **keys):
    labels = find_labels(sources, "head")
    options = EncodeOptions(labels=labels, on_bad_row=keys.pop("on_bad_row", "error"))
    return build_datasets(processor, sources, options=options, cache_dir=str(tmp_path / "cache"), **keys)


def images_of(path, **keys):
    return Source(str(path), format="images", **keys)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_batch_has_the_pixel_values_of_the_models_own_processor(kind, tmp_path):
    ours = processor_of(tmp_path, PROCESSORS[kind])
    assert ours.dtype == np.uint8
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    wanted = AutoImageProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")["pixel_values"]
    values = {PIXELS: torch.from_numpy(ours.pixels(image))[None], "pixel_scaling": torch.from_numpy(ours.scaling)[None]}
    assert (normalize(values, torch.float32) - wanted).abs().max() < 1e-6


def test_a_processor_that_does_not_normalize_last_has_its_own_values_stored(tmp_path):
    own = ViTImageProcessor(**SIZES)

    class Squared:
        backend = "pil"

        def __call__(self, **keys):
            return {"pixel_values": [own(**keys)["pixel_values"][0].astype(np.float32) ** 2]}

        def to_dict(self):
            return own.to_dict()

    ours = ImageProcessor(Squared(), tmp_path / "file")
    image = Image.new("RGB", (9, 9), (10, 20, 30))
    assert ours.dtype == np.float32
    values = {name: value[None] for name, value in ours.made_up().items()}
    values[PIXELS] = torch.from_numpy(ours.pixels(image))[None]
    assert np.array_equal(normalize(values, torch.float32)[0], Squared()(images=image)["pixel_values"][0])


def test_images_of_different_sizes_are_refused(tmp_path):
    with pytest.raises(ModelError, match="different sizes"):
        processor_of(tmp_path, BitImageProcessor(size={"shortest_edge": 20}, do_center_crop=False))


def test_folders_by_class_are_read_by_split(images, processor, tmp_path):
    train, test = images_of(images), images_of(images, split="test")
    datasets = build(processor, train, tmp_path=tmp_path, eval=[test])
    assert datasets.labels == Labels(tuple(sorted(LABELS)), "head")
    assert (len(datasets.train), len(datasets.eval)) == (12, 6)
    first = datasets.train[0]
    path = sorted((images / "train" / "blue").iterdir())[0]
    assert np.array_equal(first.values[PIXELS], processor.pixels(Image.open(path)))
    assert first.values["label"] == 0
    batch = collate([datasets.train[number] for number in range(5)])
    assert batch.values[PIXELS].shape == (5, 3, 12, 16)
    assert batch.input_ids.shape == (5, 1)
    assert build(processor, images_of(images / "test"), tmp_path=tmp_path).train.lengths.sum() == 6
    with pytest.raises(DataError, match="no folder of images for the split 'dev'"):
        build(processor, images_of(images, split="dev"), tmp_path=tmp_path)


def test_what_is_read_of_a_folder_is_told(images, processor, tmp_path):
    (images / "train" / "red" / "0.heic").touch()
    (images / "readme.md").touch()
    (images / "test" / "notes.txt").touch()
    (report,) = build(processor, images_of(images), tmp_path=tmp_path).reports
    assert "12 images in the folders of 3 labels; 2 other files ignored, such as readme.md" in report.notes
    (images / "names.json").write_text("{}")
    with pytest.raises(DataError, match=r"images has images in folders and names\.json; name the file, or remove it"):
        build(processor, images_of(images), tmp_path=tmp_path)


def test_a_label_may_be_named_like_a_split(processor, tmp_path):
    folder = write_images(tmp_path / "vehicles", 2, np.random.default_rng(0))
    (folder / "red").rename(folder / "train")
    datasets = build(processor, images_of(folder), tmp_path=tmp_path)
    assert datasets.labels.names == ("blue", "green", "train")
    assert len(datasets.train) == 6


def test_paths_in_a_file_below_the_source_count_from_the_file(images, processor, tmp_path):
    for split, kept in (("train", "red"), ("test", "green")):  # the layout of "imagefolder" on the hub
        folder = tmp_path / "hub" / split
        folder.parent.mkdir(exist_ok=True)
        (images / split / kept).rename(folder)
        write_jsonl(folder / "metadata.jsonl", [{"file_name": f"{number}.png", "label": number} for number in (0, 1)])
    source = images_of(tmp_path / "hub", columns={"image": "file_name"})
    first = build(processor, source, tmp_path=tmp_path).train[0]
    with Image.open(tmp_path / "hub" / "train" / "0.png") as image:
        assert np.array_equal(first.values[PIXELS], processor.pixels(image))


def test_rows_in_memory_count_paths_of_images_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"file": "0.png", "label": "a"}, {"file": {"path": "1.png"}, "label": "b"}]
    data = {"format": "images", "columns": {"image": "file"}, "cache_dir": str(tmp_path / "cache")}
    sections = {"model": {"base": "base"}, "data": data, "train": {"objective": "classify", "output_dir": "run"}}
    for given in (sections, as_config(sections, rows)):
        (source,) = as_config(given, rows).data.train
        stored = [json.loads(line)["file"] for line in Path(source.path).read_text().splitlines()]
        assert stored == [str(tmp_path / "0.png"), {"path": str(tmp_path / "1.png")}]


def test_the_pixels_of_a_batch_of_rows_are_bounded(images, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora.data.images.BATCH_BYTES", 5 * processor.pixels(Image.new("RGB", (9, 9))).nbytes)
    sizes, original = [], ImageEncoder.begin
    monkeypatch.setattr(ImageEncoder, "begin", lambda self, given: sizes.append(len(given)) or original(self, given))
    assert len(build(processor, images_of(images), tmp_path=tmp_path).train) == 12
    assert sizes == [5, 5, 2]


def test_rows_name_images_by_path_or_hold_their_bytes(images, processor, tmp_path):
    content = (images / "train" / "red" / "0.png").read_bytes()
    given = [
        {"image": "images/train/red/0.png", "label": 1},
        {"image": str(images / "train" / "red" / "0.png"), "label": 2},
    ]
    by_path = write_jsonl(tmp_path / "rows.jsonl", given)
    datasets = build(processor, images_of(by_path), tmp_path=tmp_path)
    assert np.array_equal(datasets.train[0].values[PIXELS], datasets.train[1].values[PIXELS])
    assert datasets.reports[0].duplicates == 1
    from datasets import Dataset

    table = tmp_path / "rows.parquet"
    Dataset.from_list([{"image": {"bytes": content, "path": None}, "label": k} for k in (1, 2)]).to_parquet(table)
    other = build(processor, images_of(table), tmp_path=tmp_path)
    assert np.array_equal(datasets.train[0].values[PIXELS], other.train[0].values[PIXELS])


def test_a_changed_image_or_processor_is_read_again(images, processor, tmp_path):
    source = images_of(write_jsonl(tmp_path / "rows.jsonl", [
        {"image": "images/train/red/0.png", "label": 1}, {"image": "images/train/red/1.png", "label": 2}
    ]))  # fmt: skip
    one = build(processor, source, tmp_path=tmp_path).reports[0].digest
    path = images / "train" / "red" / "0.png"
    Image.new("RGB", (5, 5), (1, 2, 3)).save(path)
    os.utime(path, (1, 1))
    two = build(processor, source, tmp_path=tmp_path).reports[0].digest
    Image.new("RGB", (5, 5), (4, 5, 6)).save(path)  # of the same size
    os.utime(path, (1, 1))
    three = build(processor, source, tmp_path=tmp_path).reports[0].digest
    other = processor_of(tmp_path / "other", ViTImageProcessor(**SIZES, resample=0))
    assert len({one, two, three, build(other, source, tmp_path=tmp_path).reports[0].digest}) == 4


def test_bad_images_are_bad_rows_grouped_by_cause(images, processor, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    whole = (images / "train" / "red" / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:200])
    # A chunk of 5 bytes after the pixels, which should have a multiple of 4: Pillow raises struct.error.
    chunk = b"cHRM12345"
    late = whole[:-12] + struct.pack(">I", 5) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[-12:]
    (tmp_path / "late.png").write_bytes(late)
    Image.fromarray(np.full((4, 4), 999, dtype=np.uint16)).save(tmp_path / "deep.png")
    rows = [
        {"image": "images/train/red/0.png", "label": "a"}, {"image": "images/train/red/1.png", "label": "b"},
        {"image": "absent.png", "label": "a"}, {"image": "text.png", "label": "a"}, {"image": "cut.png", "label": "b"},
        {"image": "~nobody-here/x.png", "label": "b"}, {"image": "late.png", "label": "b"},
        {"image": "deep.png", "label": "b"}, {"image": 7, "label": "b"}, {"image": "images/train/red/2.png"},
    ]  # fmt: skip
    source = images_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError) as error:
        build(processor, source, tmp_path=tmp_path)
    for part in (
        "8 of 10 rows", "absent.png does not exist", "no image that Pillow reads", "cut.png can't be decoded",
        "late.png can't be decoded", "more than 8 bits", "names a home folder that does not exist",
        "should be the path of an image",
    ):  # fmt: skip
        assert part in str(error.value)
    report = build(processor, source, tmp_path=tmp_path, on_bad_row="drop").reports[0]
    assert (report.examples, report.bad_rows) == (2, 8)


def test_images_are_turned_and_converted_to_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90° clockwise
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", exif=turned)
    assert np.array_equal(open_image(buffer.getvalue()), np.rot90(pixels, -1))
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1"):
        buffer = io.BytesIO()
        given = Image.fromarray(pixels).convert(mode)
        given.save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
        found = open_image(buffer.getvalue())
        assert (found.mode, found.size) == ("RGB", (4, 6))
        if mode == "RGBA":
            assert np.array_equal(found, pixels)


def test_a_text_is_no_image_even_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert as_data_uri(make_example([1, 2], [0, 1])) is None


def test_a_missing_processor_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json"):
        load_image_processor(tmp_path)
