"""Did this model really forget, and does it stay forgotten once it is quantized?

Load a model and a task, find the circuit behind the knowledge, edit it, quantize it, and measure what is left, on a
TransformerLens `TransformerBridge`. These are the names that most people need; the rest lives in its room, for example
`mtl.circuit.faithfulness_curve` or `mtl.plots.circuit`.
"""

import sys as _sys
import warnings as _warnings
from collections.abc import Callable as _Callable
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType

from mansu_tl import (
    circuit,
    data,
    explorer,
    models,
    patching,
    plots,
    quantization,
    runs,
    study,
    unlearning,
    verification,
)
from mansu_tl.building import build_task
from mansu_tl.circuit import discover_circuit, edge_attribution
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.explorer import explore
from mansu_tl.models import load, save, save_gguf
from mansu_tl.patching import activation_patching
from mansu_tl.quantization import find_grid, quantize
from mansu_tl.runs import accuracy
from mansu_tl.study import audit, run_study
from mansu_tl.unlearning import unlearn
from mansu_tl.verification import ask, certify, circuit_divergence, scorecard

__version__ = _version("mansu-tl")

__all__ = [
    "MansuError",
    "accuracy",
    "activation_patching",
    "ask",
    "audit",
    "build_task",
    "certify",
    "circuit_divergence",
    "discover_circuit",
    "edge_attribution",
    "explore",
    "find_grid",
    "load",
    "load_task",
    "quantize",
    "run_study",
    "save",
    "save_gguf",
    "scorecard",
    "unlearn",
]

# What else completion offers: the rooms that hold the rest.
_ROOMS = (circuit, data, explorer, models, patching, plots, quantization, runs, study, unlearning, verification)


def __dir__() -> list[str]:
    return sorted([*__all__, *(room.__name__.rpartition(".")[2] for room in _ROOMS)])


def _elsewhere(module: _ModuleType) -> _Callable[[str], object]:
    """The `__getattr__` of a module that finds a name which it does not have in the room where it stands, and says so."""

    def missing(name: str) -> object:
        holders = [other for other in (_sys.modules[__name__], *_ROOMS) if name in other.__all__]
        if not holders:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        short = [other.__name__.replace(__name__, "mtl", 1) for other in (module, holders[0])]
        _warnings.warn(f"{short[0]}.{name} stands in {short[1]}.{name} now", FutureWarning, stacklevel=2)
        return getattr(holders[0], name)

    return missing


# Set from outside: a `__getattr__` that type checkers see would make them take any name.
for _module in (_sys.modules[__name__], *_ROOMS):
    vars(_module)["__getattr__"] = _elsewhere(_module)
