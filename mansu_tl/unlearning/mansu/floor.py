"""The magnitude floor, inside the loop: latent updates in, weights that provably change their code out.

With several grids, a weight is edited only where its new value changes its code under every one of them.

The candidates of all matrices live in one flat vector. A latent update `u` (in units of each weight's bin width) moves
a candidate to code(w + u width) under the original absmax; where that is another code the weight goes to the centre of
the new cell, or one bin past w where the centre is nearer than that; where it is the same code the weight keeps its
value bit for bit. The backward pass sees the identity (straight-through).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.quantization import Grid

# How far past its old value a weight goes at least, in bins; just over one so that rounding cannot undo it.
_LEAST_MOVE = 1.001


class Floor:
    """Candidate weights of a model under one quantizer, or under several.

    Args:
        grids: the quantizers; the latent updates count in bins of the first and aim at its cells.
        matrices: per parameter, the matrix as [out, in] (the orientation in which it is quantized).
        masks: per parameter, which of its weights may be edited, in the same orientation.
        rule: "loop" = the grids are in the optimisation; "after" = plain updates, each pushed across a boundary in the
            end; "none" = plain updates, stored as they are.
        device: where the flat vectors live, wherever the matrices do; None = where the first matrix does.

    Raises:
        MansuError: nothing is left to edit once the entries that carry a block's absmax are taken out, or rule "after"
            on the grid of a file.
    """

    def __init__(
        self,
        grids: Sequence[Grid],
        matrices: Mapping[str, Float[Tensor, "_ _"]],
        masks: Mapping[str, Bool[Tensor, "_ _"]],
        rule: str = "loop",
        device: torch.device | None = None,
    ) -> None:
        if rule == "after" and grids[0].given_scales:
            raise MansuError(
                f'mansu: floor="after" under {grids[0].name!r}; the codes of a file are reached with floor="loop"'
            )
        self.rule = rule
        self.grids, self.grid, self.matrices = tuple(grids), grids[0], dict(matrices)
        self.where: dict[str, Int[Tensor, " weight"]] = {}
        self.spans: dict[str, slice] = {}
        value: list[Tensor] = []
        width: list[Tensor] = []
        scales: list[list[Tensor]] = [[] for _ in grids]
        codes: list[list[Tensor]] = [[] for _ in grids]
        start = 0
        self.device = device or next((matrix.device for matrix in matrices.values()), None)
        for name, mask in masks.items():
            matrix, own = self.matrices[name], [grid.of(name) for grid in grids]
            free_mask = mask.to(matrix.device, copy=True)
            for grid in own:
                free_mask &= ~grid.absmax_mask(matrix)
            free = free_mask.flatten().nonzero()[:, 0]
            widths = own[0].width(matrix).flatten().float()
            # A block of zeros has no width, so no code of it can be reached.
            free = free[widths[free] > 0]
            self.where[name], self.spans[name] = free, slice(start, start + free.numel())
            start += free.numel()
            value.append(matrix.flatten()[free].float().to(self.device))
            width.append(widths[free].to(self.device))
            for i, grid in enumerate(own):
                encoded = grid.encode(matrix)
                scales[i].append(encoded.scales().flatten(0, 1)[free].to(self.device))
                codes[i].append(encoded.codes.flatten()[free].to(self.device))
        if start == 0:
            raise MansuError(
                "mansu: no weight is left to edit (all candidates carry their block's absmax); use a larger circuit"
            )
        self.value, self.width = torch.cat(value), torch.cat(width)
        self.scales, self.codes = [torch.cat(s) for s in scales], [torch.cat(c) for c in codes]
        self.code = self.codes[0]

    @property
    def size(self) -> int:
        """How many weights may be edited."""
        return self.value.numel()

    def part(self, name: str) -> Floor:
        """The floor of one matrix's candidates alone, over the same tensors."""
        part, span = copy.copy(self), self.spans[name]
        part.matrices, part.where = {name: self.matrices[name]}, {name: self.where[name]}
        part.spans = {name: slice(0, span.stop - span.start)}
        part.value, part.width = self.value[span], self.width[span]
        part.scales, part.codes = [each[span] for each in self.scales], [each[span] for each in self.codes]
        part.code = part.codes[0]
        return part

    def target(self, latent: Float[Tensor, " weight"]) -> UInt8[Tensor, " weight"]:
        """The code that each candidate would take, under its block's original absmax."""
        moved = self._codes_of(self.value + latent * self.width, 0)
        # Rounding of the sum must not count as a move.
        return torch.where(latent == 0, self.code, moved)

    def realise(
        self,
        latent: Float[Tensor, " weight"],
        allowed: Bool[Tensor, " weight"] | None = None,
        under: int = 0,
        most: int | None = None,
    ) -> tuple[Float[Tensor, " weight"], Float[Tensor, " weight"], Bool[Tensor, " weight"]]:
        """The changes of the stored and of the dequantized weights, and which weights change.

        Both changes pass gradients straight through to `latent`.

        Where a weight lies in its new cell follows a coarser rule than `Grid.floor_target`, which has the last word: 1.001
        bins in float32 instead of one bin in the storage dtype, and in an outermost cell its centre, although that is the
        block's own scale. The first grid's codes are the same, and with them what it deploys. The stored value may differ:
        by a thousandth of a bin in float32 (by up to half a bin where a cell has room for one bin but not for 1.001, and
        where a block of two ends has its outermost centre beyond an end), by bfloat16's spacing there. `floor_target`'s
        rule would be right to the last bit here too, and take up to five times as long a step; it would change every edit
        a little, and all recorded numbers with it, so the two stand apart.

        Args:
            allowed: the weights that may change; all candidates where not given.
            under: the number of the grid under which the model is dequantized.
            most: of the weights that would change, only so many of largest update do; None = all.
        """
        with torch.no_grad():
            target = self.target(latent)
            changed = target != self.code
            if allowed is not None:
                changed = changed & allowed
            if most is not None and int(changed.sum()) > most:
                largest = torch.where(changed, latent.abs(), -1.0).topk(most).indices
                changed = torch.zeros_like(changed).index_fill(0, largest, True)
            centre = self._centre(target, 0)
            move = centre - self.value
            least = _LEAST_MOVE * self.width
            past = self.value + move.sign() * torch.maximum(move.abs(), least)
            # One bin past w may leave the target cell again, where the cells are of unequal width.
            inside = self._codes_of(past, 0) == target
            new = centre if self.grid.given_scales else torch.where(inside, past, centre)
            for i in range(1, len(self.grids)):
                changed = changed & (self._codes_of(new, i) != self.codes[i])
            stored = torch.where(changed, new - self.value, 0.0)
            after = target if under == 0 else self._codes_of(new, under)
            rounded = torch.where(changed, self._centre(after, under) - self._centre(self.codes[under], under), 0.0)
        through = latent * self.width if allowed is None else latent * self.width * allowed
        through = through - through.detach()
        return stored + through, rounded + through, changed

    def change(
        self,
        latent: Float[Tensor, " weight"],
        allowed: Bool[Tensor, " weight"],
        under: int | None,
        most: int | None = None,
    ) -> tuple[Float[Tensor, " weight"], Bool[Tensor, " weight"]]:
        """How far each weight moves in the loop, as stored (None) or under one grid, and which weights move.

        Args:
            most: as `realise`; under another rule than "loop" every weight moves as it is.
        """
        if self.rule != "loop":
            return latent * self.width * allowed, (latent.detach() != 0) & allowed
        stored, rounded, changed = self.realise(latent, allowed, under or 0, most)
        return (stored if under is None else rounded), changed

    def deployed(
        self, latent: Float[Tensor, " weight"], allowed: Bool[Tensor, " weight"]
    ) -> tuple[Float[Tensor, " weight"], Bool[Tensor, " weight"]]:
        """What the quantized model would feel of the updates once they are stored, and which weights move."""
        if self.rule != "after":
            return self.change(latent, allowed, 0)
        # Every weight that moved at all will be pushed across.
        _, rounded, changed = self.realise(self.pushed(latent * allowed), allowed)
        return rounded, changed

    def stored(self, latent: Float[Tensor, " weight"], allowed: Bool[Tensor, " weight"]) -> dict[str, Tensor]:
        """The edited matrices in their storage dtype."""
        if self.rule == "none":
            pieces = self.pieces(latent * self.width * allowed)
            return {
                n: (self.matrices[n].float() + self.spread(piece, n)).to(self.matrices[n].dtype)
                for n, piece in pieces.items()
            }
        latent = self.pushed(latent * allowed) if self.rule == "after" else latent
        return {name: self.part(name).final(name, latent[span], allowed[span]) for name, span in self.spans.items()}

    def pushed(self, latent: Float[Tensor, " weight"]) -> Float[Tensor, " weight"]:
        """The updates after the fact: each that stays in its cell goes one bin in its own direction, or back inward."""
        moved = self.target(latent)
        neighbour = self.grid.neighbour(self.code[None], latent[None])[0]
        wanted = torch.where((moved == self.code) & (latent != 0), neighbour, moved)
        centre = self._centre(wanted, 0)
        return torch.where(latent == 0, 0.0, (centre - self.value) / self.width)

    def _codes_of(self, values: Float[Tensor, " weight"], i: int) -> UInt8[Tensor, " weight"]:
        return self.grids[i].flat_codes(values, self.scales[i])

    def _centre(self, code: UInt8[Tensor, " weight"], i: int) -> Float[Tensor, " weight"]:
        return self.grids[i].flat_centre(code, self.scales[i])

    def pieces(self, change: Shaped[Tensor, " weight"]) -> dict[str, Shaped[Tensor, " _"]]:
        """A flat change, or flags of the candidates, matrix by matrix.

        In one go: the gradient of a slice is as long as the whole, so that of two hundred slices takes longer than the model.
        """
        sizes = [span.stop - span.start for span in self.spans.values()]
        return dict(zip(self.spans, change.split(sizes), strict=True))

    def spread(self, piece: Float[Tensor, " weight"], name: str) -> Float[Tensor, "out in"]:
        """One matrix's piece of a change, as a dense matrix where that matrix lives."""
        matrix = self.matrices[name]
        dense = torch.zeros(matrix.numel(), device=matrix.device, dtype=piece.dtype)
        return dense.index_put((self.where[name],), piece.to(matrix.device)).view(matrix.shape)

    def final(self, name: str, latent: Float[Tensor, " weight"], allowed: Bool[Tensor, " weight"]) -> Tensor:
        """The edited matrix in its storage dtype, every edited weight strictly inside its target cell.

        A weight whose target cell holds no value of that dtype keeps its own.
        """
        matrix, own = self.matrices[name], [grid.of(name) for grid in self.grids]
        encoded = own[0].encode(matrix)
        codes = encoded.codes.flatten().clone()
        reached = torch.where(allowed, self.target(latent), self.code)[self.spans[name]]
        codes[self.where[name]] = reached.to(codes.device)
        wanted = codes.view_as(encoded.codes)
        result = own[0].floor_target(matrix, wanted, encoded.absmax, leave_unreachable=True)
        moved = result != matrix
        for grid in own[1:]:
            before, after = grid.encode(matrix), grid.encode(result)
            # The value in storage dtype may differ from the one in the loop by its last bit, and a weight that fits
            # into a block of the first grid may be the largest in one of this grid's: its block keeps its old values.
            grown = (after.scales() != before.scales()).view(*matrix.shape, -1).any(-1)
            moved &= (after.codes != before.codes) & ~grown
        return torch.where(moved, result, matrix)

    def felt(self, matrices: Mapping[str, Float[Tensor, "_ _"]], under: int | None) -> Float[Tensor, " weight"]:
        """How far each candidate has moved in edited matrices, as stored (None) or under one grid."""
        new = self.gathered({name: matrix.float() for name, matrix in matrices.items()})
        if under is None:
            return new - self.value
        return self._centre(self._codes_of(new, under), under) - self._centre(self.codes[under], under)

    def gathered(self, matrices: Mapping[str, Float[Tensor, "_ _"]]) -> Float[Tensor, " weight"]:
        """The candidates' entries of some matrices, as one vector."""
        return torch.cat([matrices[name].flatten()[self.where[name]].to(self.device) for name in self.spans])


def most_wanted(
    latent: Float[Tensor, " weight"],
    change: Float[Tensor, " weight"],
    changed: Bool[Tensor, " weight"],
    importance: Float[Tensor, " weight"] | None,
    budget: int,
) -> Int[Tensor, " _"]:
    """The changed weights of largest latent update, in bins, against their cost to the retain set; largest first.

    Args:
        change: what the quantized model feels of each update, in weight units.
        importance: diagonal Fisher information, or None.
        budget: how many weights at most.
    """
    priority = latent.abs()
    if importance is not None:
        cost = 0.5 * importance * change.square()
        typical = cost[changed].mean().clamp_min(1e-12) if bool(changed.any()) else cost.new_tensor(1.0)
        priority = priority / (1 + (cost / typical).sqrt())
    priority = torch.where(changed, priority, 0.0)
    order = priority.topk(min(budget, priority.numel())).indices
    return order[changed[order]]
