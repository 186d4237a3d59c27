"""A saved model as bytes on disk: its tensors by HF parameter name, read one at a time and never run."""

from __future__ import annotations

import hashlib
import json
import re
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mansu_tl.errors import MansuError
from mansu_tl.models import LinearWeight, linear_weights
from mansu_tl.models.families import family_of
from mansu_tl.models.quiet import quiet

# config.json entries that say where a model came from, not what it computes.
_PROVENANCE = frozenset(("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"))
# gpt_neox's output embedding, on disk and in transformers.
_RENAMED = {"embed_out.weight": "lm_head.weight"}
_CHUNK = 1 << 24
_BAD_CONFIG = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    StrictDataclassFieldValidationError,
    StrictDataclassClassValidationError,
)


class SavedModel:
    """A folder in Hugging Face format.

    Attributes:
        folder: where it is.
        config: config.json, without the entries that only say where the model came from.
        linear: the matrices that quantized loading quantizes, known from the config alone.
        shapes: every parameter that the config calls for (tied ones once), and its shape.
        problems: what is wrong with the folder, one line each: tensors that are missing or too many, wrong shapes.

    Raises:
        MansuError: no such folder, an unsupported or quantized model, or files that cannot be read.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / "config.json").is_file():
            raise MansuError(f"{self.folder}: no config.json there; pass a folder in Hugging Face format")
        blank = _blank(self.folder)
        self.config = _config_facts(self.folder)
        self.linear: dict[str, LinearWeight] = linear_weights(blank)
        self.shapes = {name: tuple(value.shape) for name, value in blank.named_parameters()}
        self._tied = _tied(blank)
        self._files, self._index = _weight_files(self.folder)
        self._doubled: dict[str, list[str]] = {}
        self._where = self._locate(blank)
        self.problems = tuple(self._check(blank))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def tensor(self, name: str) -> Tensor:
        """A parameter's stored values.

        Raises:
            MansuError: the file cannot be read.
        """
        file, key = self._where[name]
        with _open(file) as opened:
            return opened.get_tensor(key)

    def digest(self) -> str:
        """SHA-256 (hex) over the names and bytes of the weight files."""
        total = hashlib.sha256()
        for file in self._files:
            total.update(file.name.encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    total.update(chunk)
        return total.hexdigest()

    def _locate(self, blank: PreTrainedModel) -> dict[str, tuple[Path, str]]:
        """File and key of every tensor on disk, by HF parameter name."""
        names = blank.state_dict().keys()
        found: dict[str, tuple[Path, str]] = {}
        for file in self._files:
            with _open(file) as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    name = _RENAMED.get(key, key)
                    # Checkpoints of the bare model lack the head's prefix.
                    prefixed = f"{blank.base_model_prefix}.{name}"
                    name = prefixed if name not in names and prefixed in names else name
                    if name in found:
                        self._doubled.setdefault(name, [found[name][0].name]).append(file.name)
                    found[name] = (file, key)
        return found

    def _check(self, blank: PreTrainedModel) -> list[str]:
        where = self.folder
        ignored = [re.compile(pattern) for pattern in blank._keys_to_ignore_on_load_unexpected or ()]
        known = blank.state_dict().keys()
        problems = [f"{name}: missing in {where}" for name in self.shapes if name not in self._where]
        for name in sorted(self._where):
            if name not in known:
                if not any(pattern.search(name) for pattern in ignored):
                    problems.append(f"{name}: not a parameter of this model, but in {where}")
            elif name in self.shapes and (shape := self._shape(name)) != self.shapes[name]:
                problems.append(f"{name}: shape {shape} in {where}, the config says {self.shapes[name]}")
            elif name in self._tied and not same_bits(self.tensor(name), self.tensor(self._tied[name])):
                problems.append(f"{name}: tied to {self._tied[name]} by the config, but differs in {where}")
        problems += [
            f"{name}: stored more than once in {where} ({', '.join(files)}), and which one counts is anyone's guess"
            for name, files in sorted(self._doubled.items())
        ]
        problems += self._index_problems()
        if (self.folder / "adapter_config.json").exists():
            problems.append(f"adapter_config.json: {where} holds an adapter, which transformers would load on top")
        return problems

    def _index_problems(self) -> list[str]:
        """Where the index of a sharded checkpoint and its files disagree; loaders go by the one or the other."""
        if not self._index:
            return []
        stored = {key: file.name for file, key in self._where.values()}
        problems = [
            f"{key}: in {file} by the index of {self.folder}, but stored in {stored.get(key, 'no file')}"
            for key, file in sorted(self._index.items())
            if stored.get(key) != file
        ]
        return problems + [
            f"{name}: stored in {file.name}, but the index of {self.folder} does not name it"
            for name, (file, key) in sorted(self._where.items())
            if name in self.shapes and key not in self._index
        ]

    def _shape(self, name: str) -> tuple[int, ...]:
        file, key = self._where[name]
        with _open(file) as opened:
            return tuple(opened.get_slice(key).get_shape())


def bits(value: Tensor) -> Tensor:
    """A floating tensor's bit patterns: unlike its values they tell 0 from -0 and NaN from NaN."""
    return value.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


def _blank(folder: Path) -> PreTrainedModel:
    """The model that the config describes, without values."""
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except _BAD_CONFIG as error:
        raise MansuError(f"{folder}: config.json cannot be read ({' '.join(str(error).split())[:160]})") from None
    if getattr(config, "quantization_config", None) is not None:
        raise MansuError(f"{folder}: already quantized; a certificate is made from the dense model")
    with torch.device("meta"):
        return family_of(config, source=str(folder)).model_class(config)


def _config_facts(folder: Path) -> dict[str, object]:
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in facts.items() if key not in _PROVENANCE}


def _tied(blank: PreTrainedModel) -> dict[str, str]:
    """Second and further names of tied parameters -> the first."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in blank.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that transformers would read, in its order of preference, and which tensor the index sees in which."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single], {}
    if not index.is_file():
        raise MansuError(f"{folder}: no model.safetensors there; save the model in safetensors format")
    try:
        where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(where.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise MansuError(f"{index}: cannot be read ({error}); copy or save the model again") from None
    for name in names:
        if Path(name).name != name:
            raise MansuError(f"{index}: names {name!r}, which is no file in this folder; copy or save the model again")
        if not (folder / name).is_file():
            raise MansuError(f"{folder / name}: named in {index.name} but not there; copy or save the model again")
    return [folder / name for name in names], where


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MansuError(f"{file}: cannot be read ({error}); copy or save the model again") from None
