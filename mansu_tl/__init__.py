"""Did this model really forget, and does it stay forgotten once it is quantized?

Load a model and a task, find the circuit behind the knowledge, edit it, quantize it, and measure what is left, on a
TransformerLens `TransformerBridge`. These are the names that most people need; the rest lives in its room, for example
`mtl.circuit.faithfulness_curve` or `mtl.plots.circuit`.
"""

from importlib.metadata import version as _version

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
from mansu_tl.circuit import discover_circuit, edge_attribution
from mansu_tl.data import PromptPairs
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.explorer import explore
from mansu_tl.models import load, save
from mansu_tl.patching import activation_patching
from mansu_tl.quantization import quantize, quantizers
from mansu_tl.runs import accuracy
from mansu_tl.study import StudyConfig, run_study
from mansu_tl.unlearning import Edit, methods, unlearn
from mansu_tl.verification import certify, circuit_divergence, scorecard

__version__ = _version("mansu-tl")

__all__ = [
    "Edit",
    "MansuError",
    "PromptPairs",
    "StudyConfig",
    "accuracy",
    "activation_patching",
    "certify",
    "circuit_divergence",
    "discover_circuit",
    "edge_attribution",
    "explore",
    "load",
    "load_task",
    "methods",
    "quantize",
    "quantizers",
    "run_study",
    "save",
    "scorecard",
    "unlearn",
]

# What else completion offers: the rooms that hold the rest.
_ROOMS = (circuit, data, explorer, models, patching, plots, quantization, runs, study, unlearning, verification)


def __dir__() -> list[str]:
    return sorted([*__all__, *(room.__name__.rpartition(".")[2] for room in _ROOMS)])
