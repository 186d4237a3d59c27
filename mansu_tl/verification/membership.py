"""Membership inference: can texts that were to be forgotten be told from texts that the model never met?

Four scores of a text, higher = more like a member: LOSS, its mean log-probability per token (Yeom et al. 2018, arXiv
1709.01604); zlib, its log-probability per byte of the compressed text (Carlini et al. 2021, arXiv 2012.07805); Min-K, the
mean over the k % least likely tokens (Shi et al. 2024, arXiv 2310.16789); Min-K++, the same of log-probabilities that are
standardised over the vocabulary at each position (Zhang et al. 2025, arXiv 2404.02936). AUC is how often a member scores
above another text, half for ties.

PrivLeak (MUSE, Shi et al. 2024, arXiv 2407.06460) sets the AUC against that of a model that never learnt the facts. MUSE
counts the AUC from the other side (1 - AUC here), so that -100 % = members are known for certain, 0 = as never trained,
above 0 = *over-forgotten*: members are told by how unlikely they have become.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from mansu_tl.data import Questions, Sequences
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.kinds import require_bridge
from mansu_tl.results.intervals import fact_weights, middle
from mansu_tl.results.result import Result, Table
from mansu_tl.verification.attacks import answered
from mansu_tl.verification.told import told

ATTACKS = ("LOSS", "zlib", "Min-K", "Min-K++")


@dataclass(frozen=True)
class Membership(Result):
    """Membership scores of texts that were trained on and of texts that were not.

    Attributes:
        label: which model.
        members: by attack (`ATTACKS`) and text, in nats per token (zlib: per byte; Min-K++: in standard deviations).
        others: the same of texts that no model met.
        share: of tokens that Min-K and Min-K++ look at.
        facts: the fact behind each member.
        other_facts: the fact behind each of the others.
    """

    label: str
    members: Float[Tensor, "attack text"]
    others: Float[Tensor, "attack other"]
    share: float
    facts: tuple[str, ...]
    other_facts: tuple[str, ...]

    def auc(self, attack: str = "Min-K") -> float:
        """How often a member scores above another text, in [0, 1]; half for ties.

        Raises:
            MansuError: no such attack.
        """
        at = _index(attack)
        return auc(self.members[at], self.others[at])

    def auc_draws(self, attack: str, seed: int = 0) -> Float[Tensor, " draw"]:
        """The AUC in each of the bootstrap's draws: of the members' facts and, apart from them, of the others'.

        Raises:
            MansuError: no such attack.
        """
        at = _index(attack)
        wins = _wins(self.members[at], self.others[at])
        rows, columns = (fact_weights(_groups(f), seed + i) for i, f in enumerate((self.facts, self.other_facts)))
        return torch.einsum("dm,mo,do->d", rows, wins, columns)

    def to_dataframe(self, reference: Membership | None = None) -> pd.DataFrame:
        """One row an attack: AUC with its 95 % interval over facts; with a reference PrivLeak, see `privleak`."""
        rows = []
        for attack in ATTACKS:
            low, high = middle(self.auc_draws(attack))
            row = {"label": self.label, "attack": attack, "auc": self.auc(attack), "auc_low": low, "auc_high": high}
            if reference is not None:
                found = privleak(self, reference, attack)
                ends = {"privleak_low": found.interval[0], "privleak_high": found.interval[1]}
                row |= {"privleak": found.value, **ends, "over_forgotten": found.over_forgotten}
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        found = ", ".join(f"{attack} {self.auc(attack):.3f}" for attack in ATTACKS)
        return f"Membership({self.label}: AUC {found}; {len(self.facts)} members, {len(self.other_facts)} others)"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "AUC", "{:.3f}".format),)


@dataclass(frozen=True)
class PrivLeak(Result):
    """A model's AUC against that of a model which never learnt the facts.

    Attributes:
        label: which model.
        attack: one of `ATTACKS`.
        value: in percent: -100 = members are known for certain, 0 = as never trained, above 0 = over-forgotten.
        interval: its 95 % interval over facts, both models asked about the same draws.
    """

    label: str
    attack: str
    value: float
    interval: tuple[float, float]

    @property
    def over_forgotten(self) -> bool:
        """Whether the whole interval lies above 0: members are told by being less likely than what was never met."""
        return self.interval[0] > 0

    @property
    def remembered(self) -> bool:
        """Whether the whole interval lies below 0: members are told by being likelier."""
        return self.interval[1] < 0

    def __repr__(self) -> str:
        verdict = "over-forgotten" if self.over_forgotten else "remembered" if self.remembered else "as never trained"
        low, high = self.interval
        return f"PrivLeak({self.label}, {self.attack}: {self.value:.1f} % [{low:.1f}, {high:.1f}], {verdict})"


@torch_defaults()
def membership(
    model: TransformerBridge,
    members: Questions,
    others: Questions,
    *,
    share: float = 0.2,
    whole: bool = True,
    batch_size: int = 32,
    label: str = "edited",
) -> Membership:
    """Score the right sentences of two question sets: prompts with their answers, of facts to be forgotten and of others.

    Args:
        members: questions about facts that training had.
        others: questions in the same wordings about names that no model met; their answers come from the same pool.
        share: of a text's tokens, the least likely ones, that Min-K and Min-K++ look at (at least one).
        whole: look at all tokens behind the first; else at the answer's alone, behind its prompt.
        label: what the model is, for tables.

    Raises:
        MansuError: no bridge, a model without a tokenizer, an empty set, a share outside (0, 1], texts that do not fit the
            model, or logits that are not finite.
    """
    require_bridge(model)
    if model.tokenizer is None:
        raise MansuError(
            "membership: this model has no tokenizer, by which zlib reads the text; load it with tokenizer="
        )
    if not 0 < share <= 1:
        raise MansuError(f"membership: share={share}; choose a share of the tokens in (0, 1]")
    both = []
    for name, asked in (("members", members), ("others", others)):
        if len(asked) == 0:
            raise MansuError(f"membership: no {name}; give at least one question")
        first = torch.ones_like(asked.lengths) if whole else asked.lengths
        both.append(_scores(model, model.tokenizer, answered(asked), first, share, batch_size))
    return Membership(label, both[0], both[1], float(share), members.facts, others.facts)


def privleak(model: Membership, reference: Membership, attack: str = "Min-K", seed: int = 0) -> PrivLeak:
    """PrivLeak of a model against one that never learnt the facts, both scored on the same texts.

    With AUC as here, (AUC' - AUC'_reference) / AUC'_reference, AUC' = 1 - AUC (MUSE, equation 3, and open-unlearning).

    Raises:
        MansuError: no such attack, other texts, or a reference that tells every member, from which nothing can be said.
    """
    if (model.facts, model.other_facts) != (reference.facts, reference.other_facts):
        raise MansuError("PrivLeak: the two models were asked about other texts; score both on the same")
    least = 1 - reference.auc(attack)
    if least <= 0:
        raise MansuError(
            f"PrivLeak: the reference {reference.label!r} tells every member ({attack}); pass a model that never met them"
        )
    draws = model.auc_draws(attack, seed), reference.auc_draws(attack, seed)
    ratios = 100 * (draws[1] - draws[0]) / (1 - draws[1]).clamp_min(1e-12)
    return PrivLeak(model.label, attack, 100 * (reference.auc(attack) - model.auc(attack)) / least, middle(ratios))


def auc(members: Float[Tensor, " text"], others: Float[Tensor, " other"]) -> float:
    """Area under the ROC curve, by ranks: the share of pairs in which the member's score is higher, half for ties."""
    scores = torch.cat([members, others]).double()
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    # Equal scores share the mean of their ranks, counted from 1.
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]
    n, m = len(members), len(others)
    return ((ranks[:n].sum() - n * (n + 1) / 2) / (n * m)).item()


def _wins(members: Float[Tensor, " text"], others: Float[Tensor, " other"]) -> Float[Tensor, "text other"]:
    """1 where a member scores above another text, half for ties."""
    difference = members.double()[:, None] - others.double()[None]
    return (difference > 0).double() + 0.5 * (difference == 0).double()


def _index(attack: str) -> int:
    if attack not in ATTACKS:
        raise MansuError(f"membership: no attack {attack!r}; choose one of {', '.join(ATTACKS)}")
    return ATTACKS.index(attack)


def _groups(facts: Sequence[str]) -> Int[Tensor, " row"]:
    order = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
    return torch.tensor([order[fact] for fact in facts])


def _scores(
    model: TransformerBridge,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequences,
    first: Int[Tensor, " text"],
    share: float,
    batch_size: int,
) -> Float[Tensor, "attack text"]:
    found: list[tuple[Tensor, Tensor]] = []
    for batch in told(model, text, first, "membership", batch_size):
        each = batch.log_probs().double()
        every = batch.logits.double().log_softmax(-1)
        chances = every.exp()
        mean = (chances * every).sum(-1)
        spread = ((chances * every.square()).sum(-1) - mean.square()).clamp_min(1e-12).sqrt()
        standard = (each - mean) / spread
        counts = batch.rows.unique_consecutive(return_counts=True)[1].tolist()
        found += list(zip(each.split(counts), standard.split(counts), strict=True))
    rows = []
    for i, (each, standard) in enumerate(found):
        shown = str(tokenizer.decode(text.tokens[i, : int(text.lengths[i])].tolist(), skip_special_tokens=True))
        size = len(zlib.compress(shown.encode()))
        least = max(1, int(share * len(each)))
        low, lowest = (values.sort().values[:least].mean() for values in (each, standard))
        rows.append(torch.stack([each.mean(), each.sum() / size, low, lowest]))
    return torch.stack(rows, 1).float()
