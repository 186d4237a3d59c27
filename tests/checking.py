"""The package under a run-time type checker: every annotation of every function, axes included, by beartype and jaxtyping.

jaxtyping has an import hook for this too. It makes two checkers for each of the package's two thousand functions when it is
imported (half a minute), again for a function inside a function whenever the outer one is called, and checks arguments
twice: a third of the tests' time. Here a checker is made once a piece of code, when that is first called.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any, get_type_hints

from jaxtyping import TypeCheckError, jaxtyped

_DECORATOR = "__checked__"


class Checker:
    """What arguments and result of one piece of code are held against.

    Annotations are read when the function is defined, as jaxtyping does: one that has no meaning yet allows anything.
    """

    def __init__(self, function: FunctionType) -> None:
        signature = inspect.signature(function)
        # Without the defaults themselves, which would be kept alive.
        self.parameters = [
            each.replace(
                annotation=_meaning(each.annotation, function),
                default=each.empty if each.default is each.empty else None,
            )
            for each in signature.parameters.values()
        ]
        self.result = _meaning(signature.return_annotation, function)
        self.name, self.module, self.qualname = function.__name__, function.__module__, function.__qualname__

    @functools.cached_property
    def arguments_fit(self) -> Callable[..., object]:
        """A function with the parameters to check that does nothing."""
        scope, words, kinds = {}, [], [each.kind for each in self.parameters]
        for i, each in enumerate(self.parameters):
            if (
                each.kind is each.KEYWORD_ONLY
                and each.VAR_POSITIONAL not in kinds
                and each.KEYWORD_ONLY not in kinds[:i]
            ):
                words.append("*")
            scope[f"hint_{i}"] = each.annotation
            stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
            default = "" if each.default is each.empty else " = None"
            words.append(f"{stars}{each.name}: hint_{i}{default}")
            if each.kind is each.POSITIONAL_ONLY and kinds[i + 1 : i + 2] != [each.kind]:
                words.append("/")
        return self._made(f"({', '.join(words)}): pass", scope)

    @functools.cached_property
    def result_fits(self) -> Callable[[object], object] | None:
        """A function that hands its argument on as a result; None where anything may be one."""
        if self.result is Any:
            return None
        return self._made("(result) -> hint: return result", {"hint": self.result})

    def _made(self, rest: str, scope: dict[str, Any]) -> Callable[..., object]:
        exec(compile(f"def {self.name}{rest}", "<checker>", "exec", dont_inherit=True), scope)
        made = scope[self.name]
        made.__module__, made.__qualname__ = self.module, self.qualname
        return _beartype()(made)

    @functools.cached_property
    def axes(self) -> bool:
        """Whether its annotations name axes, which are to be the same ones from the first argument to the result."""
        return any("jaxtyping" in repr(each) for each in (self.result, *(p.annotation for p in self.parameters)))

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's result, with everything checked."""
        __tracebackhide__ = True
        try:
            self.arguments_fit(*args, **kwargs)
        except _violation() as problem:
            raise self.error("parameters", problem) from None
        out = function(*args, **kwargs)
        if self.result_fits is not None:
            try:
                self.result_fits(out)
            except _violation() as problem:
                raise self.error("return value", problem) from None
        return out

    def error(self, what: str, problem: Exception) -> TypeCheckError:
        """What is said of a value that does not fit."""
        return TypeCheckError(
            f"Type-check error whilst checking the {what} of {self.module}.{self.qualname}: {problem}"
        )


# By name too: dataclasses with fields of the same names have equal code.
_checkers: dict[tuple[CodeType, str, str], Checker] = {}


_on = True


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the checker, which draws random numbers: of a long list it looks at one item."""
    global _on
    _on = False
    try:
        yield
    finally:
        _on = True


def checked(value: Any) -> Any:
    """A function, or a dataclass with its `__init__`, under the checker."""
    if inspect.isclass(value):
        if is_dataclass(value) and not hasattr(value.__init__, "__wrapped__"):
            value.__init__ = checked(value.__init__)
        return value
    key = (value.__code__, value.__module__, value.__qualname__)
    checker = _checkers.get(key)
    if checker is None:
        checker = _checkers[key] = Checker(value)

    @functools.wraps(value)
    def inner(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if not _on:
            return value(*args, **kwargs)
        if not checker.axes:
            return checker.call(value, args, kwargs)
        with jaxtyped("context"):
            return checker.call(value, args, kwargs)

    return inner


def _meaning(annotation: Any, function: FunctionType) -> Any:
    if annotation is inspect.Signature.empty:
        return Any

    def holder(value: Any) -> None: ...

    holder.__annotations__["value"] = annotation
    try:
        return get_type_hints(holder, function.__globals__, include_extras=True)["value"]
    except Exception:  # a name for type checkers alone, or of a class that comes later
        return Any


# The process that hands tests out reads this file too, and has no use for half a second of imports.
def _beartype() -> Any:
    from beartype import beartype

    return beartype


@functools.cache
def _violation() -> type[Exception]:
    from beartype.roar import BeartypeCallHintViolation

    return BeartypeCallHintViolation


class _Decorate(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.append(self._decorator(node))  # first: others may change the annotations
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, self._decorator(node))  # last: after @dataclass
        return node

    def _decorator(self, node: ast.AST) -> ast.expr:
        return ast.copy_location(ast.Name(_DECORATOR, ast.Load()), node)


class _Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        tree = _Decorate().visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def path_stats(self, path: str) -> Any:
        raise OSError("neither reads nor writes the code that Python keeps in __pycache__")

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[_DECORATOR] = checked
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """Put a package that is not imported yet under the checker."""
    if package in sys.modules:
        raise RuntimeError(f"{package} was imported before the tests could put it under the type checker")
    sys.meta_path.insert(0, _Finder(package))
