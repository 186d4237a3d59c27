"""bitsandbytes, imported when it is first asked for, and without its remark that an optional CPU kernel is not installed.

Importing it takes more than a second, which whoever does not meet a 4-bit layer need not wait for. The remark is logged
once at import on CPUs with AVX512-BF16 and concerns a kernel that this package never calls.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

_MODULES = {"functional": "bitsandbytes.functional", "modules": "bitsandbytes.nn.modules"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    remarks = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        return importlib.import_module(_MODULES[name])
    finally:
        remarks.setLevel(level)
