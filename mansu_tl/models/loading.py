"""Loading: an embedded model, a folder, a hub id or an HF model in memory becomes a hooked model."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from safetensors import SafetensorError
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import get_official_model_name
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.copies import boot, cast, duplicate, forget_source_format
from mansu_tl.models.families import family_of
from mansu_tl.models.four_bit import convert, is_four_bit, quantization_config, require_kind, stored_kind
from mansu_tl.models.gguf import read_model
from mansu_tl.models.kinds import adapter_layer, way_to_load
from mansu_tl.models.limits import require_memory
from mansu_tl.models.packages import PACKAGED, packaged_file
from mansu_tl.models.placement import DeviceMap, one_line, place, require_device, require_map, require_placed
from mansu_tl.models.quiet import quiet
from mansu_tl.models.stored import dense_state, is_read, quantization_settings, remember_formats
from mansu_tl.results.files import local, read_text

_MISSPELT = 0.85  # a name as much like one of ours (difflib's ratio) is one mistyped
EMBEDDED = ("pocket", "pocket-fp", "pocket-never")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
ADAPTER = "adapter_config.json"
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    SafetensorError,
    StrictDataclassFieldValidationError,
    StrictDataclassClassValidationError,
)


@torch_defaults()
def load(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantized: str | None = None,
    device_map: DeviceMap | None = None,
) -> TransformerBridge:
    """A hooked model: eval mode, frozen, eager attention, the raw HF weights (nothing folded).

    A 4-bit checkpoint of bitsandbytes, or quantized=, gives a model with real 4-bit layers: it runs, generates, and is
    patched and attributed like any other, and computes what its dequantized twin (`mansu_tl.quantize`) computes. It
    cannot be edited, rebuilt or saved: that needs the dense checkpoint. It computes in the dtype of what is not packed
    (embedding and norms), whatever the checkpoint says; dtype= sets that.

    A folder whose weights compressed-tensors, GPTQ, AWQ or "fp8" stored in codes gives a dense model with the values that
    they stand for (`mansu_tl.models.stored`).

    Args:
        source: "pocket", "pocket-fp" or "pocket-never" (embedded in the package), "smollm2-135m" or "gemma3-270m" (real
            models in packages of their own); these names win over folders of the same name: write "./pocket" for a
            folder. A GGUF file or a folder that holds one: the model remembers its file (`mansu_tl.models.gguf`). A
            folder in HF format, a hub id or TransformerLens's short name for one ("gpt2-small"), or an HF model in
            memory, which is copied (a 4-bit one with its packed bytes) and never changed.
        tokenizer: used instead of the one beside the weights. It is copied; a folder without one gives a model with
            `tokenizer` None.
        dtype: cast the weights; by default they keep the checkpoint's own.
        quantized: "nf4" or "fp4" puts bitsandbytes' 4-bit layers in place of the linear ones (blocks of 64; the output
            embedding stays dense).
        device_map: spread the model over devices through accelerate: "auto", "balanced", "balanced_low_0",
            "sequential", or module path -> device. All of it has to fit in them, nothing is offloaded.

    Raises:
        MansuError: no such source, an unsupported architecture, a checkpoint that is broken, incomplete, not finite or
            quantized in another way, or devices that are not there or too small. Only safetensors are read and no
            remote code is run.

    Example:
        >>> model = mtl.load("pocket")
        >>> model.cfg.n_layers
        4
    """
    if quantized is not None:
        quantization_config(quantized, torch.float32)
    target = require_device("device", device)
    if device_map is not None and target != torch.device("cpu"):
        raise MansuError(f"device {str(device)!r}: given beside device_map, which says where everything goes; drop one")
    if dtype is not None and not dtype.is_floating_point:
        raise MansuError(f"dtype {dtype}: weights need a floating dtype; pass torch.float32 or torch.bfloat16")
    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(source, PreTrainedModel):
        name = source.config.name_or_path or type(source).__name__
        if adapter_layer(source) is not None:
            raise MansuError(f"{name}: {way_to_load(source)}")
        family_of(source.config, type(source).__name__, name)
        hf = duplicate(source)
        if not is_four_bit(hf):
            forget_source_format(hf)
        hf = hf if dtype is None else cast(hf, dtype)
        hf = convert(hf, quantized) if quantized is not None and not is_four_bit(hf) else hf
        hf = hf if device_map is None else place(name, hf, device_map)
    elif isinstance(source, str | os.PathLike) and (file := _gguf(source)) is not None:
        name = os.fspath(source)
        hf, its_own = read_model(file, name)
        hf = hf if dtype is None else cast(hf, dtype)
        hf = hf if quantized is None else convert(hf, quantized)
        hf = hf if device_map is None else place(name, hf, device_map)
        tokenizer = tokenizer if tokenizer is not None else its_own
    elif isinstance(source, str | os.PathLike):
        name, where = _locate(source)
        config = _config(name, where)
        hf = _read(name, where, config, _options(name, config, dtype, target, quantized, device_map))
        if dtype is not None and is_four_bit(hf):
            hf = cast(hf, dtype)  # transformers leaves a packed checkpoint in its own
        tokenizer = tokenizer if tokenizer is not None else _tokenizer(name, where)
    elif isinstance(source, TransformerBridge):
        raise MansuError("model: it is hooked already; use it as it is, or mansu_tl.models.rebuild(model) for a copy")
    else:
        raise MansuError(f"model: {way_to_load(source)}")
    require_placed(name, hf)
    if quantized is not None:
        require_kind(hf, quantized, name)
    _require_finite(name, hf)
    if device_map is None:
        if target.type != "cpu":
            require_memory(name, (value for value in hf.parameters() if value.device != target), device=target)
        move: Any = hf.to  # transformers annotates it as taking no device
        hf = move(target)
    return boot(hf, tokenizer, name)


def _options(
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    quantized: str | None,
    device_map: DeviceMap | None,
) -> dict[str, Any]:
    """What `from_pretrained` has to know about dtypes, places and 4-bit layers."""
    family, stored = family_of(config, source=name), stored_kind(config, name)
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if device_map is not None:
        with torch.device("meta"):
            require_map(name, family.model_class(copy.deepcopy(config)), device_map)
        options["device_map"] = device_map
    elif stored is not None or quantized is not None:
        # Otherwise bitsandbytes goes to the GPU where there is one.
        options["device_map"] = {"": str(device)}
    if stored is None and quantized is not None:
        # bitsandbytes keeps the dtype to compute in; `boot` sets it again from the weights as they come.
        options["quantization_config"] = quantization_config(quantized, dtype or torch.float32)
    return options


def embedded_folder(name: str) -> Path:
    """The folder of a model that ships with the package, in Hugging Face format."""
    if name not in EMBEDDED:
        raise MansuError(f"checkpoint {name!r}: not one that is shipped; choose one of {', '.join(EMBEDDED)}")
    return Path(str(resources.files("mansu_tl.models").joinpath("embedded", name)))


def _gguf(source: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a source is: by name, a file, or a folder that holds one and no other weights."""
    name = os.fspath(source)
    if isinstance(source, str) and name in PACKAGED:
        return packaged_file(name)
    place = local(name)
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        if not place.is_file():
            raise MansuError(f"{name}: no such file; pass an existing GGUF file")
        return place
    if not place.is_dir() or any(place.glob("*.safetensors")):
        return None
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1:
        raise MansuError(
            f"{name}: holds {len(files)} GGUF files, {files[0].name} the first; pass the file that you mean"
        )
    return files[0] if files else None


def _locate(source: str | os.PathLike[str]) -> tuple[str, Path | str]:
    """What to call a source, and its folder or, for the hub, its id."""
    name = os.fspath(source)
    if isinstance(source, str) and name in EMBEDDED:
        folder = embedded_folder(name)
        if not folder.is_dir():
            raise MansuError(
                f"embedded model {name!r}: missing from this installation ({folder}); install the package again"
            )
        return name, folder
    folder = local(name)
    if folder.is_dir():
        if (folder / ADAPTER).is_file():
            raise MansuError(f"{name}: {_merge(folder)}")
        if not (folder / "config.json").is_file():
            raise MansuError(f"{name}: this folder has no config.json; pass a folder in Hugging Face format")
        if not any(folder.glob("*.safetensors")):
            raise MansuError(f"{name}: this folder has no .safetensors file; save the model in that format first")
        return name, folder
    if folder.exists():
        raise MansuError(f"{name}: this is a file; pass the folder that holds it")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(name):
        known = ", ".join((*EMBEDDED, *PACKAGED))
        raise MansuError(f"{name}: no such folder; pass an existing folder, a GGUF file, a hub id or one of {known}")
    hub = _hub_id(name)
    if hub == name and (close := difflib.get_close_matches(name.lower(), (*EMBEDDED, *PACKAGED), 1, _MISSPELT)):
        raise MansuError(
            f"{name}: no such folder or model; did you mean {close[0]!r}? A model on the hub is ORGANIZATION/NAME"
        )
    return name, hub


def _hub_id(name: str) -> str:
    """A model's id on the hub: TransformerLens's short names, such as "gpt2-small", stand for one."""
    try:
        return get_official_model_name(name)
    except ValueError:
        return name


def _merge(folder: Path) -> str:
    """How an adapter's folder becomes a model."""
    try:
        base = json.loads(read_text(folder / ADAPTER)).get("base_model_name_or_path") or "BASE"
    except (MansuError, ValueError, AttributeError):
        base = "BASE"
    return (
        f"this folder holds an adapter of {base}, no model; merge it first: peft.PeftModel.from_pretrained("
        f"AutoModelForCausalLM.from_pretrained({base!r}), {str(folder)!r}).merge_and_unload(), and pass what that gives"
    )


@contextmanager
def _reading(name: str, problem: str, way_out: str) -> Iterator[None]:
    """Reading without reports; what goes wrong in it is an error of one line."""
    try:
        with quiet():
            yield
    except MansuError:
        raise
    except _UNREADABLE as error:
        raise MansuError(f"{name}: {problem} ({one_line(error)}); {way_out}") from None


def _config(name: str, where: Path | str) -> PretrainedConfig:
    local_only = isinstance(where, Path)
    meant = "" if local_only or where == name else f" as {where}"
    problem = "config.json cannot be read" if local_only else f"no such folder, and not to be had from the hub{meant}"
    with _reading(name, problem, "check the source"):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, local_files_only=local_only)
    stored_kind(config, name)
    return config


def _read(name: str, where: Path | str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    family = family_of(config, source=name)
    settings, stored = quantization_settings(config), None
    with _reading(name, "the weights cannot be read", "copy or save the model again"):
        if settings is not None and is_read(settings):
            if not isinstance(where, Path):
                raise MansuError(
                    f"{name}: quantized with {settings['quant_method']}; download it (hf download {name} --local-dir DIR) "
                    "and pass the folder"
                )
            asked = options["dtype"]
            dtype: Any = config.dtype or torch.float32 if asked == "auto" else asked
            values, stored = dense_state(where, settings, dtype, name)
            del config.quantization_config
            options = {**options, "state_dict": values, "dtype": dtype}
        loaded: Any = family.model_class.from_pretrained(
            where if stored is None else None,
            config=config,
            use_safetensors=True,
            local_files_only=isinstance(where, Path),
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    hf, info = loaded
    for problem in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key) for key in info[f"{problem}_keys"] if not family.is_old_buffer(str(key)))
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise MansuError(f"{name}: {problem} weight {keys[0]}{more}; config and weights belong to different models")
    if stored is not None:
        hf.config.name_or_path = name
        remember_formats(hf, stored)
    return hf


def _tokenizer(name: str, where: Path | str) -> PreTrainedTokenizerBase | None:
    if isinstance(where, Path) and not any((where / file).is_file() for file in _TOKENIZER_FILES):
        return None
    with _reading(name, "its tokenizer cannot be read", "pass tokenizer="):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=isinstance(where, Path))


def _require_finite(name: str, hf: PreTrainedModel) -> None:
    for key, value in hf.named_parameters():
        if getattr(value, "quant_state", None) is not None or not value.numel():
            continue
        # One pass and no mask of every weight; both ends are NaN where any weight is.
        if not torch.isfinite(torch.stack(value.aminmax())).all():
            raise MansuError(f"{name}: {key} holds NaN or infinity; the checkpoint is broken or its dtype too narrow")
