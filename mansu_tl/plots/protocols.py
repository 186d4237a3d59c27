"""What a result must offer to be drawn: the plots read these attributes and nothing else."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import pandas as pd
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor


@runtime_checkable
class CircuitLike(Protocol):
    """A circuit."""

    @property
    def writers(self) -> tuple[str, ...]:
        """All writers of the graph, in order of computation."""

    @property
    def readers(self) -> tuple[str, ...]:
        """All readers of the graph."""

    @property
    def kv_groups(self) -> int:
        """Query heads that share a KV head."""

    @property
    def faithfulness(self) -> float:
        """NaN if it was not measured."""

    @property
    def n_edges(self) -> int:
        """How many edges it has."""

    @property
    def how(self) -> str:
        """One line on how the edges were chosen."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge, with columns writer, reader and score."""


@runtime_checkable
class EdgeScoresLike(Protocol):
    """The scores of all edges."""

    @property
    def tensor(self) -> Float[Tensor, "writer reader"]:
        """Signed scores; 0 where no edge exists."""

    @property
    def exists(self) -> Bool[Tensor, "writer reader"]:
        """Which edges the model has."""

    @property
    def writers(self) -> tuple[str, ...]:
        """Row names."""

    @property
    def readers(self) -> tuple[str, ...]:
        """Column names."""

    @property
    def residual(self) -> float:
        """Completeness residual, in the metric's units."""

    @property
    def method(self) -> str:
        """How they were computed."""

    @property
    def metric(self) -> str:
        """Name of the metric."""


@runtime_checkable
class PatchingLike(Protocol):
    """An activation-patching sweep."""

    @property
    def tensor(self) -> Float[Tensor, "row column"]:
        """Share of the clean-corrupt difference; 1 = all of it."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Row names."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names."""

    @property
    def row_axis(self) -> str:
        """What the rows are."""

    @property
    def column_axis(self) -> str:
        """What the columns are."""

    @property
    def component(self) -> str:
        """Which activation was patched."""

    @property
    def direction(self) -> str:
        """The words denoising or noising."""

    @property
    def metric_clean(self) -> float:
        """Its mean on the clean prompts."""

    @property
    def metric_corrupt(self) -> float:
        """Its mean on the corrupt prompts."""

    @property
    def metric(self) -> str:
        """Name of the metric."""


@runtime_checkable
class UpdateStatisticsLike(Protocol):
    """An update seen by a quantizer."""

    @property
    def quantizer(self) -> str:
        """The grid's name."""

    @property
    def ratio_edges(self) -> Float64[Tensor, " ratio_edge"]:
        """Bin edges of log10(|update| / local bin width)."""

    @property
    def ratio_counts(self) -> Int64[Tensor, " ratio_bin"]:
        """Changed weights in each."""

    @property
    def ratio_flipped(self) -> Int64[Tensor, " ratio_bin"]:
        """Those of them whose code changed."""

    @property
    def position_edges(self) -> Float64[Tensor, " position_edge"]:
        """Bin edges of where weights rest inside their cells: 0 and 1 are the boundaries, .5 the code's value."""

    @property
    def position_counts(self) -> Int64[Tensor, " position_bin"]:
        """Weights in each."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row a matrix and a last row "total", with columns weights, changed, codes_changed and share."""


@runtime_checkable
class DivergenceLike(Protocol):
    """CAD of one model against the original."""

    @property
    def value(self) -> float:
        """0 = intact, 1 = gone, above 1 = inverted."""

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""

    @property
    def mass_loss(self) -> float:
        """1 - sum|b| / sum|a|."""

    @property
    def label(self) -> str:
        """What the other model is."""

    @property
    def edges(self) -> pd.DataFrame:
        """One row an edge, with columns writer, reader, original and other."""


@runtime_checkable
class ScorecardLike(Protocol):
    """The four properties of one method."""

    @property
    def title(self) -> str:
        """The method."""

    def to_dataframe(self) -> pd.DataFrame:
        """One line a row.

        Columns: property, measure, quantizer ("" = full precision), value, interval_low, interval_high, control,
        control_name, bound and passed (None = not judgeable).
        """


@runtime_checkable
class CertificateLike(Protocol):
    """Which codes an edit changed."""

    @property
    def quantizer(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """What the quantized matrices are stored in."""

    @property
    def n_edited(self) -> int:
        """Edited weights in quantized matrices."""

    @property
    def edited_share_of_linear(self) -> float:
        """Edited weights as a share of those that are quantized."""

    @property
    def edited_share_of_all(self) -> float:
        """Edited weights as a share of all parameters."""

    @property
    def edited_codes_changed_share(self) -> float:
        """Must be 1; NaN if nothing was edited."""

    @property
    def unedited_codes_changed(self) -> int:
        """Must be 0."""

    @property
    def absmax_changed(self) -> int:
        """Must be 0."""

    @property
    def others_changed(self) -> tuple[str, ...]:
        """Parameters that are not quantized and yet differ; must be none."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Everything that keeps it from passing."""

    @property
    def passed(self) -> bool:
        """Whether it holds."""
