"""What is chosen in the explorer, and what a chosen edge or node is made of."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from mansu_tl.circuit.graph import reader_kind, writers_behind
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, WeightSlice, flat_indices

Edge = tuple[str, str]
Item = str | Edge


@dataclass(frozen=True)
class Selection:
    """What the explorer shows.

    Attributes:
        method: name of an edit.
        quantizer: what the edited model is quantized with.
        size: how many edges the circuit is selected from, largest |score| first.
        pair: number of the pair whose prompt, answer and attention patterns are shown.
        alone: edges carry the scores of that pair instead of the mean over all.
        item: the edge (writer, reader) or node looked at.
        part: name of the weights looked at, one of the item's; "" = the first.
    """

    method: str
    quantizer: str
    size: int
    pair: int
    alone: bool
    item: Item
    part: str


@dataclass(frozen=True)
class Part:
    """Weights of an item: a component's slice of one matrix, such as the query rows of a head."""

    name: str
    piece: WeightSlice


def item_name(item: Item) -> str:
    """An item as it is written: "L0H1", "L0H1 → L2H3.q"."""
    return item if isinstance(item, str) else f"{item[0]} → {item[1]}"


def parts_of(item: Item, cmap: Anatomy, linear: Container[str]) -> tuple[Part, ...]:
    """The weights behind an item: for an edge those that its reader reads with, then those that its writer writes with.

    The embedding and the unembedding are not quantized, so `embed` and `logits` have none; biases neither. `linear` names
    the matrices that quantized loading quantizes.
    """
    if isinstance(item, tuple):
        writer, reader = item
        names = [reader, f"{writer}.out" if writer.startswith("MLP") else f"{writer}.o"]
    elif "H" in item:
        layer, _, number = item.partition("H")
        kv_head = f"{layer}KV{int(number) * cmap.n_kv_heads // cmap.n_heads}"
        names = [f"{item}.q", f"{kv_head}.k", f"{kv_head}.v", f"{item}.o"]
    else:
        names = [item]
    parts = []
    for name in (name for name in names if name.partition(".")[0] not in ("embed", "logits")):
        # `.in` and `.out` are sides of an MLP: its rows (gate and up) and its columns (down).
        whole, _, side = name.partition(".") if name.startswith("MLP") else (name, "", "")
        pieces = [piece for piece in cmap.slices(whole) if piece.parameter in linear]
        for piece in {"in": pieces[:-1], "out": pieces[-1:]}.get(side, pieces):
            matrix = piece.parameter.removesuffix(".weight").rsplit(".", 1)[-1]
            parts.append(Part(f"{whole} ({matrix})", piece))
    return tuple(parts)


def head_of(item: Item, kv_groups: int) -> str | None:
    """The head whose attention pattern belongs to an item; None where there is none.

    An edge's reader comes before its writer; of the query heads that share a KV head, the first stands for all.
    """
    if isinstance(item, tuple):
        reader = item[1]
        if reader_kind(reader) in "qkv":
            return writers_behind(reader, kv_groups)[0]
        return head_of(item[0], kv_groups)
    return item if "H" in item else None


def part_mask(part: Part, shape: tuple[int, ...]) -> Bool[Tensor, "rows columns"]:
    """Which weights of its matrix, of this shape as the model stores it, belong to a part."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[flat_indices(part.piece, shape)] = True
    return mask


def parsed_item(text: str) -> Item:
    """The item of that name, the reverse of `item_name`; a `MansuError` where it is neither a node nor an edge."""
    parts = [part.strip() for part in text.replace("->", "→").split("→")]
    if len(parts) > 2 or not all(parts):
        raise MansuError(f"item {text!r}: name a node such as L0H1, or an edge such as L0H1 → L2H3.q")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])
