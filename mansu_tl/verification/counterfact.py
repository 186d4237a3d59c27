"""CounterFact's scores (Meng et al. 2022, arXiv 2202.05262, section 3.4): efficacy, paraphrase and neighbourhood.

As in ROME's code: an answer's probability is exp of its mean log-probability per token. A request or paraphrase is a
success where the new answer is likelier than the true one, a neighbour where the true one is likelier than the new;
successes are averaged over a request's prompts, then over requests. Magnitudes are the differences of the two
probabilities. The score S is the harmonic mean of the three successes. Read for unlearning: a model that has lost the
fact, and nothing beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import harmonic_mean

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.data.sources.counterfact import Request
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.state import require_copyable
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.results.result import Result, Table
from mansu_tl.results.serialise import MismatchError
from mansu_tl.verification.writing import mean_log_probs, text_source_of

# What the authors call a success on each kind of prompt: efficacy, paraphrase and neighbourhood score.
SCORES = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighbourhood": "neighbourhood"}


@dataclass(frozen=True)
class CounterFactScores(Result):
    """How likely the true and the new answer are, prompt by prompt.

    Attributes:
        title: the model's name in tables.
        true: mean log-probability per token of the true answer, in nats.
        new: of the new one.
        kinds: "rewrite", "paraphrase" or "neighbourhood" for each prompt.
        requests: the request behind each prompt.
    """

    title: str
    true: Float[Tensor, " prompt"]
    new: Float[Tensor, " prompt"]
    kinds: tuple[str, ...]
    requests: tuple[str, ...]

    @property
    def success(self) -> Bool[Tensor, " prompt"]:
        """Whether each prompt is a success."""
        kept = torch.tensor([kind == "neighbourhood" for kind in self.kinds])
        return torch.where(kept, self.true > self.new, self.new > self.true)

    @property
    def magnitude(self) -> Float[Tensor, " prompt"]:
        """By how much the probability that is to be higher is, in [-1, 1]."""
        kept = torch.tensor([kind == "neighbourhood" for kind in self.kinds])
        difference = self.new.exp() - self.true.exp()
        return torch.where(kept, -difference, difference)

    @property
    def efficacy(self) -> float:
        """Efficacy score, in [0, 1]; NaN without such prompts."""
        return self._mean("rewrite", self.success)

    @property
    def paraphrase(self) -> float:
        """Paraphrase score, in [0, 1]; NaN without such prompts."""
        return self._mean("paraphrase", self.success)

    @property
    def neighbourhood(self) -> float:
        """Neighbourhood score, in [0, 1]; NaN without such prompts."""
        return self._mean("neighbourhood", self.success)

    @property
    def score(self) -> float:
        """S, the harmonic mean of the three; NaN where one of them is."""
        parts = [self.efficacy, self.paraphrase, self.neighbourhood]
        return float("nan") if any(part != part for part in parts) else float(harmonic_mean(parts))

    def _mean(self, kind: str, values: Tensor) -> float:
        each = self._by_request(kind, values)
        return sum(each.values()) / len(each) if each else float("nan")

    def _by_request(self, kind: str, values: Tensor) -> dict[str, float]:
        """A request's mean over its prompts of one kind."""
        found: dict[str, list[float]] = {}
        for request, other, value in zip(self.requests, self.kinds, values.tolist(), strict=True):
            if other == kind:
                found.setdefault(request, []).append(float(value))
        return {request: sum(each) / len(each) for request, each in found.items()}

    def to_dataframe(self) -> pd.DataFrame:
        """One row a score: its value with a 95 % interval over requests, the magnitude, and how many requests there are."""
        rows = []
        for kind, score in SCORES.items():
            each = self._by_request(kind, self.success)
            if each:
                low, high = interval_over_facts(torch.tensor(list(each.values())), list(each))
                rows.append(
                    (score, self._mean(kind, self.success), low, high, self._mean(kind, self.magnitude), len(each))
                )
        return pd.DataFrame(rows, columns=["score", "value", "value_low", "value_high", "magnitude", "requests"])

    def _check(self) -> None:
        if len({len(self.true), len(self.new), len(self.kinds), len(self.requests)}) > 1:
            raise MismatchError("its log-probabilities, kinds and requests differ in number")

    def __repr__(self) -> str:
        return (
            f"CounterFactScores({self.title}: efficacy {self.efficacy:.3f}, paraphrase {self.paraphrase:.3f}, "
            f"neighbourhood {self.neighbourhood:.3f}; {len(set(self.requests))} requests)"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), form="{:.3f}".format),)


@torch_defaults()
def evaluate_counterfact(
    model: TransformerBridge | PreTrainedModel,
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    title: str = "model",
    batch_size: int = 64,
    progress: bool = False,
) -> CounterFactScores:
    """CounterFact's scores of a model, from `read_counterfact` or `lre_requests`.

    Args:
        tokenizer: the model's own where not given.

    Raises:
        MansuError: no request or tokenizer, a request given twice, an answer that the tokenizer cannot write, or a prompt
            that is longer than the model has positions.
    """
    if not requests:
        raise MansuError("CounterFact: no request given; read some with read_counterfact")
    source = text_source_of(model, tokenizer, "CounterFact")
    require_copyable(model)
    names = [one.name for one in requests]
    if len(set(names)) < len(names):
        raise MansuError(f"CounterFact: {next(n for n in names if names.count(n) > 1)} is there twice; give each once")
    asked = [
        (one, kind, prompt)
        for one in requests
        for kind, prompts in zip(SCORES, ((one.prompt,), one.paraphrases, one.neighbours), strict=True)
        for prompt in prompts
    ]
    both = [(prompt, answer) for one, _, prompt in asked for answer in (one.true, one.new)]
    found = mean_log_probs(
        model, source, both, [one.name for one, _, _ in asked for _ in range(2)], batch_size, progress
    )
    true, new = found.view(-1, 2).unbind(1)
    return CounterFactScores(
        title, true.clone(), new.clone(), tuple(kind for _, kind, _ in asked), tuple(one.name for one, _, _ in asked)
    )
