"""An edit: which HF parameters, which weights, old and new values. Everything else of the model stays bit-identical."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, linear_weights, parameters, rebuild
from mansu_tl.results.result import Result, Table


@dataclass(frozen=True)
class Edit(Result):
    """A sparse change of HF parameters.

    Attributes:
        method: the method that made it.
        base: fingerprint of the model it belongs to.
        indices: per parameter, the flat indices of the edited weights (ascending).
        old: per parameter, the values before.
        new: per parameter, the values after.
        facts: settings, seed and measurements of the run that made it (JSON-able).
        history: one row a logged step, columns as the method names them.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> path = mtl.unlearn(model, task, "graddiff", max_steps=1).save("edit.safetensors")
        >>> edited = mtl.unlearning.Edit.load(path).apply(model)
    """

    method: str
    base: str
    indices: Mapping[str, Int[Tensor, " _"]]
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()

    @classmethod
    @torch_defaults()
    def between(
        cls,
        model: TransformerBridge,
        values: Mapping[str, Tensor],
        method: str,
        facts: Mapping[str, Any] | None = None,
        history: tuple[Mapping[str, float], ...] = (),
    ) -> Edit:
        """The edit that turns `model`'s parameters into `values` (parameters that are not named stay)."""
        indices, old, new = {}, {}, {}
        current = parameters(model)
        for name, value in values.items():
            before = current[name].detach()
            changed = (before != value).flatten().nonzero()[:, 0]
            if changed.numel():
                indices[name] = changed.cpu()
                old[name] = before.flatten()[changed].cpu().clone()
                new[name] = value.detach().flatten()[changed].cpu().clone()
        return cls(method, fingerprint(model), indices, old, new, dict(facts or {}), history)

    @property
    def n_weights(self) -> int:
        """How many weights it changes."""
        return sum(index.numel() for index in self.indices.values())

    def linear_share(self, model: TransformerBridge) -> float:
        """Edited weights as a share of the weights that 4-bit loading quantizes."""
        linear = linear_weights(model)
        edited = sum(index.numel() for name, index in self.indices.items() if name in linear)
        return edited / sum(weight.in_features * weight.out_features for weight in linear.values())

    @torch_defaults()
    def apply(self, model: TransformerBridge) -> TransformerBridge:
        """A new bridge with the edit in place; `model` is untouched.

        Raises:
            MansuError: `model` is not the one the edit was made for.
        """
        found = fingerprint(model)
        if found != self.base:
            raise MansuError(
                f"edit: the edit was made for another model (fingerprint {self.base[:12]}..., this one {found[:12]}...); "
                "load that one"
            )
        return self._written(model, self.new)

    @torch_defaults()
    def revert(self, edited: TransformerBridge) -> TransformerBridge:
        """A new bridge with the old values back: bit for bit the model that the edit was made for.

        Raises:
            MansuError: the edited weights of `edited` are not this edit's.
        """
        current = parameters(edited)
        for name, index in self.indices.items():
            if name not in current or not torch.equal(current[name].detach().flatten().cpu()[index], self.new[name]):
                raise MansuError(
                    f"edit: {name} of this model does not hold the edit's values; revert what apply() gave"
                )
        return self._written(edited, self.old)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a parameter: how many weights changed and by how much."""
        rows = []
        for name, index in self.indices.items():
            change = (self.new[name].double() - self.old[name].double()).abs()
            rows.append((name, index.numel(), change.mean().item(), change.max().item()))
        return pd.DataFrame(rows, columns=["parameter", "edited", "mean_change", "max_change"])

    def _written(self, model: TransformerBridge, values: Mapping[str, Tensor]) -> TransformerBridge:
        current, changed = parameters(model), {}
        for name, index in self.indices.items():
            full = current[name].detach().clone()
            full.view(-1)[index.to(full.device)] = values[name].to(full.device, full.dtype)
            changed[name] = full
        return rebuild(model, changed)

    def __repr__(self) -> str:
        return f"Edit({self.method!r}: {self.n_weights} weights in {len(self.indices)} parameters)"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "by parameter"),)
