"""What the retain set says about each weight: the second moment of its inputs and the diagonal Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mansu_tl.data import Sequences
from mansu_tl.errors import MansuError
from mansu_tl.unlearning.batches import real_targets


@torch.no_grad()
def input_moments(
    model: PreTrainedModel, names: Iterable[str], text: Sequences, batch_size: int = 128
) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """C = E[x x^T] of the inputs of each named matrix, over the real tokens of the retain text.

    A change dW of the matrix moves its retain outputs by E |dW x|^2 = tr(dW C dW^T).

    Raises:
        MansuError: no retain text.
    """
    if len(text) == 0:
        raise MansuError(
            "retain text: none given, so it has no null space; give some text whose likelihood is to be kept"
        )
    sums: dict[str, Tensor] = {}
    count = 0
    real = torch.empty(0)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][real].float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(watch(name)) for name in names
    ]
    try:
        for start in range(0, len(text), batch_size):
            batch = text[slice(start, start + batch_size)]
            position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
            real = position[None] < batch.lengths[:, None]
            count += int(real.sum())
            model(batch.tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in sums.items()}


def diagonal_fisher(
    model: PreTrainedModel, names: Iterable[str], text: Sequences, *, progress: bool = False
) -> dict[str, Float[Tensor, ...]]:
    """Empirical diagonal Fisher: mean over sequences of the squared gradient of the sequence's mean token loss.

    The retain loss of a changed model is bounded to second order by 1/2 sum F d^2 (diagonal approximation: it leaves
    out how changes add up, so the measured increase is reported beside it).
    """
    values = {name: value.detach() for name, value in model.named_parameters()}
    chosen = list(names)
    totals = {name: torch.zeros_like(values[name], dtype=torch.float32) for name in chosen}
    count = len(text)
    for i in tqdm(range(count), desc="Fisher", unit="sequence", disable=not progress):
        length = int(text.lengths[i])
        row = Sequences(text.tokens[i : i + 1, :length], text.lengths[i : i + 1])
        leaves = {name: values[name].clone().requires_grad_() for name in chosen}
        with torch.enable_grad():
            loss = sequence_loss(model, {**values, **leaves}, row)
            grads = torch.autograd.grad(loss, list(leaves.values()))
        for name, grad in zip(chosen, grads, strict=True):
            totals[name] += grad.float().square() / count
    return totals


def sequence_loss(model: PreTrainedModel, values: Mapping[str, Tensor], batch: Sequences) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy over the real tokens."""
    logits = functional_call(model, dict(values), (batch.tokens,), {"use_cache": False}).logits[:, :-1]
    real = real_targets(batch)
    return torch.nn.functional.cross_entropy(logits[real].float(), batch.tokens[:, 1:][real])
