"""The explorer: what is chosen, the figures of it, and what the models say when they are asked or partly switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, EdgeScores, edge_attribution
from mansu_tl.circuit.selection import pruned_masks, ranks
from mansu_tl.data import Task
from mansu_tl.data.fit import require_task
from mansu_tl.data.sources import load_task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.explorer import page_file, pictures
from mansu_tl.explorer.live import Switched, asked, switched
from mansu_tl.explorer.results import Results
from mansu_tl.explorer.selection import Item, Selection, item_name, parsed_item
from mansu_tl.models import fingerprint, load
from mansu_tl.models.kinds import require_bridge
from mansu_tl.quantization import quantizer
from mansu_tl.study import Study
from mansu_tl.unlearning import Edit, method_title, methods
from mansu_tl.verification import CadByDepth, Divergence, SideBySide

_STOPS = 14
_MOST_EDGES = 10_000  # of a circuit that is drawn; more cannot be told apart on a screen
PICTURES: dict[str, Callable[[Results, Selection], go.Figure]] = {
    "graph": pictures.graph,
    "scores": pictures.item_scores,
    "weights": pictures.ruler,
    "attention": pictures.attention,
    "faithfulness": pictures.curve,
    "edges": pictures.scatter,
}


class Explorer:
    """A circuit and what became of it: choose pair, method, quantizer, size, edge or node (`selection`); get figures.

    Nothing is computed before it is asked for, and nothing twice (`results`).
    """

    @torch_defaults()
    def __init__(
        self,
        model: TransformerBridge,
        task: Task,
        edits: Mapping[str, Edit] | Edit,
        *,
        quantizers: Sequence[str] = ("nf4",),
        scores: EdgeScores | None = None,
        circuit: Circuit | None = None,
        steps: int = 5,
        depth: Sequence[CadByDepth] = (),
        divergences: Mapping[tuple[str, str], Divergence] | None = None,
    ) -> None:
        """Make an explorer.

        Args:
            model: before any edit.
            task: whose forget pairs everything is measured on.
            edits: one, or several by name.
            quantizers: what edited models are quantized with, by name.
            scores: edge scores on the forget pairs, by which circuits are selected; EAP-IG's where not given.
            circuit: the first one shown; else that of the size that reaches faithfulness .85, if one does.
            steps: of EAP-IG.
            depth: CAD by depth of edited models, shown beside the circuit with its verdict.
            divergences: CAD on `circuit` over all forget pairs, by method and quantizer ("" = none), where it was
                measured before; it is not measured again.

        Raises:
            MansuError: no edit, one for another model, no quantizer or an unknown one, or scores of another model.
        """
        require_bridge(model)
        require_task(task)
        named = {edits.method: edits} if isinstance(edits, Edit) else dict(edits)
        if not named:
            raise MansuError("explorer: no edit given; pass edits={'mansu': unlearn(model, task)}")
        if not quantizers:
            raise MansuError("explorer: no quantizer given; name at least one, such as 'nf4'")
        for name in quantizers:
            quantizer(name)
        here = fingerprint(model)
        for name, edit in named.items():
            if edit.base != here:
                raise MansuError(
                    f"explorer: edit {name!r} was made for another model (fingerprint {edit.base[:12]}..., this one "
                    f"{here[:12]}...); pass the model that it was made for"
                )
        if scores is not None and scores.model != here:
            raise MansuError("explorer: the scores are another model's; score the edges of this one, or leave them out")
        ranking = scores or edge_attribution(model, task.forget_pairs, steps=steps)
        if circuit is not None and not circuit.same_graph(ranking):
            raise MansuError("explorer: the circuit is another model's; discover one on this model")
        own = None if circuit is None else (_selected(ranking, circuit), circuit)
        known = {} if circuit is None else dict(divergences or {})
        titles = {name: method_title(name) if name in methods() else name for name in named}
        sizes = _stops(ranking, own)
        self.depth = tuple(depth)
        self.results = Results(model, task, named, titles, quantizers, sizes, ranking, steps, own, known)
        size = own[0] if own else self.results.curve().edges_to_reach() or sizes[len(sizes) // 2]
        first = self.results.circuit(size).edges
        method = next(iter(named))
        shown = pictures.telling(self.results, method, first)
        self.selection = Selection(method, self.results.quantizers[0], size, 0, False, shown, "")

    @classmethod
    def of_study(
        cls,
        study: Study,
        task: Task | None = None,
        model: TransformerBridge | None = None,
        *,
        depth: Sequence[CadByDepth] = (),
    ) -> Explorer:
        """The explorer of a finished study; model and task are loaded again where they are not given.

        Raises:
            MansuError: the model or the task can no longer be loaded, or the model has changed since.
        """
        used = model if model is not None else load(study.config.model)
        return cls(
            used,
            task if task is not None else load_task(study.config.task, tokenizer=used),
            {name: result.edit for name, result in study.results.items()},
            quantizers=study.config.quantizers,
            scores=study.scores,
            circuit=study.circuit,
            steps=study.config.steps,
            depth=depth,
            divergences={
                (name, quantizer): found
                for name, result in study.results.items()
                for quantizer, found in result.divergences.items()
            },
        )

    def select(self, **choices: Any) -> Selection:
        """Choose: `method`, `quantizer`, `size`, `pair`, `alone`, `item` ("L0H1", or "L0H1 → L2H3.q"), `part`.

        Raises:
            MansuError: an unknown choice, or a value that is not there; then nothing changes.
        """
        wanted = dict(choices)
        if isinstance(wanted.get("item"), str):
            wanted["item"] = parsed_item(wanted["item"])
        if "item" in wanted:
            wanted = {"part": "", **wanted}
        unknown = set(wanted) - set(Selection.__dataclass_fields__)
        if unknown:
            raise MansuError(
                f"explorer: nothing is called {min(unknown)!r}; choose {', '.join(Selection.__dataclass_fields__)}"
            )
        new = replace(self.selection, **wanted)
        self._require(new)
        self.selection = new
        return new

    def items(self) -> list[Item]:
        """The edges of the circuit, largest |score| first, then its nodes in order of computation."""
        circuit = self.results.circuit(self.selection.size)
        return [*circuit.edges, *circuit.nodes, "logits"]

    def parts(self) -> list[str]:
        """Names of the weights behind the chosen item; none for the embedding."""
        return [part.name for part in self.results.parts(self.selection.item)]

    def part(self) -> str | None:
        """Name of the weights that are drawn: the chosen ones, else those with most edited; None for the embedding."""
        return pictures.chosen_part(self.results, self.selection).name if self.parts() else None

    def figure(self, name: str) -> go.Figure:
        """One of `PICTURES` for what is chosen.

        Raises:
            MansuError: no such picture, or one that the chosen item or quantizer has not (an MLP attends to nothing).
        """
        if name not in PICTURES:
            raise MansuError(f"explorer: no picture {name!r}; choose one of {', '.join(PICTURES)}")
        return PICTURES[name](self.results, self.selection)

    def answers(self) -> pd.DataFrame:
        """How the three models answer the chosen pair's clean prompt: one row a model."""
        stages, pair = pictures.stages_of(self.selection), self.selection.pair
        found = [self.results.answers(stage) for stage in stages]
        return pd.DataFrame(
            {
                "model": [self.results.title(stage) for stage in stages],
                "probability of the answer, %": [100 * float(each.probability[pair]) for each in found],
                "logit difference": [float(each.difference[pair]) for each in found],
                "most likely token": [each.likeliest[pair] for each in found],
            }
        )

    def ask(self, prompt: str, new_tokens: int = 12) -> SideBySide:
        """What the three models say to a prompt of yours, greedily; as `mtl.ask`.

        Raises:
            MansuError: as `mtl.ask`, or a prompt that does not fit the model with what it is to write.
        """
        return asked(self.results, pictures.stages_of(self.selection), prompt, new_tokens).said

    def switch_off(
        self,
        *off: str,
        inside: str = "model",
        kind: str = "corrupt",
        prompt: str | None = None,
        counterfactual: str = "",
    ) -> Switched:
        """What the three models say with nodes or edges switched off: those carry an ablated value instead of their own.

        Args:
            off: names, such as "L0H1" (everything that it writes) or "L0H1 → L2H3.q".
            inside: "model" (all other edges are live), or "circuit" (those outside the circuit carry their ablated value
                too).
            kind: what is off carries: "corrupt" (the value on the counterfactual), "zero", or "mean" (over the forget
                pairs' clean prompts).
            prompt: asked in place of the chosen pair's.
            counterfactual: of that prompt, of as many tokens; needed for "corrupt".

        Raises:
            MansuError: nothing to switch off, a name that is not there, an unknown kind or place, or a prompt that does
                not fit.
        """
        s = self.selection
        asked_of: int | str = s.pair if prompt is None else prompt
        return switched(self.results, pictures.stages_of(s), s.size, off, asked_of, inside, kind, counterfactual)

    def save_html(
        self,
        path: str | PathLike[str],
        *,
        pairs: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> Path:
        """Write the explorer as a page that opens without a server or a network; see `page_file`.

        Args:
            path: of the file; written whole or not at all.
            pairs: numbers of the pairs whose prompt and attention can be looked at; by default eight, spread evenly.
                Scores are those of all pairs in any case.
            sizes: of the circuits that can be chosen; by default six around the present one.
            progress: show a bar; by default in notebooks.

        Raises:
            MansuError: a pair or size that is not there, or a folder that cannot be written to.
        """
        return page_file.write(path, self.results, self.selection, self.depth, pairs, sizes, progress)

    def _require(self, new: Selection) -> None:
        results = self.results
        for what, value, known in (
            ("method", new.method, tuple(results.edits)),
            ("quantizer", new.quantizer, results.quantizers),
            ("size", new.size, results.sizes),
        ):
            if value not in known:
                raise MansuError(f"explorer: {what} {value!r}; choose one of {', '.join(map(str, known))}")
        if not 0 <= new.pair < len(results.pairs):
            raise MansuError(f"explorer: pair {new.pair}; choose 0..{len(results.pairs) - 1}")
        results.require_item(new.item)
        if new.part and new.part not in [part.name for part in results.parts(new.item)]:
            raise MansuError(f"explorer: {item_name(new.item)} has no weights called {new.part!r}; see parts()")

    def __repr__(self) -> str:
        s = self.selection
        return f"Explorer({s.method}, {s.quantizer}, {s.size} edges selected, pair {s.pair}, {item_name(s.item)})"


def _stops(ranking: EdgeScores, own: tuple[int, Circuit] | None) -> tuple[int, ...]:
    """Sizes to choose from that have an edge to draw: evenly spread over the logarithm, with the given circuit's."""
    if own is not None and own[1].n_edges == 0:
        raise MansuError(
            "explorer: the circuit has no edge to draw; select more edges or lower the faithfulness target"
        )
    most = min(int(ranking.exists.sum()), _MOST_EDGES)
    spread = {round(most ** (i / (_STOPS - 1))) for i in range(_STOPS)} - ({own[0]} if own else set())
    drawable = {n for n, mask in zip(sorted(spread), pruned_masks(ranking, sorted(spread)), strict=True) if mask.any()}
    if own is not None:
        drawable.add(own[0])
    if not drawable:
        raise MansuError(f"explorer: no edge of the {most} strongest lies on a path; pass a larger circuit")
    return tuple(sorted(drawable))


def _selected(scores: EdgeScores, circuit: Circuit) -> int:
    """How many of the strongest edges have to be selected for a circuit; of one chosen otherwise, its number of edges.

    What pruning left of a larger selection is left of this one too: all of its paths are in it.
    """
    n = int(ranks(scores, "absolute")[circuit.mask].max()) + 1 if circuit.n_edges else 0
    return n if n and Circuit.top(scores, n).mask.equal(circuit.mask) else circuit.n_edges
