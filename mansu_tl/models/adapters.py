"""LoRA adapters: a folder that peft wrote, merged into the weights of the model that it was trained on."""

from __future__ import annotations

from importlib.util import find_spec
from os import PathLike, fspath

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.errors import MansuError
from mansu_tl.models.copies import boot, plain
from mansu_tl.models.loading import ADAPTER
from mansu_tl.models.placement import one_line
from mansu_tl.models.quiet import quiet
from mansu_tl.results.files import local

_WEIGHTS = "adapter_model.safetensors"


def is_adapter(source: object) -> bool:
    """Whether a source is the folder of an adapter."""
    return isinstance(source, str | PathLike) and (local(source) / ADAPTER).is_file()


def merged(base: TransformerBridge, folder: str | PathLike[str]) -> TransformerBridge:
    """A new bridge: the base with an adapter's change in its weights; the base is untouched.

    Raises:
        MansuError: peft is not installed, the adapter has no weights, or it does not fit the base.
    """
    name, place = fspath(folder), local(folder)
    if not (place / _WEIGHTS).is_file():
        raise MansuError(f"{name}: an adapter's folder without {_WEIGHTS}; save the adapter in that format first")
    if find_spec("peft") is None:
        raise MansuError(f"{name}: this folder holds an adapter, and peft merges it; pip install peft")
    import peft

    try:
        with quiet():
            whole = peft.PeftModel.from_pretrained(plain(base), str(place)).merge_and_unload()
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise MansuError(
            f"{name}: the adapter does not fit {base.cfg.model_name} ({one_line(error)}); give the base that it was "
            "trained on"
        ) from None
    return boot(whole, base.tokenizer, name)
