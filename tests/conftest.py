"""Fixtures that all folders share."""

import gc
import os
import random
from pathlib import Path

import pytest
import torch

from tests.tiny import make_base, make_poisoned_base, write_jsonl
from tests.tiny_images import make_image_base

# Tests are small: a second thread gains nothing, and on shared cores it waits a hundred times longer.
torch.set_num_threads(1)

REALDATA = Path(os.environ.get("QLORA_REALDATA", Path(__file__).parents[2] / "shared" / "realdata"))


def pytest_collection_finish() -> None:
    """Exclude the objects of imported modules from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let Python free these modules at exit, because Triton's bindings report leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokenized data out of the user's cache; processes that tests start inherit it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def seed() -> int:
    """Return a new seed for each test; a failure shows it, and QLORA_TEST_SEED sets it."""
    seed = int(os.environ.get("QLORA_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"QLORA_TEST_SEED={seed}")
    return seed


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """Return the generator of a test's random inputs."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Return the folder of real models and data: next to the checkout, or QLORA_REALDATA."""
    if not REALDATA.is_dir():
        pytest.skip(f"no real data at {REALDATA}; set QLORA_REALDATA")
    return REALDATA


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in bf16 with a byte tokenizer, on disk."""
    return make_base(tmp_path_factory.mktemp("base") / "llama", seed=1)


@pytest.fixture(scope="session")
def tiny_image_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer ViT without a head, with an image processor, on disk."""
    return make_image_base(tmp_path_factory.mktemp("image-base") / "vit")


@pytest.fixture(scope="session")
def poisoned_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose loss is not finite where a row has the letter of `tests.tiny.POISON`."""
    return make_poisoned_base(tmp_path_factory.mktemp("poisoned") / "gemma", seed=1)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty preference pairs with margins; the preferred answer is the shorter one."""
    rows = [
        {
            "prompt": f"Repeat {word}",
            "chosen": " ".join([word] * count),
            "rejected": " ".join([word] * (count + 4)),
            "margin": count / 10,
        }
        for word in ("tin", "oak", "fern", "moss")
        for count in range(1, 11)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty texts of different lengths with one of three labels each."""
    labels = {"tin": "metal", "oak": "tree", "elm": "tree", "rust": "metal", "moss": "plant"}
    rows = [
        {"id": f"row-{number}", "text": f"{word} and {number}" + " more" * (number % 7), "label": label}
        for number, (word, label) in enumerate([*labels.items()] * 8)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "labelled.jsonl", rows)


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of instructions with answers of different lengths."""
    rows = [
        {"instruction": f"Repeat {word} {count} times", "output": " ".join([word] * count)}
        for word in ("tin", "oak", "fern", "moss")
        for count in range(1, 11)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
