"""The settings of torch's allocator: ours, unless the user made some."""

import os
import platform
import subprocess
import sys

import pytest

from qlora.allocator import EXPANDABLE, VARIABLES, allocator_settings, use_expandable_segments


@pytest.fixture
def no_settings(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", VARIABLES)
def test_settings_of_the_user_are_kept(name, no_settings, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    use_expandable_segments()
    assert {each: os.environ.get(each) for each in VARIABLES} == dict.fromkeys(VARIABLES) | {
        name: "max_split_size_mb:128"
    }
    assert allocator_settings() == "max_split_size_mb:128"


@pytest.mark.parametrize(
    ("system", "release", "expected"),
    [
        ("linux", "6.8.0-45-generic", EXPANDABLE),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", None),
        ("linux", "4.4.0-19041-Microsoft", None),
        ("linux", "5.15.148-tegra", None),
        ("darwin", "24.1.0", None),
        ("win32", "11", None),
    ],
)
def test_segments_are_expandable_where_it_is_reliable(system, release, expected, no_settings, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    use_expandable_segments()
    assert allocator_settings() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="supported on Linux only")
def test_torch_reads_them_even_if_it_was_imported_first(no_settings):
    read = "import torch, qlora; print(torch._C._accelerator_getAllocatorSettings())"
    found = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True).stdout
    assert found.strip() == EXPANDABLE
