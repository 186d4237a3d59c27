"""What has to be computed to patch many masks at once, everything that is alike only once.

Value numbering over the graph: a reader's input is known by the values that its live edges carry, a head by its q, k
and v inputs, an MLP by its input. Equal ones, in whatever masks, get one number and are computed once. What no live
path leads from to the logits is left out, and so is every node behind which all edges carry their ablated values, where
those reproduce its own ablated value. Nothing is approximated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mansu_tl.models import Anatomy


@dataclass(frozen=True)
class Reads:
    """Inputs to rebuild within one mask: a row of weights for each, a column for each used writer so far.

    Attributes:
        slots: where the mask's used writers lie, as a range.
        writers: which writers those are.
        projections: (input, column among the layer's q, k and v readers), for attention.
    """

    weights: np.ndarray
    slots: slice
    writers: np.ndarray
    projections: list[tuple[int, int]]


@dataclass(frozen=True)
class LayerPlan:
    """One layer's work.

    Attributes:
        reads: the attention inputs.
        rows: how many copies of the attention run side by side; heads fill them independently.
        fill: per column of the layer's q, k and v readers, (row, projection) that differ from the ablated run.
        heads: per head, (row, value).
        mlp_reads: the MLP inputs, one each.
        mlp_values: their values.
    """

    reads: list[Reads]
    rows: int
    fill: dict[int, list[tuple[int, int]]]
    heads: dict[int, list[tuple[int, int]]]
    mlp_reads: list[Reads]
    mlp_values: list[int]


@dataclass(frozen=True)
class Plan:
    """All the work of a group of masks.

    Attributes:
        final: the distinct inputs of the logits.
        final_of: which of them each mask has.
        consumers: per value, the slots that hold it; value 1 is the embedding.
        n_slots: how many slots there are.
    """

    layers: list[LayerPlan]
    final: list[Reads]
    final_of: list[int]
    consumers: dict[int, list[int]]
    n_slots: int


def useful(anatomy: Anatomy, live: np.ndarray) -> np.ndarray:
    """The live edges [mask, writer, reader] that lead on to the logits, others set to 0."""
    heads, kv, group = anatomy.n_heads, anatomy.n_kv_heads, anatomy.group
    wide = heads + 2 * kv + 1
    wanted = np.zeros((live.shape[0], live.shape[2]), dtype=bool)
    wanted[:, -1] = True
    edges = live != 0
    for layer in reversed(range(anatomy.n_layers)):
        first, column = 1 + layer * (heads + 1), layer * wide
        wanted[:, column + wide - 1] = (edges[:, first + heads] & wanted).any(-1)
        out = (edges[:, first : first + heads] & wanted[:, None]).any(-1)
        grouped = out.reshape(-1, kv, group).any(-1)
        wanted[:, column : column + wide - 1] = np.concatenate([out, grouped, grouped], 1)
    return live * wanted[:, None]


def plan(anatomy: Anatomy, live: np.ndarray, consistent: bool) -> Plan:
    """Number the values of some masks (edges that are not `useful` already taken out).

    Args:
        live: [mask, writer, reader], 0 = ablated.
        consistent: the ablated run is a run of the model, so a node with all inputs ablated has its ablated value.
    """
    return _Numbering(anatomy, live, consistent).plan()


@dataclass
class _Layer:
    inputs: dict[bytes, int] = field(default_factory=dict)
    owned: dict[int, list[int]] = field(default_factory=dict)
    owner: dict[int, tuple[int, int]] = field(default_factory=dict)
    projections: dict[tuple[int, int], None] = field(default_factory=dict)
    instances: dict[tuple[int, int, int, int], int] = field(default_factory=dict)
    mlp: dict[bytes, tuple[int, int]] = field(default_factory=dict)


class _Numbering:
    def __init__(self, anatomy: Anatomy, live: np.ndarray, consistent: bool) -> None:
        self.map, self.live, self.consistent = anatomy, live, consistent
        self.binary = bool(((live == 0) | (live == 1)).all())
        # The value of every writer in every mask; 0 = its ablated value.
        self.values: np.ndarray = np.zeros(live.shape[:2], dtype=np.int32)
        self.values[:, 0] = (live[:, 0] != 0).any(-1)
        self.last = 1

    def plan(self) -> Plan:
        heads, wide = self.map.n_heads, self.map.n_heads + 2 * self.map.n_kv_heads + 1
        layers = [self._layer(1 + i * (heads + 1), i * wide) for i in range(self.map.n_layers)]
        distinct: dict[bytes, int] = {}
        final_of = [distinct.setdefault(row[0], len(distinct)) for row in self._keys(self.values.shape[1], [-1])]
        # A mask whose logits read what another mask's do is that mask all through; only one of them needs slots.
        first_with = [final_of.index(i) for i in range(len(distinct))]
        used = {mask: self.values[mask].nonzero()[0] for mask in first_with}
        start, offset = {}, 0
        consumers: dict[int, list[int]] = {}
        for mask, writers in used.items():
            start[mask] = offset
            for rank, writer in enumerate(writers.tolist()):
                consumers.setdefault(int(self.values[mask, writer]), []).append(offset + rank)
            offset += len(writers)

        def reads(mask: int, limit: int, columns: list[int], projections: list[tuple[int, int]]) -> Reads:
            writers = used[mask][: np.searchsorted(used[mask], limit)]
            weights = self.live[mask][np.ix_(writers, columns)].T
            return Reads(weights, slice(start[mask], start[mask] + len(writers)), writers, projections)

        out = []
        for i, layer in enumerate(layers):
            first, column = 1 + i * (heads + 1), i * wide
            attention: list[Reads] = []
            order: dict[tuple[int, int], int] = {}
            of_owner: dict[int, list[tuple[int, int]]] = {}
            for pair in layer.projections:
                of_owner.setdefault(layer.owner[pair[1]][0], []).append(pair)
            for mask, columns in layer.owned.items():
                for pair in of_owner.get(mask, []):
                    order[pair] = len(order)
                pairs = [(layer.owner[number][1], c) for c, number in of_owner.get(mask, [])]
                attention.append(reads(mask, first, [column + c for c in columns], pairs))
            rows, fill, by_head = self._rows(layer, order)
            limit = first if self.map.parallel else first + heads
            mlp = [reads(mask, limit, [column + wide - 1], []) for _, mask in layer.mlp.values()]
            out.append(LayerPlan(attention, rows, fill, by_head, mlp, [value for value, _ in layer.mlp.values()]))
        final = [reads(mask, self.values.shape[1], [self.live.shape[2] - 1], []) for mask in first_with]
        return Plan(out, final, final_of, consumers, offset)

    def _layer(self, first: int, column: int) -> _Layer:
        anatomy, layer = self.map, _Layer()
        heads, kv, group = anatomy.n_heads, anatomy.n_kv_heads, anatomy.group
        wide = heads + 2 * kv
        keys = self._keys(first, list(range(column, column + wide)))
        wanted = self._wanted(first, heads)
        for mask, row in enumerate(keys):
            numbers = [self._input(layer, mask, c, key) for c, key in enumerate(row)]
            for h in range(heads):
                kept = (numbers[h], numbers[heads + h // group], numbers[heads + kv + h // group])
                if not wanted[mask, h] or (self.consistent and not any(kept)):
                    continue
                for c, number in zip((h, heads + h // group, heads + kv + h // group), kept, strict=True):
                    if number:
                        layer.projections[c, number] = None
                self.values[mask, first + h] = self._value(layer.instances, (h, *kept))
        limit = first if anatomy.parallel else first + heads
        wanted = self._wanted(first + heads, 1)
        for mask, row in enumerate(self._keys(limit, [column + wide])):
            if wanted[mask, 0] and (row[0] or not self.consistent):
                if row[0] not in layer.mlp:
                    self.last += 1
                    layer.mlp[row[0]] = (self.last, mask)
                self.values[mask, first + heads] = layer.mlp[row[0]][0]
        return layer

    def _keys(self, limit: int, columns: list[int]) -> list[list[bytes]]:
        """What identifies the input of each reader in each mask; empty where all of it is ablated."""
        live = self.live[:, :limit, columns]
        carried = np.ascontiguousarray(np.where(live != 0, self.values[:, :limit, None], 0).transpose(0, 2, 1))
        some: list[list[bool]] = np.any(carried, axis=-1).tolist()
        keys = [
            [row.tobytes() if s else b"" for row, s in zip(a, b, strict=True)]
            for a, b in zip(carried, some, strict=True)
        ]
        if self.binary:
            return keys
        weights = np.ascontiguousarray(np.where(carried != 0, live.transpose(0, 2, 1), 0).astype(np.float32))
        return [[k and k + w.tobytes() for k, w in zip(a, b, strict=True)] for a, b in zip(keys, weights, strict=True)]

    def _wanted(self, first: int, count: int) -> np.ndarray:
        return (self.live[:, first : first + count] != 0).any(-1)

    def _input(self, layer: _Layer, mask: int, column: int, key: bytes) -> int:
        """The number of a reader's input, 0 = ablated; the first mask that has it owns it."""
        if not key:
            return 0
        number = layer.inputs.get(key)
        if number is None:
            number = layer.inputs[key] = len(layer.inputs) + 1
            columns = layer.owned.setdefault(mask, [])
            layer.owner[number] = (mask, len(columns))
            columns.append(column)
        return number

    def _value(self, known: dict[tuple[int, int, int, int], int], key: tuple[int, int, int, int]) -> int:
        if key not in known:
            self.last += 1
            known[key] = self.last
        return known[key]

    def _rows(
        self, layer: _Layer, order: dict[tuple[int, int], int]
    ) -> tuple[int, dict[int, list[tuple[int, int]]], dict[int, list[tuple[int, int]]]]:
        """Place the head instances: heads of one KV group share a row's key and value, others are independent."""
        anatomy = self.map
        heads, kv, group = anatomy.n_heads, anatomy.n_kv_heads, anatomy.group
        fill: dict[int, list[tuple[int, int]]] = {}
        by_head: dict[int, list[tuple[int, int]]] = {}
        rows_of_group: dict[int, int] = {}
        placed: dict[tuple[int, int, int], list[int]] = {}
        instances_of: dict[tuple[int, int, int, int], int] = {}
        for (h, q, k, v), value in layer.instances.items():
            g = h // group
            rows = placed.setdefault((g, k, v), [])
            index = instances_of.get((h, g, k, v), 0)
            instances_of[h, g, k, v] = index + 1
            if index == len(rows):
                rows.append(rows_of_group.get(g, 0))
                rows_of_group[g] = rows[-1] + 1
                for column, number in ((heads + g, k), (heads + kv + g, v)):
                    if number:
                        fill.setdefault(column, []).append((rows[-1], order[column, number]))
            if q:
                fill.setdefault(h, []).append((rows[index], order[h, q]))
            by_head.setdefault(h, []).append((rows[index], value))
        return max(rows_of_group.values(), default=0), fill, by_head
