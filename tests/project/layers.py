"""The order of the packages, and a reader that finds imports against it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LAYERS = (
    ("errors", "config", "machine", "version"),
    ("layout", "numerics"),
    ("kernels", "transport"),
    ("exchange", "collectives"),
    ("buffer",),
    ("nn", "testing", "compat", "cli", "__main__"),
)
"""Lowest first; imports go down or sideways."""
STRANGERS = frozenset({"kernels", "transport"})
"""Neither sees the other."""
FACE = "__init__"
"""The public face: it may import everything, and only the top layer may import it."""

_LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def violations(package: Path) -> list[str]:
    """Return a sentence for every import in ``package`` that goes up, lazy imports included."""
    return sorted(
        sentence
        for source in package.rglob("*.py")
        for line, target in _imports(source, package)
        if (sentence := _objection(source.relative_to(package), line, target))
    )


def _objection(source: Path, line: int, target: str) -> str | None:
    part = source.parts[0].removesuffix(".py")
    if part == FACE:
        return None
    where = f"{source}:{line}: {part} imports {target}"
    unknown = [name for name in (part, target) if name not in _LEVEL and name != FACE]
    if unknown:
        return f"{where}: {unknown[0]} has no place among the layers; give it one in {Path(__file__).name}"
    if target == FACE:
        return None if _LEVEL[part] == len(LAYERS) - 1 else f"{where}: the public face is above it"
    if part != target and {part, target} <= STRANGERS:
        return f"{where}: neither may see the other"
    return f"{where}, which is above it" if _LEVEL[target] > _LEVEL[part] else None


def _imports(source: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, part of the package) for every import of the package, wherever it stands in the file."""
    for node in ast.walk(ast.parse(source.read_text(), str(source))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, source, package)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == package.name else [base]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == package.name:
                yield node.lineno, _part(rest, package)


def _absolute(node: ast.ImportFrom, source: Path, package: Path) -> str:
    if not node.level:
        return node.module or ""
    inside = (package.name, *source.relative_to(package).parent.parts)
    base = inside[: len(inside) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _part(rest: str, package: Path) -> str:
    """Return the subpackage or module that a dotted name begins with; names that are neither live in the face."""
    first = rest.partition(".")[0]
    known = (package / first).is_dir() or (package / f"{first}.py").is_file()
    return first if first and known else FACE
