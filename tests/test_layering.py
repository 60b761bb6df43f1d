"""The house's own rules, held by tests: who imports whom, and what else; what is packaged, how long files are."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "cli": {"daemon"},
    "daemon": {"offload", "models", "partition", "comm", "kernels"},
    "offload": {"models", "kernels", "partition"},
    "models": {"kernels", "partition"},
    "partition": set(),
    "comm": set(),
    "kernels": set(),
}
CLI_VOCABULARY = {"comm.messages", "comm.errors"}  # the structs and errors that daemon.client speaks in
IN_TORCH = {"kernels/attention_reference.py", "kernels/reference.py"}  # and with it 140 MB of memory
MAX_LINES = 400


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names below `shoal` that a module imports, relative imports resolved."""
    package = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("shoal.") for alias in node.names if alias.name.startswith("shoal.")
            }
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                found.add(".".join([*base, *(node.module or "").split(".")]).rstrip("."))
            elif node.module and node.module.startswith("shoal."):
                found.add(node.module.removeprefix("shoal."))
            elif node.module == "shoal":
                found |= {alias.name for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    """What a module imports from anywhere, at its top or later."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in whole | parts}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    for path in modules(room):
        for name in imports(path):
            target = name.split(".")[0]
            if room == "cli" and name in CLI_VOCABULARY:
                continue
            assert target == room or target in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_reference_kernels_use_torch() -> None:
    paths = {str(path.relative_to(ROOT)): path for room in ALLOWED for path in modules(room)}
    assert {name for name, path in paths.items() if "torch" in packages(path)} == IN_TORCH
    others = ["shoal." + name.removesuffix(".py").replace("/", ".") for name in paths.keys() - IN_TORCH]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {others!r}]; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "False"


def test_packages_match_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = [
        p
        for room in ALLOWED
        for p in [ROOT / room, *(ROOT / room).rglob("*/")]
        if (p / "__init__.py").exists()
    ]
    assert sorted(listed) == sorted("shoal." + ".".join(p.relative_to(ROOT).parts) for p in set(rooms))


@pytest.mark.parametrize("room", ALLOWED)
def test_modules_open_with_a_docstring_and_stay_short(room: str) -> None:
    for path in modules(room):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"
        assert text.count("\n") <= MAX_LINES, f"{path.relative_to(ROOT)} is too long"
