"""Did this model really forget, and does it stay forgotten once it is quantized?

The whole road on a TransformerLens `TransformerBridge`: load a model and a task, find the forget circuit, edit it,
quantize it, and measure what is left.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mansu_tl import plots
from mansu_tl.circuit import (
    Circuit,
    EdgeScores,
    Graph,
    completeness,
    conflict,
    discover_circuit,
    edge_attribution,
    faithfulness,
    faithfulness_curve,
    minimality,
    patch_edges,
    path_patching,
    random_faithfulness,
)
from mansu_tl.config import StudyConfig
from mansu_tl.data import PromptPairs, Questions, Sequences, Task
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.models import load, save
from mansu_tl.patching import activation_patching, neuron_attribution, node_attribution
from mansu_tl.quantization import quantize, quantizers, update_statistics
from mansu_tl.runs import ablation, accuracy
from mansu_tl.study import Study, run_study
from mansu_tl.unlearning import Edit, MansuSettings, methods, unlearn
from mansu_tl.verification import Certificate, Divergence, Scorecard, certify, circuit_divergence, scorecard

if TYPE_CHECKING:
    from mansu_tl.explorer import explore

__version__ = version("mansu-tl")

__all__ = [
    "Certificate",
    "Circuit",
    "Divergence",
    "EdgeScores",
    "Edit",
    "Graph",
    "MansuError",
    "MansuSettings",
    "PromptPairs",
    "Questions",
    "Scorecard",
    "Sequences",
    "Study",
    "StudyConfig",
    "Task",
    "__version__",
    "ablation",
    "accuracy",
    "activation_patching",
    "certify",
    "circuit_divergence",
    "completeness",
    "conflict",
    "discover_circuit",
    "edge_attribution",
    "explore",
    "faithfulness",
    "faithfulness_curve",
    "load",
    "load_task",
    "methods",
    "minimality",
    "neuron_attribution",
    "node_attribution",
    "patch_edges",
    "path_patching",
    "plots",
    "quantize",
    "quantizers",
    "random_faithfulness",
    "run_study",
    "save",
    "scorecard",
    "unlearn",
    "update_statistics",
]

# What else completion offers: the rooms that hold the rest.
_ROOMS = ("circuit", "data", "models", "patching", "quantization", "runs", "unlearning", "verification")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])


def __getattr__(name: str) -> Any:
    # The explorer draws in widgets and is asked for in notebooks only.
    if name == "explore":
        from mansu_tl.explorer import explore

        return explore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
