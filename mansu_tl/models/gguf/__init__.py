"""GGUF files, the format of llama.cpp: read into Hugging Face models, remembered, and written again code by code."""

from mansu_tl.models.gguf.blocks import LAYOUTS, Blocks, Layout
from mansu_tl.models.gguf.encoders import decode, encode
from mansu_tl.models.gguf.file import GgufFile, Stored
from mansu_tl.models.gguf.mixture import fallback, q4_k_m
from mansu_tl.models.gguf.read import GgufWeights, gguf_weights, open_gguf, read_model, remember
from mansu_tl.models.gguf.write import save_gguf

__all__ = [
    "LAYOUTS",
    "Blocks",
    "GgufFile",
    "GgufWeights",
    "Layout",
    "Stored",
    "decode",
    "encode",
    "fallback",
    "gguf_weights",
    "open_gguf",
    "q4_k_m",
    "read_model",
    "remember",
    "save_gguf",
]


def __dir__() -> list[str]:
    return sorted(__all__)
