"""A study's results under the names of their files: from memory, or from a gallery's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.models import linear_weights, orient, parameters
from mansu_tl.quantization import Grid, quantizer
from mansu_tl.quantization.quantizer import AnyQuantizer
from mansu_tl.results.files import read_packed, write_packed, write_text
from mansu_tl.results.result import Result
from mansu_tl.study.study import MethodResult, Study
from mansu_tl.unlearning import headline, method_title
from mansu_tl.verification import CadByDepth, Divergence
from mansu_tl.verification.saved_model import SavedModel

R = TypeVar("R", bound=Result)
Packed = tuple[dict[str, Tensor], dict[str, Any]]
_RULED = 64  # rows of the ruled matrix that are kept


class Kept:
    """What pictures are drawn from.

    Args:
        source: a folder, or the same by file name: results, tables, facts, and pairs of tensors and facts.
    """

    def __init__(self, source: Path | Mapping[str, Any]) -> None:
        self.source = source
        self.facts: dict[str, Any] = self.value("study.json")
        self.titles: dict[str, str] = self.facts["methods"]
        self.first: str = self.facts["quantizers"][0]
        self.main = headline(self.titles)
        self.baseline = next((method for method in self.titles if method != self.main), None)

    @property
    def shown(self) -> tuple[str, ...]:
        """The leading method and the first other one, whose pictures stand together."""
        return tuple(method for method in (self.baseline, self.main) if method is not None)

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        if isinstance(self.source, Path):
            return (self.source / name).exists()
        return any(key == name or key.startswith(f"{name}/") for key in self.source)

    def load(self, kind: type[R], name: str) -> R:
        """A result."""
        found: R = kind.load(self.source / name) if isinstance(self.source, Path) else self.source[name]
        return found

    def value(self, name: str) -> Any:
        """Facts (JSON), or a table (CSV)."""
        if not isinstance(self.source, Path):
            return self.source[name]
        path = self.source / name
        return pd.read_csv(path) if path.suffix == ".csv" else json.loads(path.read_text(encoding="utf-8"))

    def packed(self, name: str, kind: str) -> Packed:
        """Tensors and the facts beside them."""
        return read_packed(self.source / name, kind) if isinstance(self.source, Path) else self.source[name]

    def circuit(self) -> Circuit:
        """The forget circuit."""
        return self.load(Circuit, "circuit.safetensors")

    def divergence(self, method: str, name: str) -> Divergence:
        """CAD of a method in full precision ("") or under a quantizer."""
        return self.load(Divergence, f"methods/{method}/cad_{name or 'full'}.safetensors")

    def depths(self) -> dict[str, CadByDepth]:
        """CAD by depth of every method, in full precision and under the first quantizer."""
        files = {
            f"{title}, {name or 'full precision'}": f"methods/{method}/depth_{name or 'full'}.safetensors"
            for method, title in self.titles.items()
            for name in ("", self.first)
        }
        return {label: self.load(CadByDepth, file) for label, file in files.items() if self.has(file)}

    def divergences(self) -> dict[str, Divergence]:
        """CAD of every method, in full precision and under every quantizer."""
        return {
            f"{title}, {name or 'full precision'}": self.divergence(method, name)
            for method, title in self.titles.items()
            for name in ("", *self.facts["quantizers"])
        }

    def references(self) -> dict[str, Divergence]:
        """CAD of the references."""
        names = enumerate(self.facts["references"])
        return {name: self.load(Divergence, f"references/{i}.safetensors") for i, name in names}


def kept_of(study: Study) -> dict[str, Any]:
    """What a study has, by file name."""
    out: dict[str, Any] = {
        "scores.safetensors": study.scores,
        "circuit.safetensors": study.circuit,
        "patching.safetensors": study.patching,
        "summary.csv": study.summary(),
        "study.json": {
            "model": study.name,
            "chance": study.chance,
            "quantizers": list(study.config.quantizers),
            "methods": {method: method_title(method) for method in study.results},
            "also": list(study.also),
            "never": study.config.never,
            "references": list(study.references),
            "random_faithfulness": study.random_faithfulness,
        },
    }
    out |= {f"references/{i}.safetensors": each for i, each in enumerate(study.references.values())}
    for base, one in study.every.items():
        start = "methods" if one is study else f"also/{base}"
        for method, result in one.results.items():
            out |= {f"{start}/{method}/{name}": each for name, each in _of_method(result).items()}
    return out


def _of_method(result: MethodResult) -> dict[str, Result]:
    out: dict[str, Result] = {"scorecard.safetensors": result.card, "updates.safetensors": result.statistics}
    out |= {f"cad_{name or 'full'}.safetensors": each for name, each in result.divergences.items()}
    out |= {f"depth_{name or 'full'}.safetensors": each for name, each in result.depths.items()}
    return out | ({"certificate.json": result.certificate} if result.certificate is not None else {})


def write_kept(kept: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every result in a file of its name."""
    out = []
    for name, each in kept.items():
        path = folder / name
        if isinstance(each, Result):
            out.append(each.save(path))
        elif isinstance(each, pd.DataFrame):
            out.append(write_text(path, each.to_csv(index=False)))
        elif isinstance(each, tuple):
            out.append(write_packed(path, path.stem.capitalize(), *each))
        else:
            out.append(write_text(path, json.dumps(each, indent=2)))
    return out


def ruled_of_saved(study: Study) -> dict[str, Packed]:
    """The most edited matrix of the leading method, as the saved folders hold it; none where nothing was saved."""
    result = study.results[headline(study.results)]
    if result.folder is None:
        return {}
    before, after = (SavedModel(folder) for folder in (study.folder / "model" / "original", result.folder))
    name = _most_edited(result, before.linear)
    if name is None:
        return {}
    old, new = (orient(model.tensor(name), before.linear[name]) for model in (before, after))
    return _ruled(study, name, old, new)


def ruled_of_models(study: Study, model: TransformerBridge, edited: TransformerBridge) -> dict[str, Packed]:
    """The same of models in memory."""
    linear = linear_weights(model)
    name = _most_edited(study.results[headline(study.results)], linear)
    if name is None:
        return {}
    old, new = (orient(parameters(each)[name].detach().cpu(), linear[name]) for each in (model, edited))
    return _ruled(study, name, old, new)


def _most_edited(result: MethodResult, linear: Mapping[str, Any]) -> str | None:
    counts = {name: indices.numel() for name, indices in result.edit.indices.items() if name in linear}
    return max(counts, key=lambda name: counts[name], default=None)


def _rules(one: AnyQuantizer) -> bool:
    """Whether all blocks' codes lie in the same places once a block's scale is taken out."""
    return isinstance(one, Grid) and bool(one.levels.min() < 0) and not one.given_scales


def _ruled(study: Study, name: str, old: Float[Tensor, "row in"], new: Float[Tensor, "row in"]) -> dict[str, Packed]:
    """Its most edited rows on the first quantizer that is a ruler: an asymmetric grid's codes lie elsewhere in each block."""
    grids = {each: quantizer(each) for each in study.config.quantizers}
    ruler = next((n for n, g in grids.items() if _rules(g)), None)
    if ruler is None:
        return {}
    rows = (old != new).sum(1).topk(min(_RULED, old.shape[0])).indices.sort().values
    tensors = {"before": old[rows].float(), "after": new[rows].float()}
    return {"ruled.safetensors": (tensors, {"name": name, "grid": ruler})}
