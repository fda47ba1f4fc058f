"""The settings of torch's allocator: ours, unless the user made some."""

import os
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


@pytest.mark.parametrize(("system", "expected"), [("linux", EXPANDABLE), ("darwin", None), ("win32", None)])
def test_segments_are_expandable_where_torch_supports_it(system, expected, no_settings, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    use_expandable_segments()
    assert allocator_settings() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="supported on Linux only")
def test_torch_reads_them_even_if_it_was_imported_first(no_settings):
    read = "import torch, qlora; print(torch._C._accelerator_getAllocatorSettings())"
    found = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True).stdout
    assert found.strip() == EXPANDABLE
