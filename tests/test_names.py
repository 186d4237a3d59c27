"""Every name in the package is defined: ruff's own check (F821) is off, because it reads jaxtyping's axes as names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def undefined(folder: Path) -> list[str]:
    """What ruff calls undefined, without what stands in a string on that line."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    found = []
    for fault in json.loads(done.stdout):
        path, row = Path(fault["filename"]), fault["location"]["row"]
        name = re.search(r"`(\w+)`", fault["message"]).group(1)
        strings = re.findall(r'"[^"]*"', path.read_text(encoding="utf-8").splitlines()[row - 1])
        if not any(re.search(rf"\b{name}\b", text) for text in strings):
            found.append(f"{path.name}:{row} {name}")
    return found


def test_every_name_in_the_package_is_defined() -> None:
    assert undefined(ROOT / "mansu_tl") == []


def test_a_name_that_is_not_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('def f(x: Float[Tensor, "row vocab"]) -> None:\n    home(x)\n')
    assert [name.split()[1] for name in undefined(tmp_path)] == ["Float", "Tensor", "home"]
