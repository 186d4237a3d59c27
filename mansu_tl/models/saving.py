"""Saving: a hooked model becomes a folder in Hugging Face format, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from os import PathLike
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.copies import cast, forget_source_format, plain
from mansu_tl.models.gguf import save_gguf
from mansu_tl.models.quiet import quiet
from mansu_tl.models.tree import Model
from mansu_tl.results.files import local

# What Hugging Face writes into a model folder; anything else in one is somebody's own work.
_OURS = frozenset((".json", ".safetensors", ".txt", ".model", ".jinja"))


@torch_defaults()
def save(model: Model, folder: str | PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Write a model as a folder that `AutoModelForCausalLM.from_pretrained` and `load` read.

    safetensors, config, generation config and the bridge's tokenizer. Bit-exact; tied weights stay tied. The folder
    is written beside its final place and moved there; an earlier model folder is replaced. A name that ends in .gguf is a
    file: see `mansu_tl.models.save_gguf`.

    Args:
        dtype: cast the weights on the way out; by default they keep their own.

    Raises:
        MansuError: the folder holds something else than a model, or cannot be written; weights of several dtypes, or
            weights that the new dtype cannot hold.

    Example:
        >>> model = mtl.load("pocket")
        >>> folder = mtl.save(model, "out/model")
        >>> mtl.load("out/model").cfg.n_layers
        4
    """
    target = local(folder)
    if target.suffix.lower() == ".gguf":
        if dtype is not None:
            raise MansuError(
                f"{target}: dtype={dtype} for a GGUF file, which keeps its own number formats; leave dtype out"
            )
        return save_gguf(model, target)
    _require_replaceable(target)
    hf = plain(model)
    forget_source_format(hf)
    if dtype is not None:
        hf = cast(hf, dtype)
    dtypes = sorted({str(value.dtype) for value in hf.parameters()})
    if len(dtypes) > 1:
        raise MansuError(f"model: weights of several dtypes ({', '.join(dtypes)}); pass dtype= to save them in one")
    tokenizer = model.tokenizer if isinstance(model, TransformerBridge) else None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            written = work / "model"
            with quiet():
                hf.save_pretrained(written, safe_serialization=True)
                if tokenizer is not None:
                    tokenizer.save_pretrained(written)
            _swap(written, target, work / "previous")
        finally:
            shutil.rmtree(work)
    except OSError as error:
        raise MansuError(
            f"{target}: cannot write there ({error.strerror or error}); choose a folder you may write to"
        ) from None
    return target


def _require_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise MansuError(f"{target}: this is a file; choose another folder")
    entries = sorted(target.iterdir())
    if entries and not (target / "config.json").is_file():
        raise MansuError(f"{target}: not empty and no model folder (no config.json); choose another folder")
    for entry in entries:
        if entry.is_dir() or entry.suffix not in _OURS:
            raise MansuError(
                f"{target}: saving would delete {entry.name}, which is no part of a model; choose another folder"
            )


def _swap(written: Path, target: Path, previous: Path) -> None:
    if not target.exists():
        os.replace(written, target)
        return
    try:
        os.replace(target, previous)
        os.replace(written, target)
    finally:
        # Refused or interrupted in between: the earlier model goes back before the work folder is deleted.
        if previous.exists() and not target.exists():
            os.replace(previous, target)
