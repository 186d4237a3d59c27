"""GGUF's formats with searched scales, as llama.cpp quantizes dense models without an importance matrix; and Q4_K_M.

A group's scale is searched over all its weights and kept under one of the super-block's, so that every edit may move it: no
code has a cell of its own, and only in a file, whose scales are given, can these formats be floored (quantizer "gguf").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.models import linear_weights, orient
from mansu_tl.models.gguf import decode, encode, fallback, q4_k_m
from mansu_tl.models.tree import Model
from mansu_tl.quantization.formats.gguf import gguf_grid
from mansu_tl.quantization.quantizer import About, Quantizer, register_quantizer


@dataclass(frozen=True, eq=False)
class SearchedQuantizer(Quantizer):
    """Q4_K, Q5_K, Q6_K or IQ4_NL; the bytes are llama.cpp's own.

    Rows that are no multiple of 256 are stored in another format, as llama.cpp does: Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for
    Q6_K, and float16 where 32 does not divide them either.

    Attributes:
        kind: the format's name in `gguf`.
    """

    name: str
    kind: str

    def fits(self, columns: int) -> bool:
        """Whether rows of so many weights are stored in this format, not in another."""
        return fallback(self.kind, columns) == self.kind

    def roundtrip(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Q(w), in the dtype of `w`."""
        return stored_as(fallback(self.kind, w.shape[1]), w)


@dataclass(frozen=True, eq=False)
class MixtureQuantizer(Quantizer):
    """Q4_K_M: of a whole model, embeddings included, each matrix in the format that llama.cpp chooses for it.

    A matrix alone is taken for an ordinary one, Q4_K.
    """

    name: str

    def roundtrip(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Q(w), in the dtype of `w`."""
        return stored_as(fallback("Q4_K", w.shape[1]), w)

    def quantized(self, model: Model, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Q(w) of every matrix that the file would hold in codes.

        Raises:
            MansuError: a model of an architecture whose GGUF names are not known here.
        """
        linear, values = linear_weights(model), {}
        for name, kind in q4_k_m(model).items():
            value = live[name].detach()
            found = stored_as(kind, orient(value, linear[name]) if name in linear else value)
            values[name] = (orient(found, linear[name]) if name in linear else found).contiguous()
        return values


def stored_as(kind: str, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """What a matrix is worth in one of GGUF's number formats, in its own dtype."""
    if kind == "F16":
        return w.to(torch.float16).to(w.dtype)
    if kind in ("Q5_0", "Q5_1", "Q8_0"):
        return gguf_grid(kind.lower()).roundtrip(w)
    return decode(kind, encode(kind, w)).to(w.dtype)


_K, _USED_BY = "6-bit scale and minimum, under two float16 for 256", "llama.cpp, Ollama, LM Studio"
for _kind, _bits, _block, _scale in (
    ("Q4_K", "4", "32", _K),
    ("Q5_K", "5", "32", _K),
    ("Q6_K", "6", "16", "8-bit scale, under one float16 for 256"),
    ("IQ4_NL", "4", "32", "float16 step, uneven levels"),
):
    register_quantizer(
        f"gguf-{_kind.lower()}",
        partial(SearchedQuantizer, f"gguf-{_kind.lower()}", _kind),
        "searched",
        about=About(_bits, _block, _scale, _USED_BY),
    )
register_quantizer(
    "gguf-q4_k_m",
    partial(MixtureQuantizer, "gguf-q4_k_m"),
    "searched",
    about=About("4-6", "32, 16", "Q4_K, Q5_K and Q6_K by layer", f"{_USED_BY}: their usual file"),
)
