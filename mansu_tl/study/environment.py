"""What results were made with, and how long it took: a record beside them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mansu_tl.results.files import write_text

_PACKAGES = ("mansu-tl", "torch", "transformers", "transformer-lens", "bitsandbytes", "safetensors", "plotly")


def record_environment(
    path: Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    device: str,
    made: int,
    seconds: float,
    threads: int,
    memory_gb: float,
) -> dict[str, Any]:
    """Versions, duration and memory, written beside the results; as they were where nothing was made.

    Args:
        config: what was asked for.
        made: how many stages had to be made.
    """
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if earlier and not made:
        return earlier
    record = {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "seed": seed,
        "device": device,
        "threads": threads,
        "machine": platform.machine(),
        # A run that was interrupted counts all its parts.
        "seconds": round(seconds + earlier.get("seconds", 0.0), 1),
        "peak_memory_gb": round(max(memory_gb, earlier.get("peak_memory_gb", 0.0)), 2),
        "config": dict(config),
    }
    text = json.dumps(record, indent=2)
    write_text(path, text)
    # As it is read back the next time.
    read: dict[str, Any] = json.loads(text)
    return read
