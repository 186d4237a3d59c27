"""What has to be computed to patch many masks at once, everything that is alike only once.

Value numbering over the graph: a reader's input is known by the values that its live edges carry, a head by its q, k
and v inputs, an MLP by its input. Equal ones, in whatever masks, get one number and are computed once. What no live
path leads from to the logits is left out, and so is every node behind which all edges carry their ablated values, where
those reproduce its own ablated value. Nothing is approximated.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, groupby

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


class _Layer:
    """One layer's values by what identifies them.

    Attributes:
        inputs: the number of every distinct attention input, from 1 up.
        owner: by number - 1, the first mask that has the input, and its column there.
        projections: by number, the columns that project it.
        instances: the value of every distinct (head, q input, k input, v input).
        mlp: of every distinct MLP input its value and the first mask that has it.
    """

    def __init__(self, fresh: Callable[[], int]) -> None:
        self.inputs: dict[bytes, int] = {}
        self.owner: list[tuple[int, int]] = []
        self.projections: defaultdict[int, dict[int, None]] = defaultdict(dict)
        self.instances: defaultdict[tuple[int, int, int, int], int] = defaultdict(fresh)
        self.mlp: dict[bytes, tuple[int, int]] = {}

    def number(self, mask: int, column: int, key: bytes) -> int:
        """The number of a reader's input, 0 = ablated."""
        if key and key not in self.inputs:
            self.owner.append((mask, column))
            self.inputs[key] = len(self.owner)
        return self.inputs.get(key, 0)


class _Numbering:
    def __init__(self, anatomy: Anatomy, live: np.ndarray, consistent: bool) -> None:
        self.map, self.live, self.consistent = anatomy, live, consistent
        self.binary = bool(((live == 0) | (live == 1)).all())
        # The value of every writer in every mask; 0 = its ablated value.
        self.values: np.ndarray = np.zeros(live.shape[:2], dtype=np.int32)
        self.values[:, 0] = (live[:, 0] != 0).any(-1)
        self.fresh = count(2).__next__

    def plan(self) -> Plan:
        heads, wide = self.map.n_heads, self.map.n_attention_readers + 1
        layers = [self._layer(1 + i * (heads + 1), i * wide) for i in range(self.map.n_layers)]
        distinct: dict[bytes, int] = {}
        final_of = [distinct.setdefault(row[0], len(distinct)) for row in self._keys(self.values.shape[1], [-1])]
        # A mask whose logits read what another mask's do is that mask all through; only one of them needs slots.
        first_with = [final_of.index(i) for i in range(len(distinct))]
        used = {mask: self.values[mask].nonzero()[0] for mask in first_with}
        start, offset = {}, 0
        consumers: defaultdict[int, list[int]] = defaultdict(list)
        for mask, writers in used.items():
            start[mask] = offset
            for slot, value in enumerate(self.values[mask, writers].tolist(), offset):
                consumers[value].append(slot)
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
            # Numbers were given mask by mask, so those that a mask owns follow each other.
            for mask, group in groupby(enumerate(layer.owner, 1), key=lambda owned: owned[1][0]):
                owned = [(number, column + c) for number, (_, c) in group]
                pairs = [(at, c) for at, (number, _) in enumerate(owned) for c in layer.projections[number]]
                for at, c in pairs:
                    order[c, owned[at][0]] = len(order)
                attention.append(reads(mask, first, [c for _, c in owned], pairs))
            rows, fill, by_head = self._rows(layer, order)
            limit = first if self.map.parallel else first + heads
            mlp = [reads(mask, limit, [column + wide - 1], []) for _, mask in layer.mlp.values()]
            out.append(LayerPlan(attention, rows, fill, by_head, mlp, [value for value, _ in layer.mlp.values()]))
        final = [reads(mask, self.values.shape[1], [self.live.shape[2] - 1], []) for mask in first_with]
        return Plan(out, final, final_of, consumers, offset)

    def _layer(self, first: int, column: int) -> _Layer:
        anatomy, layer = self.map, _Layer(self.fresh)
        heads, wide = anatomy.n_heads, anatomy.n_attention_readers
        wanted = self._wanted(first, heads)
        for mask, row in enumerate(self._keys(first, list(range(column, column + wide)))):
            numbers = [layer.number(mask, c, key) for c, key in enumerate(row)]
            for h in range(heads):
                columns = self._columns(h)
                q, k, v = (numbers[c] for c in columns)
                if wanted[mask, h] and (q or k or v or not self.consistent):
                    for c in columns:
                        if numbers[c]:
                            layer.projections[numbers[c]][c] = None
                    self.values[mask, first + h] = layer.instances[h, q, k, v]
        limit = first if anatomy.parallel else first + heads
        wanted = self._wanted(first + heads, 1)
        for mask, (key,) in enumerate(self._keys(limit, [column + wide])):
            if wanted[mask, 0] and (key or not self.consistent):
                if key not in layer.mlp:
                    layer.mlp[key] = (self.fresh(), mask)
                self.values[mask, first + heads] = layer.mlp[key][0]
        return layer

    def _columns(self, head: int) -> tuple[int, int, int]:
        """Where a head's q, k and v stand among the readers of a layer's attention."""
        k = self.map.n_heads + head // self.map.group
        return head, k, k + self.map.n_kv_heads

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

    def _wanted(self, first: int, n: int) -> np.ndarray:
        return (self.live[:, first : first + n] != 0).any(-1)

    def _rows(
        self, layer: _Layer, order: dict[tuple[int, int], int]
    ) -> tuple[int, dict[int, list[tuple[int, int]]], dict[int, list[tuple[int, int]]]]:
        """Place the head instances: heads of one KV group share a row's key and value, others are independent."""
        fill: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        by_head: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        placed: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
        rows_of_group: Counter[int] = Counter()
        seen: Counter[tuple[int, int, int]] = Counter()
        for (h, q, k, v), value in layer.instances.items():
            g, needs = h // self.map.group, list(zip(self._columns(h), (q, k, v), strict=True))
            rows, index = placed[g, k, v], seen[h, k, v]
            seen[h, k, v] += 1
            if index == len(rows):
                rows.append(rows_of_group[g])
                rows_of_group[g] += 1
            else:
                needs = needs[:1]  # another head of the group has put the row's key and value there
            for column, number in needs:
                if number:
                    fill[column].append((rows[index], order[column, number]))
            by_head[h].append((rows[index], value))
        return max(rows_of_group.values(), default=0), fill, by_head
