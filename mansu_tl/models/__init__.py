"""Models: loading, saving, copies, and the map from components to slices of HF parameters."""

from mansu_tl.models.anatomy import Anatomy, WeightSlice, flat_indices
from mansu_tl.models.copies import float32_copy, plain, rebuild
from mansu_tl.models.families import Family, register_family
from mansu_tl.models.fingerprint import fingerprint
from mansu_tl.models.gguf import gguf_weights, save_gguf
from mansu_tl.models.loading import load
from mansu_tl.models.packages import PACKAGED
from mansu_tl.models.saving import save
from mansu_tl.models.state import home, require_copyable, require_ready
from mansu_tl.models.tree import parameters
from mansu_tl.models.weights import (
    AttentionWeights,
    LinearWeight,
    MlpWeights,
    NormWeights,
    attention_weights,
    component_masks,
    linear_weights,
    mlp_weights,
    norm_weights,
    orient,
)

__all__ = [
    "PACKAGED",
    "Anatomy",
    "AttentionWeights",
    "Family",
    "LinearWeight",
    "MlpWeights",
    "NormWeights",
    "WeightSlice",
    "attention_weights",
    "component_masks",
    "fingerprint",
    "flat_indices",
    "float32_copy",
    "gguf_weights",
    "home",
    "linear_weights",
    "load",
    "mlp_weights",
    "norm_weights",
    "orient",
    "parameters",
    "plain",
    "rebuild",
    "register_family",
    "require_copyable",
    "require_ready",
    "save",
    "save_gguf",
]


def __dir__() -> list[str]:
    return sorted(__all__)
