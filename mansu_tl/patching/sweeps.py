"""Exact activation patching: replace one activation by its value on the other prompt and measure what changes.

Denoising puts a clean activation into the corrupt run (what suffices to bring the answer back); noising puts a corrupt
one into the clean run (what the answer needs). Method: Zhang & Nanda 2024, arXiv 2309.16042. Every cell is one exact
intervention; only what it can change is run (see `runs.resume`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
import transformer_lens.patching as tl_patching
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.patching.cells import TITLES, Cells, component_named, require
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.ends import end_hooks
from mansu_tl.runs.metrics import Metric, logit_difference, measured, metric_name, options_read
from mansu_tl.runs.passes import Recording, chunks, prepared
from mansu_tl.runs.resume import Base, record_base


@dataclass(frozen=True)
class PatchingResult(Result):
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
        metric_corrupt: its mean on the corrupt prompts (or with everything ablated).
        per_pair: the metric itself of every pair in every cell, kept on request.
        pair_clean: the metric of every pair on its clean prompt, kept with `per_pair`.
        pair_corrupt: the same on its corrupt prompt.
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
    per_pair: Float[Tensor, "pair row column"] | None = None
    pair_clean: Float[Tensor, " pair"] | None = None
    pair_corrupt: Float[Tensor, " pair"] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """Cells as a table: rows x columns."""
        return pd.DataFrame(self.tensor.tolist(), index=list(self.rows), columns=list(self.columns))

    def to_transformer_lens(self) -> tl_patching.PatchingResult:
        """TransformerLens's own result of the sweep, for its intervals and tests (`bootstrap_ci`, `permutation_pvalue`).

        Its values are the metric of every pair (not shares), its baseline is the run that was patched into.

        Raises:
            MansuError: the sweep did not keep its pairs.
        """
        if self.per_pair is None or self.pair_clean is None or self.pair_corrupt is None:
            raise MansuError("patching: this sweep kept no values per pair; run it with per_pair=True")
        axes = [self.row_axis, self.column_axis]
        return tl_patching.PatchingResult(
            values=self.per_pair.permute(1, 2, 0).contiguous(),
            axis_names=axes,
            index_df=tl_patching.make_df_from_ranges(list(self.tensor.shape), axes),
            metric_names=[self.metric],
            reduced=False,
            baseline=self.pair_corrupt if self.direction == "denoising" else self.pair_clean,
        )

    def __repr__(self) -> str:
        return (
            f"PatchingResult({self.direction} {self.component}: {len(self.rows)} {self.row_axis} x {len(self.columns)} "
            f"{self.column_axis}, {self.metric} {self.metric_corrupt:.3g} -> {self.metric_clean:.3g})"
        )

    def _tables(self) -> Sequence[Table]:
        caption = f"{self.row_axis} by {self.column_axis}, 1 = the whole clean-corrupt difference"
        return (Table(self.to_dataframe(), caption, "{:.2f}".format, rows=32, index=True),)


@torch_defaults()
def activation_patching(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    component: str = "resid_pre",
    by: str | None = None,
    direction: str = "denoising",
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    tokens: Sequence[str] | None = None,
    per_pair: bool = False,
    cells_per_batch: int = 8,
    batch_size: int = 64,
    progress: bool = False,
) -> PatchingResult:
    """Sweep one activation over layers and positions or heads, one exact intervention a cell.

    Args:
        component: "resid_pre", "resid_mid", "resid_post" (the stream before, within and after a block), "attn_out",
            "mlp_out"; or of heads "z" (output), "q", "k", "v" (k and v of KV heads, before any rotary embedding) and
            "pattern" (attention probabilities). TransformerLens's names ("hook_resid_pre", "attn.hook_z") mean the same.
        by: "position" (default for streams: layer x position), "layer" (all positions at once); "head" (default for
            heads: layer x head, all positions at once), "head-position" (one row a head; for "pattern" the position
            that attends).
        direction: "denoising" or "noising".
        ablation: noising with other values than the corrupt prompt's (zero, mean); see `ablation`.
        tokens: what stands at each position of the prompts, for the column names; positions are numbered where not given.
            Where options have several tokens, those behind the prompt are called "+1", "+2", ...
        per_pair: also keep the metric of every pair in every cell.
        cells_per_batch: interventions that share a forward pass.

    Raises:
        MansuError: an unknown component, way or direction, tokens of another number than the positions, an ablation
            that has no such values, or pairs on which the metric does not differ.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> sweep = mtl.activation_patching(model, task.forget_pairs[:8])
        >>> frame = sweep.to_dataframe()
    """
    anatomy = Anatomy.of(model)
    component = component_named(component)
    by = require(component, by, anatomy.parallel)
    if direction not in ("denoising", "noising"):
        raise MansuError(f"patching: unknown direction {direction!r}; choose denoising or noising")
    ablation = Ablation() if ablation is None else ablation
    if ablation.kind != "corrupt" and direction == "denoising":
        raise MansuError(
            f"patching: {ablation.kind} ablation has no run to put clean values into; use direction='noising'"
        )
    if ablation.kind == "mean" and component in ("q", "k", "v", "pattern"):
        raise MansuError(f"patching: mean ablation has no values for {component}; use 'zero' or 'corrupt', or patch z")
    if cells_per_batch < 1:
        raise MansuError(f"patching: cells_per_batch={cells_per_batch}; at least one cell has to run")
    run = prepared(model, pairs, options_read(metric))
    width = run.clean.shape[1]
    prompt = run.given.clean.shape[1]
    if tokens is not None and "position" in by and len(tokens) != prompt:
        raise MansuError(f"patching: {len(tokens)} tokens for {prompt} positions; give one for each")
    words = [""] * prompt if tokens is None else list(tokens)
    words += [f"+{i + 1}" for i in range(width - prompt)]
    cells = Cells(model, anatomy, component, by, width)
    rows, columns = cells.rows, cells.columns(words)
    values = torch.zeros(len(pairs), len(rows), len(columns), dtype=torch.float64)
    ends = torch.zeros(2, len(pairs), dtype=torch.float64)
    parts = list(chunks(run, batch_size))
    bar = tqdm(total=len(parts) * values[0].numel(), desc=f"patching {component}", unit="cell", disable=not progress)
    with torch.no_grad(), bar:
        for where, chunk in parts:
            base, source, first, both = _runs(cells, chunk, direction, ablation)
            for i, logits in enumerate(both):
                ends[i, where] = measured(metric, logits, chunk).double().cpu()
            latest = int(chunk.places.positions.min())
            # A cell that is not run has the value of the run it would be put into.
            values[where] = ends[1 if direction == "denoising" else 0, where][:, None, None]
            done = 0
            for layer in range(anatomy.n_layers):
                wanted = cells.of_layer(layer, first)
                for i in range(0, len(wanted), cells_per_batch):
                    group = wanted[i : i + cells_per_batch]
                    start = min([latest, *(first if p is None else p for *_, p in group)])
                    logits = cells.run(base, source, layer, start, group)
                    for (row, column, _, _), part in zip(group, logits, strict=True):
                        values[where, row, column] = measured(metric, part, chunk).double().cpu()
                    bar.update(len(group))
                    done += len(group)
            bar.update(values[0].numel() - done)
    clean, corrupt = ends.mean(1).tolist()
    if abs(clean - corrupt) < 1e-6:
        raise MansuError(
            f"pairs: the metric is {clean:.3g} on the clean and {corrupt:.3g} on the corrupt prompts; there is no "
            "difference to restore, use pairs on which the model shows the knowledge"
        )
    means = values.mean(0)
    shares = (means - corrupt) / (clean - corrupt) if direction == "denoising" else (clean - means) / (clean - corrupt)
    result = PatchingResult(
        tensor=shares.float(),
        rows=rows,
        columns=columns,
        row_axis="head" if by == "head-position" else "layer",
        column_axis={"head": "head", "layer": "position"}.get(by, "position"),
        component=TITLES[component],
        direction=direction,
        metric=metric_name(metric),
        metric_clean=clean,
        metric_corrupt=corrupt,
    )
    if not per_pair:
        return result
    return replace(result, per_pair=values.float(), pair_clean=ends[0].float(), pair_corrupt=ends[1].float())


def _runs(
    cells: Cells, pairs: Forced[PromptPairs], direction: str, ablation: Ablation
) -> tuple[Base, Callable[[str, int], Tensor], int, tuple[Tensor, Tensor]]:
    """The run to patch into, the values to put in, the position from which the two differ, and the logits of both ends."""
    ends = [end_hooks(cells.model, pairs, clean=clean) for clean in (True, False)]
    clean = record_base(cells.model, pairs.clean, pairs.places, cells.roles, ends[0])
    if ablation.kind != "corrupt":
        ablated = ablation.activations(cells.model, pairs)
        return clean, partial(_ablated, clean, ablated), 0, (clean.logits, ablated.logits)
    corrupt = record_base(cells.model, pairs.corrupt, pairs.places, cells.roles, ends[1])
    base, other = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    # Up to the first changed token both runs are the same.
    differs = pairs.changed.any(0).nonzero()
    first = int(differs[0]) if len(differs) else pairs.clean.shape[1] - 1
    return base, other.value, first, (clean.logits, corrupt.logits)


def _ablated(clean: Base, run: Recording, role: str, layer: int) -> Tensor:
    """What has a role in a run with every component switched off; zero where that run has no such thing."""
    if role == "attn_out":
        return run.value("stream", layer + 1) - run.value("mlp_out", layer) - run.value("stream", layer)
    return run.value(role, layer) if f"{role}{layer}" in run.values else torch.zeros_like(clean.value(role, layer))
