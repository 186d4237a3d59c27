"""Exact activation patching: replace one activation by its value on the other prompt and measure what changes.

Denoising puts a clean activation into the corrupt run (what suffices to bring the answer back); noising puts a corrupt
one into the clean run (what the answer needs). Method: Zhang & Nanda 2024, arXiv 2309.16042.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.files import load_tensors, save_tensors
from mansu_tl.metrics import Metric, logit_difference
from mansu_tl.models import component_map
from mansu_tl.patching.runs import check, chunks, heads_last, keep, measured, metric_name, run

_TITLES = {"resid_pre": "residual stream", "attn_out": "attention output", "mlp_out": "MLP output", "z": "head output"}


@dataclass(frozen=True)
class PatchingResult:
    """An activation-patching sweep.

    Attributes:
        tensor: per cell, mean over pairs, as a share of the clean-corrupt difference: denoising counts from the
            corrupt metric up (1 = fully restored), noising from the clean one down (1 = fully destroyed).
        rows: row names (layers).
        columns: column names (positions or heads).
        row_axis: what the rows are.
        column_axis: what the columns are.
        component: which activation was patched.
        direction: "denoising" or "noising".
        metric: name of the metric.
        metric_clean: its mean on the clean prompts.
        metric_corrupt: its mean on the corrupt prompts.
    """

    tensor: Float[Tensor, "row column"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_axis: str
    column_axis: str
    component: str
    direction: str
    metric: str
    metric_clean: float
    metric_corrupt: float

    def to_dataframe(self) -> pd.DataFrame:
        """Cells as a table: rows x columns."""
        return pd.DataFrame(self.tensor.tolist(), index=list(self.rows), columns=list(self.columns))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write one safetensors file."""
        return save_tensors(
            path, "PatchingResult", {"tensor": self.tensor}, {k: v for k, v in self.__dict__.items() if k != "tensor"}
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> PatchingResult:
        """Read what `save` wrote."""
        tensors, facts = load_tensors(path, "PatchingResult")
        names: dict[str, Any] = {key: tuple(facts.pop(key)) for key in ("rows", "columns")}
        return cls(**tensors, **names, **facts)

    def _repr_html_(self) -> str:
        return f"<p><b>{self.component}, {self.direction}</b></p>{self.to_dataframe().to_html(float_format='{:.2f}'.format)}"


def activation_patching(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    component: str = "resid_pre",
    direction: str = "denoising",
    metric: Metric = logit_difference,
    tokens: Sequence[str] | None = None,
    cells_per_batch: int = 8,
    batch_size: int = 64,
    progress: bool = False,
) -> PatchingResult:
    """Sweep one activation over layers and positions (or heads), one exact intervention a cell.

    Args:
        component: "resid_pre", "attn_out", "mlp_out" sweep layer x position; "z" (a head's output, all positions)
            sweeps layer x head.
        tokens: what stands at each position, for the column names; positions are numbered where not given.
        cells_per_batch: interventions that share a forward pass.

    Raises:
        MansuError: an unknown component or direction, tokens of another number than the positions, or pairs on which
            the metric does not differ.
    """
    if component not in _TITLES:
        raise MansuError(f"patching: unknown component {component!r}; choose one of {', '.join(_TITLES)}")
    if direction not in ("denoising", "noising"):
        raise MansuError(f"patching: unknown direction {direction!r}; choose denoising or noising")
    check(model, pairs)
    cmap = component_map(model)
    by_head = component == "z"
    n_columns = cmap.n_heads if by_head else pairs.clean.shape[1]
    if tokens is not None and not by_head and len(tokens) != n_columns:
        raise MansuError(f"patching: {len(tokens)} tokens for {n_columns} positions; give one for each")
    words = tokens or [""] * n_columns
    sums = torch.zeros(cmap.n_layers, n_columns, dtype=torch.float64)
    ends = [0.0, 0.0]
    names = [_hook_name(component, layer, cmap.post_norms) for layer in range(cmap.n_layers)]
    parts = list(chunks(pairs, batch_size))
    bar = tqdm(total=len(parts) * sums.numel(), desc=f"patching {component}", unit="cell", disable=not progress)
    with torch.no_grad(), bar:
        for _, chunk in parts:
            base_tokens, source = (
                (chunk.corrupt, chunk.clean) if direction == "denoising" else (chunk.clean, chunk.corrupt)
            )
            kept: dict[str, Tensor] = {}
            run(model, source, chunk.lengths, [(name, keep(kept, name)) for name in names])
            for i, prompts in enumerate((chunk.clean, chunk.corrupt)):
                ends[i] += measured(metric, run(model, prompts, chunk.lengths).float(), chunk).double().sum().item()
            for layer, name in enumerate(names):
                for start in range(0, n_columns, cells_per_batch):
                    cells = list(range(start, min(start + cells_per_batch, n_columns)))
                    hook = (name, _replacing(kept[name], cells, by_head, cmap.n_heads))
                    logits = run(model, base_tokens.repeat(len(cells), 1), chunk.lengths.repeat(len(cells)), [hook])
                    for cell, part in zip(cells, logits.float().chunk(len(cells)), strict=True):
                        sums[layer, cell] += measured(metric, part, chunk).double().sum()
                    bar.update(len(cells))
    clean, corrupt = (end / len(pairs) for end in ends)
    if abs(clean - corrupt) < 1e-6:
        raise MansuError(
            f"pairs: the metric is {clean:.3g} on the clean and {corrupt:.3g} on the corrupt prompts; there is no "
            "difference to restore, use pairs on which the model shows the knowledge"
        )
    means = sums / len(pairs)
    shares = (means - corrupt) / (clean - corrupt) if direction == "denoising" else (clean - means) / (clean - corrupt)
    return PatchingResult(
        tensor=shares.float(),
        rows=tuple(str(layer) for layer in range(cmap.n_layers)),
        columns=tuple(f"H{i}" if by_head else f"{i} {words[i]}".strip() for i in range(n_columns)),
        row_axis="layer",
        column_axis="head" if by_head else "position",
        component=_TITLES[component],
        direction=direction,
        metric=metric_name(metric),
        metric_clean=clean,
        metric_corrupt=corrupt,
    )


def _hook_name(component: str, layer: int, post_norms: bool) -> str:
    block = f"blocks.{layer}"
    if component == "resid_pre":
        return f"{block}.hook_in"
    if component == "z":
        return f"{block}.attn.o.hook_in"
    if component == "attn_out":
        return f"{block}.ln1_post.hook_out" if post_norms else f"{block}.attn.hook_out"
    return f"{block}.ln2_post.hook_out" if post_norms else f"{block}.mlp.hook_out"


def _replacing(source: Tensor, cells: list[int], by_head: bool, n_heads: int) -> Callable[..., Tensor]:
    def hook_fn(value: Tensor, hook: object) -> Tensor:
        out = value.clone()
        per_cell = out.unflatten(0, (len(cells), -1))
        for i, cell in enumerate(cells):
            if by_head:
                heads_last(per_cell[i], n_heads)[:, :, cell] = heads_last(source, n_heads)[:, :, cell]
            else:
                per_cell[i][:, cell] = source[:, cell]
        return out

    return hook_fn
