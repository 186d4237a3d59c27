"""Recipes, one file a method: its settings, its objective, its flags. A file that lies here is a method."""

from importlib import import_module
from pkgutil import iter_modules

# The order of tables and of `methods()`; others stand behind these, by name.
_ORDER = (
    "mansu", "mansu_early", "mansu_closed", "ga", "graddiff", "npo", "simnpo", "rmu", "sure", "quail", "ste", "lora",
    "null_space", "random_circuit", "suppressor",
)  # fmt: skip


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER)), name


for _name in sorted((module.name for module in iter_modules(__path__)), key=_place):
    import_module(f"{__name__}.{_name}")
