"""A model's identity: one hash over its parameters, computed where they lie.

Every tensor's bytes, read as 32-bit integers, are projected block by block onto a few seeded random integer vectors, in
float64 and small enough to be exact: the same integers on every device, in any order of summation. What differs anywhere
differs in the projections but for a chance of 2^-72 a block. Only these go to the CPU, where SHA-256 closes them up with
names, dtypes and shapes. Our definition; against accident, not against forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from jaxtyping import Float64, Int32, Int64
from torch import Tensor

from mansu_tl.defaults import torch_defaults
from mansu_tl.models.tree import Model, parameters, quantization_state, require_in_step

# |word| < 2^31, |weight| <= 2^8, 2^12 words a block: sums stay below 2^51, which float64 holds exactly.
_BLOCK, _WEIGHT, _COLUMNS = 2**12, 2**8, 8
# Words turned into float64 at a time: what a CPU's cache holds, and half a gigabyte on other devices.
_CPU_WORDS, _DEVICE_WORDS = 2**20, 2**26


@torch_defaults()
def fingerprint(model: Model) -> str:
    """A hash (64 hex digits) over the sorted names, dtypes, shapes and bytes of a model's HF parameters.

    Bridged or not gives the same, and so does every device, and a saved and reloaded model. A 4-bit model's quantization
    state counts too.

    Raises:
        MansuError: see `parameters`.
    """
    live = parameters(model)
    require_in_step(model)
    digest, weights = hashlib.sha256(), _weights()
    weights_on: dict[torch.device, Tensor] = {}  # moved once a device: once a tensor takes longer than all the rest
    parts: list[Tensor] = []
    for name, tensor in _tensors(live):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.device not in weights_on:
            weights_on[tensor.device] = weights.to(tensor.device)
        parts.append(_projected(_words(tensor), weights_on[tensor.device]))
    # One transfer a device.
    places = list(dict.fromkeys(part.device for part in parts))
    moved = {place: iter(_moved([part for part in parts if part.device == place])) for place in places}
    for part in parts:
        digest.update(next(moved[part.device]).numpy().tobytes())
    return digest.hexdigest()


def _moved(parts: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.cat(parts).cpu().split([part.numel() for part in parts])


def _tensors(live: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in sorted(live.items()):
        yield name, parameter.detach()
        state = quantization_state(parameter)
        if state is not None:
            for key, value in sorted(state.as_dict(packed=True).items()):
                yield f"{name}.{key}", value


def _weights() -> Float64[Tensor, "place column"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-_WEIGHT, _WEIGHT + 1, (_BLOCK, _COLUMNS), generator=generator).double()


def _words(tensor: Tensor) -> Int32[Tensor, " word"]:
    """A tensor's bytes as 32-bit integers, filled up with zeros."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    fill = -raw.numel() % 4
    return (torch.nn.functional.pad(raw, (0, fill)) if fill or raw.storage_offset() % 4 else raw).view(torch.int32)


def _projected(words: Int32[Tensor, " word"], weights: Float64[Tensor, "place column"]) -> Int64[Tensor, " value"]:
    """The projections of all blocks; projected once more where they are many."""
    step = _CPU_WORDS if words.device.type == "cpu" else _DEVICE_WORDS
    out = []
    for start in range(0, words.numel(), step):
        part = words[start : start + step].double()
        fill = -part.numel() % _BLOCK
        part = torch.nn.functional.pad(part, (0, fill)) if fill else part
        out.append((part.view(-1, _BLOCK) @ weights).long().flatten())
    values = torch.cat(out) if out else words.long()
    return values if values.numel() <= _BLOCK else _projected(values.view(torch.int32), weights)
