"""Logit lens: what the model would answer if it stopped behind each layer.

The residual stream behind a layer, at the positions that predict the answer, goes through the model's own final norm and
unembedding (nostalgebraist 2020). Knowledge that an edit only keeps from being said stands in the layers before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Questions
from mansu_tl.data.fit import require_fit, require_questions
from mansu_tl.data.forced import Places, forced
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import home, require_ready
from mansu_tl.models.anatomy import UNEMBED
from mansu_tl.models.kinds import require_bridge
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import first_is_best, log_odds, option_scores
from mansu_tl.runs.passes import forward, keep, only, put
from mansu_tl.runs.streams import stream_hooks


@dataclass(frozen=True)
class LogitLens(Result):
    """What each layer's stream answers, read by the model's own output.

    Attributes:
        label: which model.
        layers: "embed", then "L0", "L1", ...: the stream behind each block; the last is the model's own answer.
        right: whether the right option has the highest score of all options.
        cloze: whether the answer is what greedy decoding would write.
        log_odds: of the right option against the others together, in nats.
        facts: the fact behind each question.
        chance: accuracy of guessing, as a share.
    """

    label: str
    layers: tuple[str, ...]
    right: Bool[Tensor, "layer question"]
    cloze: Bool[Tensor, "layer question"]
    log_odds: Float[Tensor, "layer question"]
    facts: tuple[str, ...]
    chance: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer: both accuracies in percent and log-odds in nats, each with a 95 % interval over facts."""
        rows = []
        for i, layer in enumerate(self.layers):
            row: dict[str, object] = {"label": self.label, "layer": layer}
            row |= with_interval("multiple_choice", self.right[i], self.facts, scale=100.0)
            row |= with_interval("cloze", self.cloze[i], self.facts, scale=100.0)
            row |= with_interval("log_odds", self.log_odds[i], self.facts)
            rows.append(row | {"chance": 100 * self.chance})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        shown = " ".join(f"{100 * a:.0f}" for a in self.right.double().mean(1).tolist())
        return f"LogitLens({self.label}: {shown} % by layer, chance {100 * self.chance:.0f} %)"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "by layer", "{:.2f}".format, rows=40),)


@torch_defaults()
def logit_lens(
    model: TransformerBridge, questions: Questions, *, batch_size: int = 64, label: str = "edited"
) -> LogitLens:
    """Ask every layer's stream the questions, through the model's own final norm and unembedding.

    Args:
        label: what the model is, for tables.

    Raises:
        MansuError: no bridge, no question, questions that do not fit the model, or scores that are not finite.
    """
    require_bridge(model)
    require_questions(questions)
    if len(questions) == 0:
        raise MansuError("logit lens: the question set is empty; pass at least one question")
    require_fit(model, questions)
    require_ready(model, questions.prompts)
    hooks = stream_hooks(model)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(questions), batch_size):
        rows = forced(questions[slice(start, start + batch_size)].to(home(model)))
        found = []
        for logits in _by_layer(model, list(hooks.values()), rows.clean, rows.places):
            scores = option_scores(rows, logits)
            found.append((first_is_best(scores).cpu(), rows.greedy(logits).cpu(), log_odds(scores).cpu()))
        right, cloze, odds = (torch.stack(each) for each in zip(*found, strict=True))
        parts.append((right, cloze, odds))
    right, cloze, odds = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    if not torch.isfinite(odds).all():
        raise MansuError("logit lens: scores are not finite on these questions; check the model's weights and dtype")
    return LogitLens(
        label, tuple(hooks), right, cloze, odds, questions.facts,
        1 / questions.options.shape[1],
    )  # fmt: skip


@torch.no_grad()
def _by_layer(
    model: TransformerBridge, hooks: list[str], tokens: Int[Tensor, "row pos"], places: Places
) -> Iterator[Float[Tensor, "place vocab"]]:
    """The logits that each layer's stream gives at some positions."""
    kept: dict[str, Tensor] = {}
    forward(model, tokens, [*((hook, keep(kept, hook)) for hook in hooks), (UNEMBED, only(places))])
    for hook in hooks:
        stream = kept[hook]
        # What stands in front of the final norm is replaced whole, by rows of one position, so one token has to be run.
        asked = stream[places.on(stream.device)][:, None]
        yield forward(model, tokens[:1, :1], [(hooks[-1], put(asked))])[:, 0].float()
