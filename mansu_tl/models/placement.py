"""Placing a model on several devices, through accelerate, as transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import check_device_map, get_balanced_memory
from transformer_lens.utilities.multi_gpu import find_misplaced_modules, is_mixed_offload_gpu
from transformers import PreTrainedModel

from mansu_tl.errors import MansuError

DeviceMap = str | dict[str, str | int]
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def require_map(name: str, blank: PreTrainedModel, device_map: DeviceMap) -> None:
    """Refuse a device map that cannot work, before anything is read.

    Args:
        blank: the model on the meta device.
    """
    if isinstance(device_map, str):
        if device_map not in _STRATEGIES:
            raise MansuError(
                f"{name}: device_map={device_map!r} is unknown; use one of {', '.join(_STRATEGIES)} or a dict of "
                'module paths and devices, such as {"": "cpu"}'
            )
        return
    try:
        check_device_map(blank, device_map)
    except ValueError as error:
        raise MansuError(
            f"{name}: device_map leaves modules out ({one_line(error)}); name them, or '' for all"
        ) from None
    for path, device in device_map.items():
        if str(device).lower() in ("disk", "meta"):
            raise MansuError(
                f"{name}: device_map puts {path or 'the model'} on {device}, where weights have no values between "
                "forwards; map it to a device with memory, or pass quantized='nf4'"
            )
        require_device(f"{name}: device_map puts {path or 'the model'} on", device)
    _require_resident(name, device_map)


def require_device(what: str, device: str | int | torch.device) -> torch.device:
    """A device, if tensors can be put there; `what` begins the error where they cannot."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        shown = str(device) if isinstance(device, torch.device) else device
        raise MansuError(f"{what} {shown!r}: not usable here ({one_line(error)}); use 'cpu'") from None


def one_line(error: BaseException) -> str:
    """An error's message on one line, cut short."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def place(name: str, hf: PreTrainedModel, device_map: DeviceMap) -> PreTrainedModel:
    """Spread a model in memory, in place."""
    require_map(name, hf, device_map)
    if isinstance(device_map, str):
        whole = sorted(hf._no_split_modules or ())
        budget: Any = None
        if device_map != "sequential":
            budget = get_balanced_memory(hf, no_split_module_classes=whole, low_zero=device_map == "balanced_low_0")
        where: dict[str, Any] = infer_auto_device_map(hf, max_memory=budget, no_split_module_classes=whole)
    else:
        where = dict(device_map)
    _require_resident(name, where)
    return _dispatched(hf, where)


def placed_as(hf: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights lie where its source's do, made to run there; a source in one place asks for nothing."""
    where = getattr(source, "hf_device_map", {})
    return _dispatched(hf, where) if len({str(device) for device in where.values()}) > 1 else hf


def _dispatched(hf: PreTrainedModel, where: Mapping[str, Any]) -> PreTrainedModel:
    placed: Any = dispatch_model(hf, device_map=dict(where))
    placed.hf_device_map = dict(where)
    return placed


def require_placed(name: str, hf: PreTrainedModel) -> None:
    """Refuse a model that ended up where a bridge cannot use it."""
    _require_resident(name, getattr(hf, "hf_device_map", {}))
    for key, value in hf.named_parameters():
        if value.device.type == "meta":
            raise MansuError(
                f"{name}: {key} was offloaded, the devices are too small for the model; pass quantized='nf4' or dtype="
            )
    for path, wanted, actual in find_misplaced_modules(hf):
        raise MansuError(
            f"{name}: device_map puts {path} on {wanted}, but its weights are tied to ones on {actual}; map both to "
            "the same device"
        )


def _require_resident(name: str, device_map: Mapping[str, Any]) -> None:
    away = [path for path, device in device_map.items() if str(device).lower() in ("cpu", "disk")]
    if "disk" in {str(device).lower() for device in device_map.values()} or is_mixed_offload_gpu(device_map.values()):
        raise MansuError(
            f"{name}: {away[0] or 'the model'} would be offloaded from the GPUs ({len(away)} modules), where its weights "
            "have no values between forwards; pass quantized='nf4', dtype=torch.bfloat16 or more devices"
        )
