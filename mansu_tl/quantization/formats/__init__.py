"""Quantizers, one file each: a file that lies here is one, or several of a kind, and registers itself."""

from importlib import import_module
from pkgutil import iter_modules

# The order of tables and of `quantizers()`; others stand behind these, by name.
_ORDER = ("grids", "gptq", "awq", "hqq", "torchao", "compressed", "mxfp4", "int4wo", "gguf", "gguf_k")


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER)), name


for _name in sorted((module.name for module in iter_modules(__path__)), key=_place):
    import_module(f"{__name__}.{_name}")
