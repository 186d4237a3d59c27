"""A study's settings, from Python or from a TOML file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from mansu_tl.data.sources import beside
from mansu_tl.errors import MansuError, near
from mansu_tl.models.loading import EMBEDDED
from mansu_tl.registry import import_plugins
from mansu_tl.results.files import local, read_text
from mansu_tl.study.plan import Cell, Plan
from mansu_tl.unlearning import methods

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class StudyConfig(Plan):
    """What a study runs.

    Attributes:
        model: an embedded name, a folder, or a hub id.
        task: a task file, an embedded name, or another source (`load_task`): "tofu:FOLDER".
        methods: unlearning methods, in the order of the tables.
        quantizers: what each edited model is quantized with.
        never: a model that never learnt the forget facts, as a reference for CAD; "" = none.
        also: further models on which the same methods and questions are run, for comparison.
        seed: of everything random.
        faithfulness: target of the circuit.
        steps: EAP-IG steps.
        settings: per method, the settings that differ from its defaults.
        plugins: modules that register what is used here, imported by name in every process.
        device: where the models are, "cpu" or "cuda"; on Ray each cell then gets a GPU of its own.

    Example:
        >>> config = mtl.study.StudyConfig(model="pocket", methods=("mansu", "npo"), quantizers=("nf4", "int8"))
        >>> print(config.to_toml().splitlines()[2])
        methods = ["mansu", "npo"]
    """

    model: str = "pocket"
    task: str = "pocket"
    methods: tuple[str, ...] = ("mansu", "graddiff", "npo", "quail")
    quantizers: tuple[str, ...] = ("nf4",)
    never: str = ""
    also: tuple[str, ...] = ()
    seed: int = 0
    faithfulness: float = 0.85
    steps: int = 5
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    device: str = "cpu"
    what, what_bases = "config", "config: model and also"
    unique = ("methods", "quantizers", "also")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.faithfulness <= 1:
            raise MansuError(f"config: faithfulness={self.faithfulness}; choose a target in (0, 1]")

    def __hash__(self) -> int:
        return hash(self.digest())

    @property
    def bases(self) -> tuple[str, ...]:
        """The model, and those beside it."""
        return (self.model, *self.also)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every model as it is, then every method on it."""
        edits = [Cell(base, method, self.seed, method) for method in self.methods for base in self.bases]
        return (*self._controls(self.seed), *edits)

    def folder_of(self, base: str) -> str:
        """The model's results lie in the results folder itself, those of others below it."""
        return "." if base == self.model else f"also/{self.names[base]}"

    def to_toml(self) -> str:
        """The config as TOML, as `read` takes it."""
        lines = [f"{f.name} = {_toml(getattr(self, f.name))}" for f in fields(self) if f.name != "settings"]
        for method, values in self.settings.items():
            lines += ["", f"[{method}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, path: str | PathLike[str]) -> StudyConfig:
        """Read a TOML file; a table named after a method holds its settings. Paths are relative to the file.

        Raises:
            MansuError: no such file, not TOML in UTF-8, an unknown key or a value of the wrong type.
        """
        source = local(path)
        if not source.exists():
            raise MansuError(f"{source}: no such config file; write one (docs/commands.md shows an example)")
        try:
            raw = tomllib.loads(read_text(source))
        except tomllib.TOMLDecodeError as error:
            raise MansuError(f"{source}: not TOML ({error})") from None
        known = {f.name: f for f in fields(cls) if f.name != "settings"}
        import_plugins(_checked(source, "plugins", raw.get("plugins", []), ("my_package.my_method",)))
        values: dict[str, Any] = {}
        settings: dict[str, dict[str, Any]] = {}
        for key, value in raw.items():
            if isinstance(value, dict) and key in methods():
                settings[key] = value
            elif key in known:
                values[key] = _checked(source, key, value, getattr(cls(), key))
            else:
                names = (*known, *methods())
                raise MansuError(f"{source}: unknown key {key!r}; known keys are {', '.join(names)}{near(key, names)}")
        model = values.get("model", cls().model)
        if "task" not in values and model not in EMBEDDED:
            raise MansuError(
                f"{source}: model = {model!r} without a task; the default task is that of the embedded models, so give "
                'task = "FILE.jsonl" (mansu-tl new DIR writes one)'
            )
        for key in ("model", "never"):
            values[key] = _beside(source, values.get(key, getattr(cls(), key)))
        values["task"] = beside(values.get("task", cls().task), source.parent)
        values["also"] = tuple(_beside(source, name) for name in values.get("also", ()))
        return cls(**values, settings=settings)


def _checked(source: Path, key: str, value: Any, like: Any) -> Any:
    wanted = (
        "a list of strings"
        if isinstance(like, tuple)
        else {str: "a string", int: "a whole number", float: "a number"}[type(like)]
    )
    if isinstance(like, tuple):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif isinstance(like, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is type(like):
        return value
    raise MansuError(f"{source}: {key} = {value!r} should be {wanted}, like {like!r}")


def _beside(source: Path, name: str) -> str:
    """A relative path that exists beside the config file, else the name as it is (embedded name, hub id, path)."""
    candidate = source.parent / name
    return str(candidate.resolve()) if name and candidate.exists() else name


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)
