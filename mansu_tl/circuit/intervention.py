"""Exact edge patching: run the clean prompts while chosen edges carry their ablated values.

Every reader's input is rebuilt as

    input_v = stream_v(ablated) + sum_u mask[u, v] (a_u(this run) - a_u(ablated)),

so an edge in the mask carries what its writer computes in this run, every other edge its ablated value (by default what
it carries on the corrupt prompt). All edges on = the clean run, all off = the ablated run. Heads in front of a post-norm
(gemma) go through it together, at the point that the mask gives.

Many masks share one run: what is alike in them is computed once (see `sharing`), positions in front of the first
changed token and padding are not computed at all, nor the last layer's queries and MLP away from the asked positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.masked_run import AblatedRun, MaskedRun
from mansu_tl.circuit.memory import free_bytes
from mansu_tl.circuit.sharing import plan, useful
from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.models.state import computing_dtype, home
from mansu_tl.runs.ablation import Ablation
from mansu_tl.runs.ends import end_hooks
from mansu_tl.runs.exactness import require_exact
from mansu_tl.runs.metrics import Metric, answer_log_prob, logit_difference, measured, options_read
from mansu_tl.runs.passes import chunks, prepared, run

# Numbers held at once by a group of masks: changes, rebuilt inputs, attention rows, MLP, logits (fp32: 768 MB). A GPU is
# kept busy by more of them, as far as an eighth of its free memory goes.
_ROW_ELEMENTS, _ROW_ELEMENTS_ON_GPU = 192_000_000, 2_000_000_000
_SHARE_OF_GPU = 1 / 8


@torch_defaults()
@torch.no_grad()
def patch_edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    masks: Float[Tensor, "mask writer reader"],
    *,
    ablation: Ablation | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "mask pair"]:
    """The metric of every pair under every mask: 1 = the edge is live, 0 = ablated; values between interpolate.

    Args:
        ablation: what edges carry that are not live; their values on the corrupt prompts where not given.
        batch_size: at most so many pairs in a pass; fewer where memory asks for it.

    Raises:
        MansuError: masks of another shape than the model's graph, or not finite.
    """
    rows = prepared(model, pairs, options_read(metric))
    return patched(model, rows, masks, ablation or Ablation(), metric, batch_size, progress)[0]


@torch_defaults()
@torch.no_grad()
def patched_logits(
    model: TransformerBridge,
    pairs: PromptPairs,
    masks: Float[Tensor, "mask writer reader"],
    *,
    ablation: Ablation | None = None,
    batch_size: int = 64,
) -> Float[Tensor, "mask pair vocab"]:
    """The logits behind every clean prompt under every mask: what the model says next, as `patch_edges` measures it.

    Raises:
        MansuError: as `patch_edges`.
    """
    first = pairs.options[:, :1, :1]
    # One option of one token needs no row but the prompt; a second one has to be there and is not read.
    alone = replace(pairs, options=torch.cat([first, (first == 0).to(first)], 1))
    patching = Patching(model, prepared(model, alone, 1), ablation or Ablation(), answer_log_prob, batch_size)
    return patching.logits(masks)


@torch.no_grad()
def patched(
    model: TransformerBridge,
    pairs: Forced[PromptPairs],
    masks: Float[Tensor, "mask writer reader"],
    ablation: Ablation,
    metric: Metric,
    batch_size: int,
    progress: bool = False,
) -> tuple[Float[Tensor, "mask pair"], Float[Tensor, " pair"]]:
    """`patch_edges`, and the metric with every edge ablated, which falls out of it."""
    patching = Patching(model, pairs, ablation, metric, batch_size)
    return patching.values(masks, progress), patching.off


class Patching:
    """Edge patching of some pairs, to be asked for masks again and again; what no mask changes is kept.

    Raises:
        MansuError: a batch of no pair.
    """

    def __init__(
        self,
        model: TransformerBridge,
        pairs: Forced[PromptPairs],
        ablation: Ablation,
        metric: Metric,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise MansuError(f"batch_size={batch_size}: at least one pair has to fit in a batch")
        self.model, self.pairs, self.ablation, self.metric = model, pairs, ablation, metric
        self.graph, self.map = Graph.of(model), Anatomy.of(model)
        self.off = torch.full((len(pairs),), torch.nan)
        rows, places = (-(-len(part) // len(pairs)) for part in (pairs.clean, pairs.places.rows))
        self.costs = _costs(self.map, rows * pairs.clean.shape[1], places * model.cfg.d_vocab)
        self.room = _ROW_ELEMENTS
        if home(model).type == "cuda":
            fitting = int(_SHARE_OF_GPU * free_bytes(model) / computing_dtype(model).itemsize)
            self.room = max(self.room, min(_ROW_ELEMENTS_ON_GPU, fitting))
        fixed, a_mask, a_writer = self.costs
        most = max(1, min(batch_size, self.room // (fixed + a_mask + a_writer * len(self.map.writers))))
        # As many pairs in each batch, or one less.
        self.batch = -(-len(pairs) // -(-len(pairs) // most))
        self.kept: tuple[slice, AblatedRun] | None = None

    @torch.no_grad()
    def values(self, masks: Float[Tensor, "mask writer reader"], progress: bool = False) -> Float[Tensor, "mask pair"]:
        """The metric of every pair under every mask.

        Raises:
            MansuError: masks of another shape than the model's graph, or not finite.
        """
        out, total = torch.empty(len(masks), len(self.pairs)), len(self.pairs) * len(masks)
        with tqdm(total=total, desc="edge patching", unit="run", disable=not progress) as bar:
            for mask, where, chunk, logits in self._runs(masks):
                out[mask, where] = measured(self.metric, logits, chunk).cpu()
                bar.update(len(chunk))
        return out

    @torch.no_grad()
    def logits(self, masks: Float[Tensor, "mask writer reader"]) -> Float[Tensor, "mask pair vocab"]:
        """The logits of every pair under every mask, of pairs whose rows are their prompts.

        Raises:
            MansuError: as `values`.
        """
        out = torch.empty(len(masks), len(self.pairs), self.model.cfg.d_vocab)
        for mask, where, _, logits in self._runs(masks):
            out[mask, where] = logits.cpu()
        return out

    def _runs(self, masks: Tensor) -> Iterator[tuple[int, slice, Forced[PromptPairs], Tensor]]:
        """Mask by mask and batch by batch, the logits at the asked positions."""
        self._check(masks)
        for where, chunk in chunks(self.pairs, self.batch):
            base = self._base(where, chunk)
            for group, live in self._groups(masks):
                logits = MaskedRun(base, plan(self.map, live, self.ablation.kind == "corrupt")).logits()
                for i in range(group.stop - group.start):
                    yield group.start + i, where, chunk, logits(i)

    def in_turn(self, masks: Float[Tensor, "mask writer reader"]) -> Iterator[Float[Tensor, "mask pair"]]:
        """The same, a few neighbouring masks after another: as many as fit into memory together."""
        self._check(masks)
        for group, _ in self._groups(masks):
            yield self.values(masks[group])

    def _base(self, where: slice, chunk: Forced[PromptPairs]) -> AblatedRun:
        """The ablated run of a batch; that of the last one is kept."""
        if self.kept is None or self.kept[0] != where:
            self.kept = None  # freed before the next is made
            base = AblatedRun(self.model, self.map, chunk, self.ablation)
            require_exact(
                self.model, f"edge patching against {self.ablation.kind}", partial(_unpatched, base, self.graph)
            )
            self.off[where] = measured(self.metric, base.run.logits, chunk).cpu()
            self.kept = where, base
        return self.kept[1]

    def _check(self, masks: Tensor) -> None:
        if tuple(masks.shape[1:]) != tuple(self.graph.exists.shape):
            raise MansuError(
                f"mask: shape {tuple(masks.shape[1:])}, this model's graph is {tuple(self.graph.exists.shape)}; "
                "the circuit belongs to another model"
            )
        if not torch.isfinite(masks).all():
            raise MansuError("mask: it holds numbers that are not finite; use 0, 1 or what lies between")

    def _groups(self, masks: Tensor) -> Iterator[tuple[slice, np.ndarray]]:
        """Neighbouring masks that fit into the room together, without their useless edges."""
        fixed, a_mask, a_writer = self.costs
        budget = self.room // self.batch - fixed
        exists, block = self.graph.exists.numpy(), max(1, 8_000_000 // self.graph.exists.numel())
        for first in range(0, len(masks), block):
            live = useful(self.map, masks[first : first + block].cpu().float().numpy() * exists)
            costs: list[int] = (a_mask + a_writer * (live != 0).any(2).sum(1)).tolist()
            start = 0
            while start < len(costs):
                stop, total = start + 1, costs[start]
                while stop < len(costs) and total + costs[stop] <= budget:
                    total += costs[stop]
                    stop += 1
                yield slice(first + start, first + stop), live[start:stop]
                start = stop


def _unpatched(base: AblatedRun, graph: Graph) -> tuple[Tensor, Tensor]:
    """The logits with every edge live, and those of the clean prompts; and the same with none and of the ablated run."""
    every = useful(base.map, np.stack([graph.exists.numpy(), np.zeros_like(graph.exists.numpy())]).astype(np.float32))
    logits = MaskedRun(base, plan(base.map, every, base.ablation.kind == "corrupt")).logits()
    clean = run(base.model, base.pairs.clean, base.pairs.places, end_hooks(base.model, base.pairs, clean=True))
    return torch.cat([logits(0), logits(1)]), torch.cat([clean.float(), base.run.logits])


def _costs(anatomy: Anatomy, width: int, vocab: int) -> tuple[int, int, int]:
    """How many numbers are held for one pair: whatever the masks, for every mask, and for every writer that it uses.

    The ablated run, as it is and at the tokens that count; the inputs of a mask's attention, before and behind the norm, its
    attention rows, its MLP and its logits; a writer's change.
    """
    readers = anatomy.n_attention_readers
    kept = 2 * anatomy.n_layers * (4 * anatomy.d_model + (anatomy.n_heads + readers) * anatomy.d_head)
    rows = 3 * (anatomy.n_heads + readers) * anatomy.d_head + 2 * anatomy.n_heads * width
    inputs = 3 * readers * anatomy.d_model
    return width * kept + vocab, width * (inputs + rows + 4 * anatomy.d_mlp) + 2 * vocab, width * anatomy.d_model
