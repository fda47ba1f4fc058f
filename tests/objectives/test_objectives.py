"""Objectives: every name of the config has one, and rows of unsupported formats are refused with the remedy."""

from dataclasses import replace
from typing import get_args

import pytest

from qlora.config import TrainSection
from qlora.data import DataReport
from qlora.data.formats import FORMATS
from qlora.objectives import SFT, objective_from_section

NAMES = get_args(TrainSection.model_fields["objective"].annotation)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_config_is_an_objective(name, tmp_path):
    section = TrainSection(objective=name, output_dir=str(tmp_path))
    assert objective_from_section(section).name == name
    assert objective_from_section(section).formats <= FORMATS.keys()


def reasons(objective):
    """Return the refused formats, and why."""
    found = {name: objective.unsupported_reasons([DataReport("rows.jsonl", format=name)]) for name in FORMATS}
    return {name: reason for name, (reason, *_) in ((name, one) for name, one in found.items() if one)}


def test_fine_tuning_refuses_rows_of_other_objectives_with_a_remedy():
    refused = reasons(SFT)
    assert refused.keys() == {"preference", "kto", "classification"}
    assert refused["preference"] == (
        "train.objective: sft can't learn from the preference rows of rows.jsonl; to train on their answers, set "
        "data.format: chosen; to learn the preference, set train.objective: dpo."
    )


def test_without_a_remedy_the_formats_are_named():
    pairs = replace(SFT, name="pairs", formats=frozenset({"preference", "kto"}), remedies={})
    refused = reasons(pairs)
    assert refused.keys() == FORMATS.keys() - pairs.formats
    assert refused["text"].endswith(
        "can't learn from the text rows of rows.jsonl; it learns from kto, preference rows."
    )
