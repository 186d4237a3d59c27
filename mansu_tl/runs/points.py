"""Both ends of a batch of pairs, and the metric's gradients at points between them: once for edges, nodes and neurons.

At the point alpha, block 0 is entered by e(corrupt) + alpha (e(clean) - e(corrupt)), the embeddings of the two prompts:
the path of EAP-IG. An end at which a gradient is wanted is recorded in that pass and not run twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.models import Anatomy
from mansu_tl.runs.ends import end_hooks
from mansu_tl.runs.metrics import Metric, measured
from mansu_tl.runs.passes import keep, only, run

CORRUPT, CLEAN = 0.0, 1.0


def between(steps: int, rule: str = "midpoint") -> list[float]:
    """Points that stand for `steps` equal stretches of the way: "left" begins at the corrupt end, "right" ends at the clean
    one."""
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return [(i + shift) / steps for i in range(steps)]


@dataclass(frozen=True)
class End:
    """One end: what passed the hooks asked for (the embedding as "embed"), and the metric of every pair."""

    values: dict[str, Tensor]
    metric: Float[Tensor, " pair"]


@dataclass(frozen=True)
class Point:
    """One point: what passed the hooks there, and the gradients of the metrics' sum, by name."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass
class Path:
    """The way from the corrupt to the clean embedding of some pairs.

    Attributes:
        at_ends: hook points whose values are kept at both ends, by name.
        slopes: hook points at which gradients are taken; "embed" among them is the embedding, whatever its hook.
        seen: hook points whose values are kept at every point, beside those of `slopes`.
        both: there is a corrupt end; if not, the only point is the clean one.
        last_only: a hook point that hands on the last token alone: where nothing else counts and nothing else is read;
            for answers of one token.
        together: points between the ends that share a pass.
        ends: by alpha, once `points` has passed them.
    """

    model: TransformerBridge
    pairs: Forced[PromptPairs]
    metric: Metric
    at_ends: Mapping[str, str]
    slopes: Mapping[str, str]
    seen: Mapping[str, str] = field(default_factory=dict)
    both: bool = True
    last_only: str | None = None
    together: int = 1
    ends: dict[float, End] = field(default_factory=dict)

    def points(self, alphas: Sequence[float]) -> Iterator[Point]:
        """The gradients at every alpha; the ends first, since points between need both embeddings."""
        for end in (CLEAN, CORRUPT) if self.both else (CLEAN,):
            if end not in alphas:
                self.ends[end] = self.recorded(end)
        for end in alphas:
            if end in (CORRUPT, CLEAN):
                yield from self._points([end], record=end not in self.ends)
        inside = [alpha for alpha in alphas if alpha not in (CORRUPT, CLEAN)]
        for i in range(0, len(inside), self.together):
            yield from self._points(inside[i : i + self.together], record=False)

    def mean_gradients(self, alphas: Sequence[float]) -> dict[str, Tensor]:
        """The gradients averaged over the points, in float32."""
        total: dict[str, Tensor] = {}
        for point in self.points(alphas):
            for key, gradient in point.gradients.items():
                share = gradient.float() / len(alphas)
                total[key] = total[key] + share if key in total else share
        return total

    @torch.no_grad()
    def recorded(self, alpha: float) -> End:
        """An end, run without gradients."""
        kept: dict[str, Tensor] = {}
        hooks = end_hooks(self.model, self.pairs, clean=alpha == CLEAN)
        hooks += [(hook, keep(kept, key)) for key, hook in {"embed": self._embedding, **self.at_ends}.items()]
        if self.last_only is not None:
            hooks.append((self.last_only, only(self.pairs.places)))
        logits = run(self.model, self._tokens(alpha), self.pairs.places, hooks).float()
        return End(kept, measured(self.metric, logits, self.pairs))

    def _points(self, alphas: list[float], record: bool) -> Iterator[Point]:
        """The points of one pass; an end to be recorded by itself."""
        kept: dict[str, Tensor] = {}
        pairs, n = self.pairs, len(alphas)

        def begin(stream: Tensor, hook: object) -> Tensor:
            if not record:
                ends = [self.ends[end].values["embed"] for end in (CORRUPT, CLEAN)]
                stream = torch.cat([ends[0] + alpha * (ends[1] - ends[0]) for alpha in alphas])
            kept["embed"] = stream.detach().requires_grad_()
            return kept["embed"]

        slopes = {key: hook for key, hook in self.slopes.items() if key != "embed"}
        others = {**self.seen, **(self.at_ends if record else {})}
        hooks = end_hooks(self.model, pairs, clean=alphas[0] == CLEAN) if record else []
        hooks.append((self._embedding, begin))
        hooks += [(hook, keep(kept, key)) for key, hook in others.items() if key not in slopes]
        # A view of its own: the gradient at a stream itself would count the skip path too.
        places = pairs.places.repeated(n, len(pairs.clean))
        cut = only(places)
        hooks += [(hook, keep(kept, key, cut if hook == self.last_only else _view)) for key, hook in slopes.items()]
        with torch.enable_grad():
            logits = run(self.model, self._tokens(alphas[0]).repeat(n, 1), places, hooks).float()
            values = [measured(self.metric, part, pairs) for part in logits.unflatten(0, (n, -1))]
            found = torch.autograd.grad(torch.stack(values).sum(), [kept[key] for key in self.slopes])
        gradients = dict(zip(self.slopes, (part.unflatten(0, (n, -1)) for part in found), strict=True))
        parts = {key: value.detach().unflatten(0, (n, -1)) for key, value in kept.items()}
        if record:
            embed_and_ends = {key: parts[key][0] for key in ("embed", *self.at_ends)}
            self.ends[alphas[0]] = End(embed_and_ends, values[0].detach())
        made = [Point(*({k: part[i] for k, part in side.items()} for side in (parts, gradients))) for i in range(n)]
        kept.clear()  # what is taken out of a point is freed
        del found, gradients, parts
        yield from made

    @property
    def _embedding(self) -> str:
        return Anatomy.of(self.model).hook("stream", 0)

    def _tokens(self, alpha: float) -> Tensor:
        return self.pairs.corrupt if alpha == CORRUPT else self.pairs.clean


def _view(stream: Tensor, hook: object) -> Tensor:
    return stream.view_as(stream)
