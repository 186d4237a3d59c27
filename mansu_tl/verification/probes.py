"""Linear probes: can the answer still be read out of the residual stream at the last position?

At every layer a ridge regression maps the stream onto the unembedding vector of the answer (the mean of its tokens', where
it has several); the question is answered by the option whose vector (centred over the options) fits the prediction best.
Folds are cut over facts, so a probe is never asked about a name that it was fitted on; in every fit each answer weighs the
same, however many facts share it. Give the probe further facts with the same answers (`also_train`): answers that no training
fact has are guessed less often than by chance. Controls: the same probe fitted to answers shuffled over facts (the
spirit of Hewitt & Liang 2019, arXiv 1909.03368), and a model that never met the facts. The definition is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Questions, Sequences
from mansu_tl.data.fit import require_fit, require_questions
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import require_ready
from mansu_tl.models.kinds import require_bridge
from mansu_tl.models.tree import family, submodule
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.streams import residual_streams, stream_hooks

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FOLDS, _INNER, _SHUFFLES = 6, 3, 5
# Fits a layer: every fold tries each penalty on its inner folds, then fits once, and once for every shuffle.
FITS = _FOLDS * (_INNER * len(PENALTIES) + 1 + _SHUFFLES)


@dataclass(frozen=True)
class Probes(Result):
    """What linear probes read from each layer.

    Attributes:
        label: which model.
        layers: "embed", then "L0", "L1", ...: the stream after each block.
        right: whether the probe of a layer picked the right option of a question whose fact it was not fitted on.
        shuffled: the share of shuffled-answer probes that did.
        penalties: the penalty of each layer's probe, the mean over folds of what training facts chose.
        facts: the fact behind each question.
        chance: accuracy of guessing, as a share.
    """

    label: str
    layers: tuple[str, ...]
    right: Bool[Tensor, "layer question"]
    shuffled: Float[Tensor, "layer question"]
    penalties: Float[Tensor, " layer"]
    facts: tuple[str, ...]
    chance: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer: accuracy in percent with its 95 % interval over facts, the shuffled control with its
        own, and chance."""
        return pd.DataFrame(
            [
                {"label": self.label, "layer": layer}
                | with_interval("accuracy", self.right[i], self.facts, scale=100.0, bounds="interval")
                | with_interval("shuffled", self.shuffled[i], self.facts, scale=100.0)
                | {"chance": 100 * self.chance, "penalty": self.penalties[i].item()}
                for i, layer in enumerate(self.layers)
            ]
        )

    def __repr__(self) -> str:
        accuracy = self.right.double().mean(1)
        best = int(accuracy.argmax())
        shown = " ".join(f"{100 * a:.0f}" for a in accuracy.tolist())
        return (
            f"Probes({self.label}: {shown} % by layer, best {100 * accuracy[best]:.1f} % at {self.layers[best]}, shuffled "
            f"{100 * self.shuffled[best].double().mean():.1f} %, chance {100 * self.chance:.0f} %)"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "by layer", "{:.2f}".format, rows=40),)


@torch_defaults()
def probe(
    model: TransformerBridge,
    questions: Questions,
    *,
    also_train: Questions | None = None,
    folds: int = _FOLDS,
    penalties: Sequence[float] = PENALTIES,
    shuffles: int = _SHUFFLES,
    batch_size: int = 256,
    seed: int = 0,
    label: str = "edited",
    progress: bool = False,
) -> Probes:
    """Fit and cross-validate a probe at every layer.

    Args:
        questions: what is asked; its right answers are the probe's targets.
        also_train: questions about other facts that join every training fold, e.g. the near set, whose answers come
            from the same pool. Facts that `questions` asks too are refused.
        folds: into how many groups of facts the questions are cut.
        penalties: ridge penalties to choose from, as multiples of the features' mean variance; each fold chooses on
            its own training facts, by an inner split.
        shuffles: how often the control permutes the answers of the training facts.
        batch_size: prompts in a forward pass.
        seed: of folds and shuffles.
        label: what the model is, for tables and figures.
        progress: show a progress bar over layers.

    Raises:
        MansuError: fewer than 2 folds or more than there are facts, penalties that are not positive, fewer than one
            shuffle, or facts both asked and trained on.
    """
    require_bridge(model)
    sets = [questions, *([] if also_train is None else [also_train])]
    for asked in sets:
        require_questions(asked)
        require_fit(model, asked)
    names = tuple(dict.fromkeys(questions.facts))
    if not 2 <= folds <= len(names):
        raise MansuError(f"probe: folds={folds} of {len(names)} facts; choose 2..{len(names)}")
    if not penalties or min(penalties) <= 0 or shuffles < 1:
        raise MansuError(f"probe: penalties={tuple(penalties)}, shuffles={shuffles}; all have to be positive")
    if also_train is not None and (both := set(names) & set(also_train.facts)):
        raise MansuError(f"probe: also_train asks {min(both)!r} too, so a probe would memorise it; drop it from one")
    generator = torch.Generator().manual_seed(seed)
    fold = _folds(questions.facts, folds, generator)
    features = torch.cat([streams(model, asked, batch_size) for asked in sets], 1)
    number: dict[tuple[int, ...], int] = {}
    texts = [row[0] for asked in sets for row in asked.texts()]
    answers = torch.tensor([number.setdefault(text, len(number)) for text in texts])
    facts = [fact for asked in sets for fact in asked.facts]
    fold = torch.cat([fold, torch.full((len(facts) - len(fold),), -1)])  # further facts are in no fold's test
    words = _unembedding(model)
    vectors = torch.stack([words[list(text)].mean(0) for text in number])
    inside = (questions.options.cpu() >= 0)[..., None]
    options = (words[questions.options.cpu().clamp_min(0)] * inside).sum(-2) / inside.sum(-2)
    options = options - options.mean(1, keepdim=True)
    shuffled = [answers[_shuffle(facts, generator)] for _ in range(shuffles)]
    layers = tuple(stream_hooks(model))
    right = torch.zeros(len(layers), len(questions), dtype=torch.bool)
    control, chosen = torch.zeros(len(layers), len(questions)), torch.zeros(len(layers))
    for i in tqdm(range(len(layers)), desc=f"probes {label}", unit="layer", disable=not progress):
        for j in range(folds):
            test, train = (fold == j).nonzero()[:, 0], (fold != j).nonzero()[:, 0]
            inner = _folds([facts[t] for t in train.tolist()], _INNER, generator)
            penalty = _chosen(features[i, train], vectors[answers[train]], _balance(answers[train]), inner, penalties)
            chosen[i] += penalty / folds
            for n, labels in enumerate((answers, *shuffled)):
                fit, bias = ridge(features[i, train], vectors[labels[train]], penalty, _balance(labels[train]))
                scores = ((features[i, test] @ fit + bias)[:, None] * options[test]).sum(-1)
                hit = scores[:, 0] > scores[:, 1:].max(1).values
                if n == 0:
                    right[i, test] = hit
                else:
                    control[i, test] += hit.float() / shuffles
    return Probes(label, layers, right, control, chosen, questions.facts, 1 / questions.options.shape[1])


def ridge(
    features: Float[Tensor, "row d_in"],
    targets: Float[Tensor, "row d_out"],
    penalty: float,
    weights: Float[Tensor, " row"] | None = None,
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Ridge regression with an intercept that is not penalised, in closed form.

    Minimises the mean squared error plus lambda times the squared coefficients, lambda = penalty x the mean variance of
    a feature.

    Args:
        weights: of the rows in every mean; all alike where not given.

    Returns:
        Coefficients and intercept: prediction = features @ coefficients + intercept.
    """
    share = torch.full_like(features[:, 0], 1 / len(features)) if weights is None else weights / weights.sum()
    mean_x, mean_y = share @ features, share @ targets
    root = share.sqrt()[:, None]
    x, y = root * (features - mean_x), root * (targets - mean_y)
    strength = penalty * x.square().sum() / x.shape[1]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    shrunk = torch.where(s > 0, s / (s.square() + strength), 0)
    coefficients = vh.T @ (shrunk[:, None] * (u.T @ y))
    return coefficients, mean_y - mean_x @ coefficients


def streams(
    model: TransformerBridge, questions: Questions, batch_size: int = 256
) -> Float[Tensor, "layer question d_model"]:
    """The residual stream at every question's last token: what enters block 0, then what leaves each block."""
    require_ready(model, questions.prompts)
    out = []
    for start in range(0, len(questions), batch_size):
        rows = questions[slice(start, start + batch_size)]
        layers, _ = residual_streams(model, Sequences(rows.prompts, rows.lengths))
        at, last = torch.arange(len(rows)), rows.lengths.cpu() - 1
        out.append(torch.stack([stream[at, last].cpu().double() for stream in layers]))
    states = torch.cat(out, 1)
    if not torch.isfinite(states).all():
        raise MansuError("probe: the model's streams are not finite on these questions; check its weights and dtype")
    return states


def _unembedding(model: TransformerBridge) -> Float[Tensor, "vocab d_model"]:
    weight = submodule(model, family(model).head)._parameters["weight"]
    assert weight is not None
    return weight.detach().cpu().double()


def _folds(facts: Sequence[str], folds: int, generator: torch.Generator) -> Int[Tensor, " row"]:
    """A fold for every row, the rows of one fact in one fold."""
    names = list(dict.fromkeys(facts))
    order = torch.randperm(len(names), generator=generator) % folds
    place = {name: int(order[i]) for i, name in enumerate(names)}
    return torch.tensor([place[fact] for fact in facts])


def _shuffle(facts: Sequence[str], generator: torch.Generator) -> Int[Tensor, " row"]:
    """For every row, a row whose answer it gets: facts are permuted, the rows of one fact stay together."""
    names = list(dict.fromkeys(facts))
    order = torch.randperm(len(names), generator=generator).tolist()
    row = {name: facts.index(names[j]) for name, j in zip(names, order, strict=True)}
    return torch.tensor([row[fact] for fact in facts])


def _balance(answers: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Weights by which every answer has the same share."""
    _, place, counts = answers.unique(return_inverse=True, return_counts=True)
    return 1 / counts[place].double()


def _chosen(
    features: Float[Tensor, "row d_in"],
    targets: Float[Tensor, "row d_out"],
    balance: Float[Tensor, " row"],
    inner: Int[Tensor, " row"],
    penalties: Sequence[float],
) -> float:
    """The penalty whose predictions are nearest to the targets of facts left out."""
    if len(penalties) == 1:
        return penalties[0]
    errors = torch.zeros(len(penalties), dtype=torch.float64)
    for j in inner.unique().tolist():
        train, test = inner != j, inner == j
        for p, penalty in enumerate(penalties):
            fit, bias = ridge(features[train], targets[train], penalty, balance[train])
            errors[p] += balance[test] @ (features[test] @ fit + bias - targets[test]).square().sum(1)
    return penalties[int(errors.argmin())]
