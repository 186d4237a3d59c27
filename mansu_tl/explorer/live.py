"""What needs a model behind the page: prompts that are typed, and nodes and edges that are switched off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Graph, patch_edges, patched_logits
from mansu_tl.data import PromptPairs, Span
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.explorer.results import Results, Stage
from mansu_tl.explorer.selection import parsed_item
from mansu_tl.models.limits import most_positions
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.ablation import KINDS, Ablation
from mansu_tl.runs.metrics import Metric, answer_log_prob, last_logits, logit_difference
from mansu_tl.verification import SideBySide, ask

INSIDE = ("model", "circuit")
MOST_TOKENS = 50  # that a model is let write
_LISTED = 5  # of the likeliest next tokens


@dataclass(frozen=True)
class Likely:
    """The likeliest next tokens and their probabilities, the likeliest first."""

    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Asked:
    """What some models say to a prompt: what they write, and the likeliest next tokens of each."""

    said: SideBySide
    likely: tuple[Likely, ...]


@dataclass(frozen=True)
class Switched(Result):
    """What some models say with parts of them switched off, and with everything on.

    Attributes:
        off: what is switched off.
        inside: "model" or "circuit": whether the edges outside the circuit are live.
        kind: what is off carries.
        models: what the models are called.
        probability: of the answer, with everything on and with the parts off; NaN for a prompt without a known answer.
        difference: the logit difference likewise, in nats.
        says: what is written, likewise: as many tokens as the answer has.
        likely: the likeliest next tokens, likewise.
    """

    off: tuple[str, ...]
    inside: str
    kind: str
    models: tuple[str, ...]
    probability: Float[Tensor, "model 2"]
    difference: Float[Tensor, "model 2"]
    says: tuple[tuple[str, str], ...]
    likely: tuple[tuple[Likely, Likely], ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a model."""
        return pd.DataFrame(
            {
                "model": self.models,
                "says": [said[0] for said in self.says],
                "says, switched off": [said[1] for said in self.says],
                "probability of the answer, %": (100 * self.probability[:, 0]).tolist(),
                "switched off, %": (100 * self.probability[:, 1]).tolist(),
                "logit difference": self.difference[:, 0].tolist(),
                "switched off": self.difference[:, 1].tolist(),
            }
        )

    def __repr__(self) -> str:
        return f"Switched({', '.join(self.off)} off in {', '.join(self.models)}; {self.kind})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), form="{:.2f}".format),)


@torch_defaults()
def asked(results: Results, stages: Sequence[Stage], prompt: str, new_tokens: int) -> Asked:
    """What models say to a typed prompt; arguments and errors as of `Explorer.ask`."""
    if not 1 <= new_tokens <= MOST_TOKENS:
        raise MansuError(f"explorer: {new_tokens} tokens to write; choose 1..{MOST_TOKENS}")
    tokens = _tokens(results.model, prompt, new_tokens)
    named = {results.title(stage): results.model_of(stage) for stage in stages}
    said = ask(named, prompt, new_tokens=new_tokens)
    return Asked(said, tuple(_likely(results, last_logits(model, *tokens)[0]) for model in named.values()))


@torch_defaults()
def switched(
    results: Results,
    stages: Sequence[Stage],
    size: int,
    off: Sequence[str],
    asked_of: int | str,
    inside: str,
    kind: str,
    counterfactual: str,
) -> Switched:
    """What models say with parts switched off.

    Args:
        size: of the circuit.
        asked_of: the number of a pair, or a prompt.

    Other arguments and errors as of `Explorer.switch_off`.
    """
    if inside not in INSIDE:
        raise MansuError(f"explorer: inside={inside!r}; choose one of {', '.join(INSIDE)}")
    if kind not in KINDS:
        raise MansuError(f"explorer: ablation {kind!r}; choose one of {', '.join(KINDS)}")
    masks = _masks(results, size, off, inside)
    typed = isinstance(asked_of, str)
    pairs = (
        _own_pair(results, asked_of, counterfactual, kind) if isinstance(asked_of, str) else results.pairs[[asked_of]]
    )
    numbers, says, likely = [], [], []
    for stage in stages:
        model = results.model_of(stage)
        how = results.mean_ablation(stage) if kind == "mean" else Ablation(kind)
        first = patched_logits(model, pairs, masks, ablation=how)[:, 0]
        numbers.append(
            torch.stack([_measured(m, model, pairs, masks, how, first) for m in (answer_log_prob, logit_difference)])
        )
        on, off_ = (
            results.model.tokenizer.decode(
                _written(model, pairs, masks[i : i + 1], how, int(first[i].argmax()))
            ).strip()
            for i in range(2)
        )
        says.append((on, off_))
        likely.append((_likely(results, first[0]), _likely(results, first[1])))
    both = torch.stack(numbers)
    both[:, 0].exp_()
    if typed:
        both = torch.full_like(both, torch.nan)
    return Switched(
        tuple(off), inside, kind, tuple(map(results.title, stages)), both[:, 0], both[:, 1], tuple(says), tuple(likely)
    )  # fmt: skip


def _masks(results: Results, size: int, off: Sequence[str], inside: str) -> Float[Tensor, "two writer reader"]:
    """The edges that are live with everything on, and with the parts off."""
    graph = Graph.of(results.model)
    if not off:
        raise MansuError("explorer: nothing is switched off; name a node or an edge")
    live = (graph.exists if inside == "model" else results.circuit(size).mask).float()
    less = live.clone()
    for name in off:
        item = parsed_item(name)
        if isinstance(item, tuple):
            at = graph.at(*item)
            if not graph.exists[at]:
                raise MansuError(f"explorer: edge {name} runs backwards; switch off one that exists")
            less[at] = 0
        elif item in graph.writers:
            less[graph.writers.index(item)] = 0
        else:
            raise MansuError(
                f"explorer: no node {item!r} that writes in this model; switch off one such as L0H1 or MLP0"
            )
    return torch.stack([live, less])


def _tokens(model: TransformerBridge, prompt: str, more: int) -> tuple[Int[Tensor, "1 pos"], Int[Tensor, " one"]]:
    """A typed prompt as the models read it, if there is room for it and for what is to be written."""
    if not prompt.strip():
        raise MansuError("explorer: the prompt is empty; type one")
    ids = model.tokenizer(prompt)["input_ids"]
    most = most_positions(model)
    if most is not None and len(ids) + more > most:
        raise MansuError(
            f"explorer: a prompt of {len(ids)} tokens and {more} more, the model has {most} positions; shorten it"
        )
    return torch.tensor([ids]), torch.tensor([len(ids)])


def _own_pair(results: Results, prompt: str, counterfactual: str, kind: str) -> PromptPairs:
    """A typed prompt as a pair; its options are the two likeliest tokens of the original, and no one's answers."""
    tokens, lengths = _tokens(results.model, prompt, 1)
    corrupt = tokens
    if kind == "corrupt":
        if not counterfactual.strip():
            raise MansuError(
                "explorer: your own prompt has no counterfactual; type one of as many tokens, or let what is off carry zero "
                "or its mean"
            )
        corrupt, others = _tokens(results.model, counterfactual, 1)
        if not lengths.equal(others):
            raise MansuError(
                f"explorer: the prompt has {int(lengths)} tokens, its counterfactual {int(others)}; give it as many"
            )
    best = last_logits(results.model, tokens, lengths)[0].topk(2).indices.cpu()
    return PromptPairs(tokens, corrupt, best.view(1, 2, 1), lengths)


def _measured(
    metric: Metric,
    model: TransformerBridge,
    pairs: PromptPairs,
    masks: Float[Tensor, "two writer reader"],
    how: Ablation,
    first: Float[Tensor, "two vocab"],
) -> Float[Tensor, " two"]:
    """A metric of one pair under both masks: read from the logits behind the prompt where they say it all."""
    if pairs.options.shape[2] == 1:
        return metric(first, pairs[[0, 0]])
    return patch_edges(model, pairs, masks, ablation=how, metric=metric)[:, 0]


def _written(
    model: TransformerBridge, pairs: PromptPairs, mask: Float[Tensor, "1 writer reader"], how: Ablation, first: int
) -> list[int]:
    """What is written behind one pair's clean prompt under a mask, as many tokens as its answer has; what has been written
    stands behind the corrupt prompt too."""
    written = [first]
    while len(written) < int(pairs.option_lengths[0, 0]):
        written.append(int(patched_logits(model, _longer(pairs, written), mask, ablation=how)[0, 0].argmax()))
    return written


def _longer(pairs: PromptPairs, written: list[int]) -> PromptPairs:
    """One pair with some tokens behind both its prompts."""
    length = int(pairs.lengths[0])
    behind = torch.tensor([written])
    clean, corrupt = (torch.cat([tokens[:, :length], behind], 1) for tokens in (pairs.clean, pairs.corrupt))
    spans = tuple(Span(span.name, span.start, span.stop) for span in pairs.spans)
    return replace(pairs, clean=clean, corrupt=corrupt, lengths=pairs.lengths + len(written), spans=spans)


def _likely(results: Results, logits: Float[Tensor, " vocab"]) -> Likely:
    chances, tokens = logits.softmax(-1).topk(min(_LISTED, len(logits)))
    return Likely(tuple(map(results.token, tokens.tolist())), tuple(chances.tolist()))
