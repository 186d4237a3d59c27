"""A model's identity: one hash over its parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mansu_tl.models.tree import Model, parameters, quantization_state, require_in_step


def fingerprint(model: Model) -> str:
    """SHA-256 (hex) over the sorted names, dtypes, shapes and bytes of a model's HF parameters.

    Bridged or not gives the same; so does a saved and reloaded model. A 4-bit model's quantization state counts too.

    Raises:
        MansuError: see `parameters`.
    """
    live = parameters(model)
    require_in_step(model)
    digest = hashlib.sha256()
    for name, parameter in sorted(live.items()):
        for piece in _pieces(name, parameter):
            digest.update(piece)
        state = quantization_state(parameter)
        if state is not None:
            for key, value in sorted(state.as_dict(packed=True).items()):
                for piece in _pieces(f"{name}.{key}", value):
                    digest.update(piece)
    return digest.hexdigest()


def _pieces(name: str, tensor: Tensor) -> Iterator[bytes | memoryview]:
    yield f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
    yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
