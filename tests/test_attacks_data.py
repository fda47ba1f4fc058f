"""Data, chat templates and tokenizers as attacks: rows that fill memory or open files, templates that run programs."""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora.data.json_rows import MAX_CHARACTERS
from qlora.data.rows import Row, read_rows
from qlora.data.sources import Source
from qlora.data.tables import HeaderRule
from qlora.data.template import render
from qlora.errors import DataError, ModelError
from qlora.model import load_tokenizer
from tests.tiny import make_tokenizer

RULE = HeaderRule(header=True, mapped=[])

TURNS = [{"role": "user", "content": "a"}]
# What a row of images or sounds may make datasets open.
FEATURES = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}


@pytest.fixture(scope="module")
def gibibytes():
    """Return two GiB of spaces in two MB of gzip, as concatenated gzip files."""
    return gzip.compress(b" " * (1 << 26)) * 32


def peak_bytes(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


# Rows.


@pytest.mark.parametrize(
    ("name", "start", "how"),
    [
        ("rows.jsonl.gz", b'{"text": "', {}),
        ("rows.json.gz", b'[{"text": "', {}),
        ("rows.csv.gz", b"a,b\n1,", {"header": True}),
        ("rows.txt.gz", b"a", {}),
        ("rows.txt.gz", b"a", {"type": "lines"}),
        ("rows.jsonl.gz", b'{"text": "\xff', {}),
    ],
)
def test_a_small_file_that_unpacks_to_gigabytes_fills_no_memory(tmp_path, gibibytes, name, start, how):
    path = tmp_path / name
    path.write_bytes(gzip.compress(start) + gibibytes)
    held = peak_bytes(reset=True)
    with pytest.raises(DataError, match=rf"{name}.*more than 64 Mi characters"):
        list(read_rows(Source(str(path), **how), RULE))
    assert peak_bytes() - held < 8 * MAX_CHARACTERS


def test_many_rows_that_unpack_to_gigabytes_are_held_one_at_a_time(tmp_path):
    line = json.dumps({"text": "a" * 1_000_000}).encode() + b"\n"
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(line * 32) * 8)
    held = peak_bytes(reset=True)
    assert sum(1 for _ in read_rows(Source(str(tmp_path / "rows.jsonl.gz")), RULE)) == 256
    assert peak_bytes() - held < 1 << 26


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("place", ["{folder}/secret.png", "http://127.0.0.1:9/x.png", "hf://datasets/a/b/x.png"])
def test_what_a_row_says_an_image_is_at_is_not_opened(tmp_path, kind, place):
    place = place.format(folder=tmp_path)
    (tmp_path / "secret.png").write_bytes(b"mine")
    table = pa.Table.from_pylist([{"text": "a", "image": {"bytes": None, "path": place}}])
    table = table.cast(
        pa.schema([("text", pa.string()), ("image", pa.struct({"bytes": pa.binary(), "path": pa.string()}))])
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "rows.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
            stream.write_table(table)
    path = tmp_path / f"rows.{kind}"
    assert list(read_rows(Source(str(path)), RULE)) == [Row({"text": "a", "image": {"path": place}}, f"{path} row 1")]


# Templates.


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mknod(path) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}{{ messages }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/hostname' %}",
        "{% import '/etc/hostname' as x %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ raise_exception('no') }}",
        "{{ messages | attr('__class__') | attr('__mro__') | list | length / 0 }}",
        "{% for",
    ],
)
def test_a_template_stays_in_its_sandbox(template):
    tokenizer, messages = make_tokenizer(chat_template=template), [dict(turn) for turn in TURNS]
    with pytest.raises(DataError, match="the chat template refuses this conversation"):
        render(tokenizer, messages)
    assert messages == TURNS


def test_what_a_template_may_do_it_does():
    template = "{% for m in messages %}{{ m.role }}{% for i in range(3) %}{{ i }}{% endfor %}{% endfor %}"
    assert render(make_tokenizer(chat_template=template), TURNS) == "user012"


# Tokenizers.


@pytest.fixture
def folder(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b", "..", ".x", ""])
def test_a_template_with_a_name_that_leads_elsewhere_is_refused_before_anything_is_saved(folder, name):
    templates = [{"name": "default", "template": "a"}, {"name": name, "template": "b"}]
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change(folder / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(ModelError, match="chat template named .*which is not a file name"):
        load_tokenizer(folder)
    templates[1]["name"] = "tool_use"
    change(folder / "tokenizer_config.json", chat_template=templates)
    assert set(load_tokenizer(folder).chat_template) == {"default", "tool_use"}


def test_a_tokenizer_with_ids_of_no_model_is_refused(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zz"] = 4_000_000_000
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="the tokenizer has the id 4000000000"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 99_999, '{"a":' * 99_999, "\x00", "3"])
def test_a_damaged_tokenizer_is_refused(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=str(folder)):
        load_tokenizer(folder)


def test_files_that_a_tokenizers_config_names_elsewhere_are_not_read(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("mysecretword\n")
    change(folder / "tokenizer_config.json", vocab_file=str(tmp_path / "secret.txt"), tokenizer_file="../secret.txt")
    assert "mysecretword" not in load_tokenizer(folder).get_vocab()
