"""Hub ids: what is asked of the datasets library, on a local copy; and what is said without it or a way to the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import mansu_tl as mtl
from mansu_tl.data.sources import read_choices, read_records
from mansu_tl.data.sources.records import from_hub
from mansu_tl.errors import MansuError
from tests.spelled import spelling_tokenizer
from tests.test_choices import questions


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A data set as the hub lays it out: parts as configurations in its card, a Parquet file a split."""
    root = tmp_path / "wmdp"
    card = "---\nconfigs:\n"
    for config, word in (("wmdp-bio", "virus"), ("wmdp-cyber", "worm")):
        (root / config).mkdir(parents=True)
        pd.DataFrame(questions(6, word)).to_parquet(root / config / "test-00000-of-00001.parquet")
        card += f"- config_name: {config}\n  data_files:\n  - split: test\n    path: {config}/test-*\n"
    (root / "README.md").write_text(f"{card}---\n")
    return root


def test_a_local_copy_is_read_by_datasets_as_by_us(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for part in ("wmdp-bio/test", "wmdp-cyber"):
        theirs = [record.fields for record in from_hub(str(copy), part)]
        assert theirs == [record.fields for record in read_records(f"{copy}#{part}")]
    with pytest.raises(
        MansuError, match=r"cannot be loaded from the hub \(ValueError: .*; check the id, or give a local copy"
    ):
        list(from_hub(str(copy), "wmdp-chem"))


def test_an_id_goes_to_the_library_with_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    sets = {"wmdp-bio": questions(5, "virus"), "all": questions(5, "treaty", subject="law")}

    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        asked.append((name, config, split))
        return sets[config] if split else {"test": sets[config]} if config else {"dev": [], "test": []}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = mtl.load_task("cais/wmdp#wmdp-bio", kind="wmdp", tokenizer=spelling_tokenizer(), retain="cais/mmlu#all/test")
    assert asked == [("cais/wmdp", "wmdp-bio", None), ("cais/mmlu", "all", "test")]
    assert {name: len(found) for name, found in task.questions.items()} == {"forget": 5, "retain": 5}
    # In a config the id stands behind the source's name.
    named = "wmdp:cais/wmdp#wmdp-bio?retain=cais/mmlu%23all/test"
    assert mtl.load_task(named, tokenizer=spelling_tokenizer()).digest() == task.digest()
    # Its fields say whose it is.
    again = mtl.load_task("cais/wmdp#wmdp-bio", tokenizer=spelling_tokenizer(), retain="cais/mmlu#all/test")
    assert again.digest() == task.digest()
    with pytest.raises(MansuError, match="cais/mmlu: has splits dev, test; name one: cais/mmlu#CONFIG/SPLIT"):
        read_choices("cais/mmlu")


def test_without_the_library_or_the_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MansuError, match="needs the datasets library; pip install datasets, or give a local copy"
    ) as found:
        read_records("cais/wmdp#wmdp-bio")
    assert "\n" not in str(found.value)

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no way\nto huggingface.co")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails))
    with pytest.raises(MansuError, match="ConnectionError: no way to huggingface.co") as found:
        read_records("cais/wmdp#wmdp-bio")
    assert "\n" not in str(found.value)
