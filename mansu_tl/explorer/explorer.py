"""The explorer without its widgets: what is chosen, and the figures of it."""

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
from mansu_tl.data import Task
from mansu_tl.data.fit import require_task
from mansu_tl.data.sources import load_task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.explorer import pictures, static_page
from mansu_tl.explorer.results import Results
from mansu_tl.explorer.selection import Item, Selection, item_name, parsed_item
from mansu_tl.models import fingerprint, load
from mansu_tl.models.kinds import require_bridge
from mansu_tl.quantization import quantizer
from mansu_tl.study import Study
from mansu_tl.unlearning import Edit, method_title, methods

_STOPS = 14
_TRIES = 400
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
    ) -> None:
        """Make an explorer.

        Args:
            model: before any edit.
            task: whose forget pairs everything is measured on.
            edits: one, or several by name.
            quantizers: what edited models are quantized with, by name.
            scores: edge scores on the forget pairs, by which circuits are selected; EAP-IG's where not given.
            circuit: its size is the first one shown; else the size that reaches faithfulness .85, if one does.
            steps: of EAP-IG.

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
        total = int(ranking.exists.sum())
        circuit_size = None if circuit is None else _selected(ranking, circuit, total)
        titles = {name: method_title(name) if name in methods() else name for name in named}
        self.results = Results(model, task, named, titles, quantizers, _stops(total, circuit_size), ranking, steps)
        size = circuit_size or self.results.curve().edges_to_reach() or self.results.sizes[len(self.results.sizes) // 2]
        first = self.results.circuit(size).edges
        if not first:
            raise MansuError(f"explorer: no edge of the {size} strongest lies on a path; pass a larger circuit")
        method = next(iter(named))
        shown = pictures.telling(self.results, method, first)
        self.selection = Selection(method, self.results.quantizers[0], size, 0, False, shown, "")

    @classmethod
    def of_study(cls, study: Study, task: Task | None = None, model: TransformerBridge | None = None) -> Explorer:
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

    def save_html(
        self, path: str | PathLike[str], *, pairs: Sequence[int] | None = None, sizes: Sequence[int] | None = None
    ) -> Path:
        """Write the explorer as a page that opens without a server or a network; see `static_page`.

        Args:
            path: of the file; written whole or not at all.
            pairs: numbers of the pairs whose prompt and attention can be looked at; by default eight, spread evenly.
                Scores are those of all pairs in any case.
            sizes: of the circuits that can be chosen; by default six around the present one.

        Raises:
            MansuError: a pair or size that is not there, or a folder that cannot be written to.
        """
        return static_page.write(path, self.results, self.selection, pairs, sizes)

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
        names = results.ranking
        if isinstance(new.item, tuple):
            writer, reader = new.item
            if writer not in names.writers or reader not in names.readers:
                raise MansuError(f"explorer: no edge {item_name(new.item)} in this model; see items()")
            if not names.exists[names.writers.index(writer), names.readers.index(reader)]:
                raise MansuError(f"explorer: edge {item_name(new.item)} runs backwards; see items()")
        elif new.item not in (*names.writers, "logits"):
            raise MansuError(f"explorer: no node {new.item!r} in this model; see items()")
        if new.part and new.part not in [part.name for part in results.parts(new.item)]:
            raise MansuError(f"explorer: {item_name(new.item)} has no weights called {new.part!r}; see parts()")

    def __repr__(self) -> str:
        s = self.selection
        return f"Explorer({s.method}, {s.quantizer}, {s.size} edges selected, pair {s.pair}, {item_name(s.item)})"


def _stops(total: int, circuit_size: int | None) -> tuple[int, ...]:
    """Sizes to choose from: evenly spread over the logarithm, with the circuit's own."""
    spread = {round(total ** (i / (_STOPS - 1))) for i in range(_STOPS)}
    smallest = min(total, 4)  # with fewer, hardly a model has a path
    return tuple(sorted({max(smallest, n) for n in spread} | ({circuit_size} if circuit_size else set())))


def _selected(scores: EdgeScores, circuit: Circuit, total: int) -> int:
    """How many edges a circuit was selected from before pruning; its own number of edges where that cannot be told."""
    for n in range(circuit.n_edges, min(total, circuit.n_edges + _TRIES) + 1):
        if bool((Circuit.top(scores, n).mask == circuit.mask).all()):
            return n
    return circuit.n_edges
