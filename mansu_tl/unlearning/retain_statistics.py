"""What the retain text says: second moments of inputs, the diagonal Fisher information, which of it is near."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.errors import MansuError
from mansu_tl.models import linear_weights
from mansu_tl.quantization import inputs_of
from mansu_tl.runs import distributed
from mansu_tl.runs.norms import norm_factor
from mansu_tl.runs.values import Values, predicted, watched

# Sequences in a pass of the Fisher information, and numbers of their gradients of one matrix that are held at once.
_FISHER_ROWS, _MOST_NUMBERS = 32, 2**26
# Logits of a text that exist at one time: a gibibyte.
MOST_LOGITS = 2**28


def input_moments(
    model: PreTrainedModel,
    names: Iterable[str],
    text: Sequences,
    batch_size: int = 128,
    *,
    behind_norms: bool = False,
    data_parallel: bool = False,
) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """C = E[x x^T] of the inputs of each named matrix, over the real tokens of the retain text.

    A change dW of the matrix moves its retain outputs by E |dW x|^2 = tr(dW C dW^T).

    Args:
        behind_norms: count each input as often as the square of what a norm behind the matrix makes of a unit there, so
            that C is about what reaches the stream (`norm_factor`).
        data_parallel: share the text out over the processes of `torch.distributed`.

    Raises:
        MansuError: no retain text.
    """
    if len(text) == 0:
        raise MansuError(
            "retain text: none given, so it has no null space; give some text whose likelihood is to be kept"
        )
    names = list(names)
    factors = {name: norm_factor(model, name) for name in names} if behind_norms else {}
    weights = {name: factor for name, factor in factors.items() if factor is not None}
    found = inputs_of(model, names, text, batch_size, weights=weights, data_parallel=data_parallel)
    return {name: inputs.moment for name, inputs in found.items()}


def mixed_moments(
    model: PreTrainedModel,
    names: Collection[str],
    text: Sequences,
    near: Sequences,
    near_weight: float,
    *,
    behind_norms: bool = False,
    data_parallel: bool = False,
) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """`input_moments` of the retain text and, weighted, of near text where there is some.

    Args:
        behind_norms, data_parallel: as `input_moments`.

    Raises:
        MansuError: as `input_moments` and `require_null_space`.
    """
    if len(text):
        linear = linear_weights(model)
        require_null_space(text, (linear[name].in_features for name in names))
    more = {"behind_norms": behind_norms, "data_parallel": data_parallel}
    moments = input_moments(model, names, text, **more)
    if len(near):
        # In place: the moments of a large model's matrices take as much room as the model.
        for name, moment in input_moments(model, names, near, **more).items():
            moments[name].add_(moment.mul_(near_weight)).div_(1 + near_weight)
    return moments


def null_projector(moment: Float[Tensor, "d_in d_in"], leak: float, name: str) -> Float[Tensor, "d_in d_in"]:
    """The projector onto the input directions that together hold at most `leak` of the retain inputs' energy.

    dW P then moves the matrix's retain outputs by at most `leak` times what dW could. The directions are eigenvectors
    of C = E[x x^T], taken from the smallest eigenvalue up.

    Raises:
        MansuError: a leak outside (0, 1), or no direction holds as little of tr(C): the retain text fills the space.
    """
    if not 0 < leak < 1:
        raise MansuError(f"null space: leak={leak}; choose a share of the retain inputs' energy in (0, 1)")
    energy, directions = torch.linalg.eigh(moment.double())
    # On the CPU: running sums of floats have no deterministic form on a GPU.
    spectrum = energy.clamp_min(0).cpu()
    held = spectrum.cumsum(0) / spectrum.sum().clamp_min(1e-30)
    free = directions[:, (held <= leak).to(directions.device)]
    if free.shape[1] == 0:
        raise MansuError(
            f"null space of {name}: every one of {moment.shape[0]} input directions holds more than leak={leak} of the "
            "retain inputs' energy; raise leak"
        )
    return (free @ free.T).to(moment.dtype)


def require_null_space(text: Sequences, widths: Iterable[int]) -> None:
    """Refuse a retain text of fewer tokens than the widest matrix has inputs: what it did not show would count as free."""
    tokens, widest = int(text.lengths.sum()), max(widths)
    if tokens < widest:
        raise MansuError(
            f"retain text: {tokens} tokens, fewer than the {widest} inputs of the widest matrix, so most of its null "
            f"space would be chance; give at least {widest} tokens or switch it off (null_space=0, projector=False)"
        )


def diagonal_fisher(
    model: PreTrainedModel,
    names: Iterable[str],
    text: Sequences,
    *,
    data_parallel: bool = False,
    progress: bool = False,
) -> dict[str, Float[Tensor, ...]]:
    """Empirical diagonal Fisher: mean over sequences of the squared gradient of the sequence's mean token loss.

    What it is for is to compare weights: it is low by about the length of a sequence as a measure of loss, and leaves out how
    changes add up. `retain_cost` says what a change costs. Sequences share a pass: a sequence's gradient of a matrix is
    the product of its own output gradients and inputs.

    Args:
        data_parallel: as `input_moments`.
    """
    chosen: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    totals = {name: torch.zeros_like(module.weight, dtype=torch.float32) for name, module in chosen.items()}
    passed: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, entered: Tensor, left: Tensor) -> Tensor:
        # A leaf, so that the pass back ends at outputs and no weight collects a gradient.
        passed[name] = entered.detach(), left if left.requires_grad else left.detach().requires_grad_()
        return passed[name][1]

    order = text.lengths.argsort(stable=True).tolist()  # alike in length, so that little is padded
    starts: Sequence[int] = range(0, len(text), _FISHER_ROWS)
    if data_parallel:
        starts = [starts[i] for i in distributed.turns(len(starts))]
    with torch.enable_grad(), watched(model, chosen, keep):
        for start in tqdm(starts, desc="Fisher", unit="pass", disable=not progress):
            part = text[order[start : start + _FISHER_ROWS]].trimmed()
            summed = _mean_losses(model, part).sum()
            grads = torch.autograd.grad(summed, [passed[name][1] for name in chosen])
            for (name, module), grad in zip(chosen.items(), grads, strict=True):
                _add_squares(totals[name], passed[name][0], grad, transposed=isinstance(module, Conv1D))
    return {name: (distributed.summed(x) if data_parallel else x) / len(text) for name, x in totals.items()}


def _mean_losses(model: PreTrainedModel, batch: Sequences) -> Float[Tensor, " row"]:
    """Each sequence's mean next-token cross-entropy."""
    predictions = predicted(model, {}, batch)
    losses = torch.nn.functional.cross_entropy(predictions.logits, predictions.targets, reduction="none")
    return losses.new_zeros(len(batch)).index_add(0, predictions.rows, losses / (batch.lengths[predictions.rows] - 1))


def _add_squares(
    total: Float[Tensor, "_ _"],
    x: Float[Tensor, "row pos d_in"],
    grad: Float[Tensor, "row pos d_out"],
    *,
    transposed: bool,
) -> None:
    """Add every sequence's squared gradient of a matrix; where a sequence has no target its output gradient is 0."""
    left, right = (x, grad) if transposed else (grad, x)
    rows = max(1, _MOST_NUMBERS // total.numel())
    for start in range(0, len(x), rows):
        each = left[start : start + rows].float().mT @ right[start : start + rows].float()
        total += each.square_().sum(0)


def spread_out(text: Sequences, most: int) -> Sequences:
    """At most so many rows of a text, at equal distances."""
    count = min(most, len(text))
    return text[[i * len(text) // count for i in range(count)]]


def sequence_loss(model: PreTrainedModel, values: Values, batch: Sequences) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy over the real tokens; sequences of like length are run together, to pad less."""
    vocab = model.get_output_embeddings().weight.shape[0]
    rows, count = max(1, MOST_LOGITS // (batch.tokens.shape[1] * vocab)), int((batch.lengths - 1).sum())
    parts = []
    for at in batch.lengths.argsort(stable=True).split(rows):
        part = predicted(model, values, batch[at].trimmed())
        if len(part.targets):
            mean = torch.nn.functional.cross_entropy(part.logits, part.targets)
            parts.append(mean * (len(part.targets) / count))
    return torch.stack(parts).sum()


@torch.no_grad()
def near_neighbours(
    model: PreTrainedModel, pairs: PromptPairs, text: Sequences, share: float, batch_size: int = 128
) -> Int[Tensor, " row"]:
    """The rows of a retain text that the model represents most like the forget prompts, nearest first.

    A row's nearness is the largest cosine, over its own tokens and over the forget prompts, between the residual stream
    at half depth at that token and at a prompt's last token, both less the text's mean. Our definition.

    Raises:
        MansuError: a share of the text's rows outside (0, 1].
    """
    if not 0 < share <= 1:
        raise MansuError(f"near neighbours: share={share}; choose a share of the retain text in (0, 1]")
    last = [
        rows[torch.arange(len(rows)), real.sum(1) - 1]
        for rows, real in _states(model, Sequences(pairs.clean, pairs.lengths), batch_size)
    ]
    total, count = torch.zeros_like(last[0][0]), 0
    for rows, real in _states(model, text, batch_size):
        total += rows[real].sum(0)
        count += int(real.sum())
    mean = total / count
    wanted = normalize(torch.cat(last) - mean, dim=-1)
    nearness = [
        (normalize(row[real] - mean, dim=-1) @ wanted.T).max()
        for batch in _states(model, text, batch_size)
        for row, real in zip(*batch, strict=True)
    ]
    return torch.stack(nearness).topk(max(1, round(share * len(text)))).indices


def _states(
    model: PreTrainedModel, text: Sequences, batch_size: int
) -> Iterator[tuple[Float[Tensor, "row pos d_model"], Bool[Tensor, "row pos"]]]:
    """The residual stream at half depth, batch by batch, and which of its positions are real."""
    for start in range(0, len(text), batch_size):
        batch = text[slice(start, start + batch_size)]
        hidden = model.base_model(batch.tokens, use_cache=False, output_hidden_states=True).hidden_states
        yield hidden[len(hidden) // 2].float(), batch.real
