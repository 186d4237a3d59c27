"""Pages that mkdocs makes from what lies elsewhere: README, figures, notebooks, the rooms' public names, the CLI.

Nothing is written into the working tree. A page of `docs/` may hold these markers, each on a line of its own:

    <!-- api: mansu_tl.circuit -->            every name of the room's `__all__`, classes first
    <!-- api: mansu_tl.study Study -->        only the names given
    <!-- names: mansu_tl -->                  a table of a package's names, linked to where they are documented
    <!-- cli -->                              every command with its options
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from notebook_pages import notebook_page  # noqa: E402

_MARKER = re.compile(r"^<!-- (api|names|cli):? ?(.*?) ?-->$", re.MULTILINE)
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Put every notebook into the navigation."""
    # A site that is served reads the sources again.
    _tree.cache_clear()
    _file.cache_clear()
    for section in config.nav:
        if "Tutorials" in section:
            section["Tutorials"] = [{_title(path): f"tutorials/{path.stem}.md"} for path in notebooks()]
    config.watch += [str(ROOT / "README.md"), str(ROOT / "notebooks"), str(ROOT / "mansu_tl")]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the landing page, the figures it shows, and a page a notebook."""
    from mkdocs.structure.files import File

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    add("index.md", landing_page())
    for path in sorted((ROOT / "figures").glob("*.png")):
        add(f"figures/{path.name}", path.read_bytes())
    for path in notebooks():
        text, images = notebook_page(path)
        add(f"tutorials/{path.stem}.md", text)
        for name, image in images.items():
            add(f"tutorials/{name}", image)
        add(f"tutorials/{path.name}", path.read_bytes())
    return files


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Expand the markers of a page; its links to the repository become links within the site, as README's."""
    relink = page is not None and page.file.src_uri != "index.md" and "/" not in page.file.src_uri
    return expand(relinked(markdown, "../") if relink else markdown)


def notebooks() -> list[Path]:
    """The notebooks, by number."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def _title(notebook: Path) -> str:
    number, _, words = notebook.stem.partition("_")
    return f"{number} {words.replace('_', ' ')}"


def landing_page() -> str:
    """README, with links to files of the repository turned to pages, or to plain text where there is no page."""
    return relinked((ROOT / "README.md").read_text(encoding="utf-8"))


def relinked(markdown: str, up: str = "") -> str:
    """Links to the repository's figures, notebooks and pages as the site has them, the others as plain text.

    Args:
        up: what leads from the page to the repository's root.
    """

    def changed(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        inside = target.startswith(up) and not re.match(r"[a-z]+:", target)
        if not inside:
            return match[0]
        target = target.removeprefix(up)
        if target.startswith("figures/") and target.endswith(".png"):
            return f"{text}({target})"
        if target.startswith("notebooks/") and target.endswith(".ipynb") and (ROOT / target).is_file():
            return f"{text}(tutorials/{Path(target).stem}.md)"
        if target.startswith("docs/") and target.endswith(".md"):
            return f"{text}({target.removeprefix('docs/')})"
        return text.removeprefix("!").strip("[]")

    return _LINK.sub(changed, markdown)


def expand(markdown: str) -> str:
    """The page with its markers replaced by what they stand for."""

    def expanded(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].split()
        if kind == "cli":
            return _command_line()
        if kind == "names":
            return _table(words[0])
        return "\n\n".join(f"::: {path}" for path in api(words[0], words[1:]))

    return _MARKER.sub(expanded, markdown)


def public_names(package: str) -> list[str]:
    """A package's `__all__`, read without importing it."""
    for node in _tree(package).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    raise ValueError(f"{package}: it has no __all__; name what is to be documented after it")


def api(package: str, names: list[str] | None = None) -> list[str]:
    """Where the public names of a package are defined, as dotted paths; what is itself a package is left out."""
    paths = [defined(package, name) for name in names or public_names(package)]
    return [path for path in paths if not _file(path)]


def defined(package: str, name: str) -> str:
    """The dotted path of a name's definition, followed through the packages that hand it on."""
    for node in _tree(package).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mansu_tl"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    inner = f"{node.module}.{alias.name}"
                    submodule = node.module == package or not _defines(node.module, alias.name)
                    return inner if _file(inner) and submodule else defined(node.module, alias.name)
    return f"{package}.{name}"


def _defines(module: str, name: str) -> bool:
    """Whether a module binds a name itself, so that a submodule of that name does not count."""
    for node in _tree(module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return True
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            return True
    return False


def summary(path: str) -> str:
    """The first line of a definition's docstring."""
    if _file(path):
        return (ast.get_docstring(_tree(path)) or "").split("\n")[0]
    module, _, name = path.rpartition(".")
    for node in _tree(module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n")[0]
    return ""


def _table(package: str) -> str:
    rows = ["| name | what it is |", "|---|---|"]
    for name in public_names(package):
        path = defined(package, name)
        link = f"[`{name}`]({path.rpartition('.')[2]}.md)" if _file(path) else f"[`{name}`][{path}]"
        rows.append(f"| {link} | {summary(path).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def _command_line() -> str:
    from typer.main import get_command

    from mansu_tl.cli import app

    parts = []
    for name, command in sorted(get_command(app).commands.items()):  # type: ignore[attr-defined]
        rows = ["| argument or option | default | what it does |", "|---|---|---|"]
        for parameter in command.params:
            named = parameter.opts + parameter.secondary_opts if parameter.param_type_name == "option" else [
                (parameter.name or "").upper()
            ]  # fmt: skip
            default = "required" if parameter.required else _default(parameter)
            text = (getattr(parameter, "help", "") or "").replace("|", "\\|")
            rows.append(f"| {', '.join(f'`{n}`' for n in named)} | {default} | {text} |")
        parts.append(f"## `mansu-tl {name}`\n\n{(command.help or '').strip()}\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _default(parameter: Any) -> str:
    if parameter.default is None:
        return ""
    if isinstance(parameter.default, bool):
        if parameter.secondary_opts:
            return f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
        return "on" if parameter.default else "off"
    return f"`{parameter.default}`"


@cache
def _file(path: str) -> Path | None:
    place = ROOT.joinpath(*path.split("."))
    for file in (place / "__init__.py", place.with_suffix(".py")):
        if file.is_file():
            return file
    return None


@cache
def _tree(package: str) -> ast.Module:
    file = _file(package)
    if file is None:
        raise ValueError(f"{package}: no such module under {ROOT}")
    return ast.parse(file.read_text(encoding="utf-8"))
