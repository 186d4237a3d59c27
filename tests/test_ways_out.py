"""What a newcomer gets wrong is refused at once, by name, with the way out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.errors import MansuError, near
from mansu_tl.study.collect import config_in
from mansu_tl.unlearning import MansuSettings, settings_of
from tests.tiny import embedded_task

# Checked at run time by jaxtyping in this process, so these are told off in one of its own.
_OF_ANOTHER_KIND = {
    'MansuSettings.light(budget="1%")': "budget='1%'; choose a float, like 0.0195",
    'MansuSettings.early(steps="20")': "steps='20'; choose a int, like 300",
    "MansuSettings(fisher=1)": "fisher=1; choose a bool",
    "MansuSettings(steps=True)": "steps=True; choose a int",
    "MansuSettings(budget=-1)": "budget=-1; choose a share",
    'mtl.discover_circuit(model, task.forget_pairs[:2], faithfulness="85%")': "faithfulness='85%'; choose a target in (0, 1]",
}
_IN_A_PROCESS = """
import sys

import numpy as np

import mansu_tl as mtl
from mansu_tl.unlearning import MansuSettings

model, task = mtl.load("pocket"), mtl.load_task("pocket")
for line in sys.stdin:
    try:
        eval(line)
    except mtl.errors.MansuError as error:
        print(error)
print(MansuSettings(steps=np.int64(3), budget=np.float32(0.01)).steps)
"""


def test_a_setting_of_another_kind_is_refused_and_numpys_numbers_are_numbers() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _IN_A_PROCESS], input="\n".join(_OF_ANOTHER_KIND), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    *told, last = found.stdout.splitlines()
    assert last == "3"
    for line, says in zip(told, _OF_ANOTHER_KIND.values(), strict=True):
        assert says in line


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MansuSettings.light(step=3), r"unknown setting 'step'.*did you mean 'steps'"),
        (lambda: MansuSettings.closed(dept=0.5), r"unknown setting 'dept'.*did you mean 'depth'"),
        (
            lambda: MansuSettings(budget=0.0),
            r"budget=0.0; choose a share of the linear weights, above 0 .* 0.01 is 1 %",
        ),
        (lambda: settings_of("mansu", {"budget": None}), r"mansu: budget=None should be a float, like 0.0195"),
        (lambda: settings_of("mansu", {"budget": [0.01]}), r"budget=\[0.01\] should be a float"),
        (lambda: settings_of("graddiff", {"max_steps": None}), r"graddiff: max_steps=None should be a int"),
    ],
)
def test_a_setting_of_another_name_or_out_of_range_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(MansuError, match=says):
        make()


def test_settings_of_mansu_are_no_settings_of_its_presets() -> None:
    for base in (MansuSettings(), MansuSettings.light(steps=2)):
        with pytest.raises(MansuError, match=r"mansu-early: depth=1.0 .* MansuSettings.early\(\), or choose 'mansu'"):
            settings_of("mansu-early", {}, base)
        with pytest.raises(MansuError, match=r"mansu-closed: solver='gradient' .* MansuSettings.closed\(\)"):
            settings_of("mansu-closed", {}, base)
    assert settings_of("mansu-early", {}, MansuSettings.early(steps=2)).steps == 2
    assert settings_of("mansu-early", {"depth": 0.75}, MansuSettings.light()).depth == 0.75
    assert settings_of("mansu-closed", {}, MansuSettings.closed(steps=2)).steps == 2


def test_names_that_are_mistyped_are_told_before_anything_is_asked_for(tmp_path) -> None:
    with pytest.raises(MansuError, match=r"pockett: no such folder or model; did you mean 'pocket'"):
        mtl.load("pockett")
    with pytest.raises(MansuError, match=r"task 'pockett': no such file or folder.*did you mean 'pocket'"):
        mtl.load_task("pockett")
    with pytest.raises(MansuError, match=r"nothing.jsonl': no such file or folder, and no embedded task, pocket$"):
        mtl.load_task(tmp_path / "nothing.jsonl")
    there = tmp_path / "task.jsonl"
    there.write_text(json.dumps({"set": "forget"}), encoding="utf-8")
    with pytest.raises(MansuError, match="needs a tokenizer to be read"):
        mtl.load_task(there)
    assert near("NF4", ["fp4", "nf4"]) == " (did you mean 'nf4'?)"


def test_a_scorecard_is_told_its_quantizers_in_a_list_and_by_name() -> None:
    model, task, circuit = mtl.load("pocket"), embedded_task(), Mock(spec=Circuit)  # it is not reached
    with pytest.raises(MansuError, match=r"scorecard: quantizers='nf4'; give a list, \['nf4'\]"):
        mtl.scorecard(model, model, task, circuit, quantizers="nf4")
    with pytest.raises(MansuError, match="quantizer 'nf44': unknown.*did you mean 'nf4'"):
        mtl.scorecard(model, model, task, circuit, quantizers=["nf44"])


def test_what_is_no_results_folder_is_said(tmp_path) -> None:
    with pytest.raises(MansuError, match="no such folder; give the --out of"):
        config_in(tmp_path / "nowhere")
    with pytest.raises(MansuError, match="no config.toml in it"):
        config_in(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MansuError, match=r"a model's folder, no results folder;.*mtl.explore\(model, task, edit\)"):
        config_in(tmp_path)
