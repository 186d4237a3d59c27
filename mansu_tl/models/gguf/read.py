"""From a GGUF file to a Hugging Face model that remembers the file: which tensor each parameter came from, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from gguf import GGMLQuantizationType, dequantize, get_tensor_name_map
from jaxtyping import Float32, Int, Shaped, UInt8
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.errors import MansuError
from mansu_tl.models.families import Family, family_of
from mansu_tl.models.gguf.blocks import LAYOUTS, Blocks
from mansu_tl.models.gguf.config import ARCHITECTURES, read_config
from mansu_tl.models.gguf.file import GgufFile, Stored
from mansu_tl.models.gguf.tokens import read_tokenizer
from mansu_tl.models.limits import require_memory
from mansu_tl.models.quiet import quiet
from mansu_tl.models.tree import Model, hf_of, tied_names
from mansu_tl.models.weights import linear_weights

_REMEMBERED = "_mansu_tl_gguf"
# Tensors that say what the config says.
_NO_WEIGHTS = frozenset(("rope_freqs.weight",))


@dataclass(frozen=True)
class Way:
    """How a file's tensor became a parameter.

    Attributes:
        stored: where the tensor lies.
        rows: for each row of the parameter, oriented [out, in], the row of the tensor; None = the same.
        transposed: the parameter is stored [in, out].
        offset: what the file adds to the parameter (gemma's norms).
    """

    stored: Stored
    rows: Int[Tensor, " out"] | None
    transposed: bool
    offset: float

    def arranged(self, value: Shaped[Tensor, " out *any"]) -> Shaped[Tensor, " out *any"]:
        """Something per weight, from the file's order of rows to the parameter's, oriented [out, in]."""
        return value if self.rows is None else value[self.rows.to(value.device)]

    def back(self, value: Shaped[Tensor, " out *any"]) -> Shaped[Tensor, " out *any"]:
        """The other way."""
        return value if self.rows is None else value[self.rows.argsort().to(value.device)]


@dataclass(frozen=True, eq=False)
class GgufWeights:
    """The file that a model's weights came from.

    Attributes:
        file: its head.
        ways: by HF parameter name (tied ones under the first), how the parameter was read.
    """

    file: GgufFile
    ways: Mapping[str, Way]

    @cached_property
    def types(self) -> dict[str, str]:
        """The number format of each parameter, by HF name."""
        return {name: way.stored.type for name, way in self.ways.items()}

    def blocks(self, name: str) -> Blocks:
        """Codes and scales of a parameter, oriented [out, in].

        Raises:
            MansuError: a parameter that is not stored in codes, or in a format whose codes are not read.
        """
        way = self.ways[name]
        if way.stored.type not in LAYOUTS:
            raise MansuError(
                f"{name}: stored as {way.stored.type} in {self.file.path.name}, whose codes are not read; those that are: "
                f"{', '.join(LAYOUTS)}"
            )
        read = LAYOUTS[way.stored.type].read(self.file.data(way.stored.name))
        shift = None if read.shift is None else way.arranged(read.shift)
        return Blocks(read.layout, way.arranged(read.codes), way.arranged(read.step), shift)

    def value(self, name: str, raw: UInt8[Tensor, "row byte"] | None = None) -> Float32[Tensor, ...]:
        """A parameter as the file has it, bit for bit what `gguf` dequantizes (less the offset of gemma's norms).

        Args:
            raw: its bytes, where they are not those of the file.
        """
        way = self.ways[name]
        value = way.arranged(self._dequantized(way.stored, self.file.data(way.stored.name) if raw is None else raw))
        if way.transposed:
            value = value.T.contiguous()
        return value - way.offset if way.offset else value

    def _dequantized(self, stored: Stored, raw: Tensor) -> Tensor:
        """A tensor's values, in the file's order."""
        if stored.type in LAYOUTS:
            return LAYOUTS[stored.type].read(raw).values().view(stored.shape)
        try:
            values = dequantize(raw.numpy(), GGMLQuantizationType[stored.type])
        except NotImplementedError:
            raise MansuError(
                f"{self.file.path}: {stored.name} is stored as {stored.type}, which gguf does not dequantize; convert the "
                "file to another type"
            ) from None
        return torch.from_numpy(values.copy()).view(stored.shape)


def gguf_weights(model: Model) -> GgufWeights | None:
    """The GGUF file that a model was loaded from; None for a model that came from elsewhere."""
    return hf_of(model).__dict__.get(_REMEMBERED)


def remember(hf: PreTrainedModel, weights: GgufWeights | None) -> None:
    """Keep beside a model the file that it, or the model that it is a copy of, came from."""
    hf.__dict__[_REMEMBERED] = weights


def open_gguf(path: Path, name: str) -> tuple[PreTrainedModel, GgufWeights]:
    """A model without values for a file, and which of its tensors each parameter is; nothing but the head is read.

    Raises:
        MansuError: a file that is broken or of another architecture, or tensors that do not belong to it.
    """
    file = GgufFile.read(path)
    config = read_config(file)
    config.name_or_path = name
    family = family_of(config, source=name)
    config._attn_implementation = "eager"
    with quiet(), init_empty_weights(include_buffers=False):
        hf = family.model_class(config)
    hf.tie_weights()  # outside: accelerate gives every parameter that is put down a place of its own
    return hf, GgufWeights(file, _ways(file, family, hf))


def read_model(path: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model in a GGUF file, float32, and its tokenizer; `gguf_weights` of it is the file.

    Raises:
        MansuError: as `open_gguf`, a tokenizer that cannot be read, or too little memory.
    """
    hf, weights = open_gguf(path, name)
    require_memory(name, hf.parameters(), device=torch.device("cpu"), dtype=torch.float32)
    hf.load_state_dict({key: weights.value(key) for key in weights.ways}, assign=True, strict=False)
    hf.tie_weights()
    remember(hf, weights)
    return hf.eval().requires_grad_(False), read_tokenizer(weights.file)


def _ways(file: GgufFile, family: Family, hf: PreTrainedModel) -> dict[str, Way]:
    names = get_tensor_name_map(ARCHITECTURES[file.architecture][1], hf.config.num_hidden_layers)
    shapes = {name: tuple(parameter.shape) for name, parameter in hf.named_parameters(remove_duplicate=False)}
    linear, ways = linear_weights(hf), dict[str, Way]()
    for name, *_ in tied_names(hf):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = file.tensors.get(theirs or "")
        if stored is None:
            raise MansuError(f"{file.path}: has no tensor {theirs or ''} for {name}; it does not hold a whole model")
        transposed = name in linear and linear[name].transposed
        norm = family.norm_offset if stored.name.endswith("norm.weight") else 0.0
        way = Way(stored, _rows(file.architecture, family, hf, stored), transposed, norm)
        shape = stored.shape[::-1] if transposed else stored.shape
        if shape != shapes[name]:
            raise MansuError(f"{file.path}: {stored.name} is {stored.shape}, {name} {shapes[name]}; the file is broken")
        ways[name] = way
    unused = file.tensors.keys() - {way.stored.name for way in ways.values()} - _NO_WEIGHTS
    if unused:
        raise MansuError(f"{file.path}: tensor {min(unused)} has no place in {family.name}; it holds another model")
    return ways


def _rows(architecture: str, family: Family, hf: PreTrainedModel, stored: Stored) -> Tensor | None:
    """Which row of the file's tensor each row of the parameter is."""
    heads = hf.config.num_attention_heads
    kind = stored.name.split(".")[2] if stored.name.startswith("blk.") else ""
    rows = torch.arange(stored.shape[0])
    if architecture == "llama" and kind in ("attn_q", "attn_k"):
        # llama.cpp turns pairs of neighbouring rows, Hugging Face the two halves of a head.
        heads = heads if kind == "attn_q" else hf.config.num_key_value_heads
        return rows.view(heads, -1, 2).transpose(1, 2).flatten()
    if family.qkv == "interleaved" and kind == "attn_qkv":
        return rows.view(3, heads, -1).transpose(0, 1).flatten()
    return None
