"""What became of a circuit's strongest edges: their scores in the original and in other models, in one small file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.circuit import Circuit
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result, Table
from mansu_tl.results.serialise import MismatchError
from mansu_tl.verification.divergence import Divergence


@dataclass(frozen=True)
class CircuitStages(Result):
    """The edges of a circuit, strongest in the original first, and their scores in every model.

    Attributes:
        scores: of every kept edge; the first row is the original, the others as `rows` and `stages` name them.
        writers: the edges' writers.
        readers: the edges' readers.
        rows: of every model behind the original, what it belongs to, such as its method.
        stages: of the same, its stage, such as "edited" or "nf4".
        cad: of the same, CAD over the whole circuit.
        cad_low: lower ends of the 95 % intervals of CAD.
        cad_high: upper ends.
        n_edges: edges of the whole circuit.
        kept_share: of the original's |score| over the whole circuit, what the kept edges carry.
        nodes: all writers of the graph, in order of computation.
        kv_groups: query heads that share a KV head.
    """

    scores: Float[Tensor, "model edge"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    rows: tuple[str, ...]
    stages: tuple[str, ...]
    cad: tuple[float, ...]
    cad_low: tuple[float, ...]
    cad_high: tuple[float, ...]
    n_edges: int
    kept_share: float
    nodes: tuple[str, ...]
    kv_groups: int

    @classmethod
    def of(
        cls, circuit: Circuit, stages: Mapping[str, Mapping[str, Divergence]], most: int | None = None
    ) -> CircuitStages:
        """Gather what `circuit_divergence` found of one circuit in several models.

        Args:
            circuit: the original's.
            stages: by row and stage.
            most: keep so many edges, those of largest |score| in the original; by default all.

        Raises:
            MansuError: no stage, a circuit without an edge, or a divergence of another circuit.
        """
        found = [(row, stage, each) for row, here in stages.items() for stage, each in here.items()]
        if not found:
            raise MansuError("circuit stages: none given; pass at least one, such as the edited model's divergence")
        frame = circuit.to_dataframe()
        if frame.empty:
            raise MansuError("circuit: it has no edge to draw; select more edges or lower the faithfulness target")
        order = frame["score"].abs().sort_values(ascending=False, kind="stable").index[:most]
        kept = frame.loc[order]
        names = list(zip(kept["writer"].astype(str), kept["reader"].astype(str), strict=True))
        scores = [torch.tensor(kept["score"].to_numpy(float), dtype=torch.float32)]
        for _, _, each in found:
            places = {pair: i for i, pair in enumerate(zip(each.writers, each.readers, strict=True))}
            if len(places) != len(frame) or not set(names) <= set(places):
                raise MansuError(
                    f"circuit stages: {each.label!r} was measured on another circuit; use this circuit's divergence"
                )
            scores.append(each.other[[places[pair] for pair in names]].float())
        return cls(
            scores=torch.stack(scores),
            writers=tuple(writer for writer, _ in names),
            readers=tuple(reader for _, reader in names),
            rows=tuple(row for row, _, _ in found),
            stages=tuple(stage for _, stage, _ in found),
            cad=tuple(each.value for _, _, each in found),
            cad_low=tuple(each.interval[0] for _, _, each in found),
            cad_high=tuple(each.interval[1] for _, _, each in found),
            n_edges=len(frame),
            kept_share=float(kept["score"].abs().sum() / frame["score"].abs().sum()),
            nodes=circuit.writers,
            kv_groups=circuit.kv_groups,
        )

    def edges(self, model: int, most: int | None = None) -> pd.DataFrame:
        """The kept edges (the strongest `most`) with their scores in one model, 0 = the original."""
        names = {"writer": self.writers[:most], "reader": self.readers[:most]}
        return pd.DataFrame({**names, "score": self.scores[model, :most].tolist()})

    def share(self, most: int | None = None) -> float:
        """What the strongest `most` edges carry of the original's |score| over the whole circuit."""
        size = self.scores[0].double().abs()
        return self.kept_share * float(size[:most].sum() / size.sum())

    def to_dataframe(self) -> pd.DataFrame:
        """One row a model behind the original: row, stage, CAD and its interval."""
        named = {"row": self.rows, "stage": self.stages}
        return pd.DataFrame(named | {name: getattr(self, name) for name in ("cad", "cad_low", "cad_high")})

    def __repr__(self) -> str:
        kept, models = f"{len(self.writers)} of {self.n_edges} edges", len(self.rows)
        return f"CircuitStages({kept} in the original and {models} other models)"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "CAD of the whole circuit", "{:.2f}".format),)

    def _check(self) -> None:
        models, edges = self.scores.shape
        for name in ("writers", "readers"):
            if len(getattr(self, name)) != edges:
                raise MismatchError(f"{name!r} names other edges than 'scores' has")
        for name in ("rows", "stages", "cad", "cad_low", "cad_high"):
            if len(getattr(self, name)) != models - 1:
                raise MismatchError(f"{name!r} has not one entry for each model behind the original")
