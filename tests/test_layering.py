"""The house's own rules, held by tests: who imports whom, and what else; what is packaged, how large rooms are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "cli": {"client", "daemon"},
    "client": {"comm"},
    "daemon": {"engine", "offload", "models", "partition", "comm", "kernels", "devices"},
    "engine": {"offload", "models", "partition", "kernels"},
    "offload": {"models", "kernels", "partition"},
    "models": {"kernels", "partition"},
    "devices": {"kernels", "partition"},
    "partition": set(),
    "comm": set(),
    "kernels": {"partition"},  # of it the numbers that kernels fix and plans count with
}
# How amounts are said, how JSON is measured, what the client speaks in, and where it finds the daemon.
CLI_VOCABULARY = {
    "partition.amounts",
    "models.json_bounds",
    "comm.messages",
    "comm.cluster_messages",
    "comm.sampling_limits",
    "comm.errors",
    "comm.home",
}
# What these folders may know of the rest of their room.
INNER = {
    "comm/group": {"comm.errors", "comm.key_files", "comm.log_rate"},
    "daemon/server": {"daemon.backend", "daemon.errors"},
    "daemon/library": {
        "daemon.config",
        "daemon.errors",
        "daemon.memory",
        "daemon.model_name",
        "daemon.private_files",
        "daemon.progress",
        "daemon.error_codes",
    },
    "engine/learn": set[str](),
}
IN_TORCH = {  # and with it 140 MB of memory
    "devices/cuda_device.py",
    "devices/torch_kernels.py",
    "devices/in_triton/triton_kernels.py",
    "devices/in_triton/triton_looks.py",
    "kernels/attention_reference.py",
    "kernels/reference.py",
}
IN_TRITON = {
    f"devices/in_triton/triton_{name}.py" for name in ("attention", "kernels", "linears", "looks", "weights")
}
OPTIONS_OF_OTHERS = {
    "daemon/library/package.py",
    "daemon/cluster/routes/surroundings.py",
}  # of pip, of tools of the system
MAX_LINES = 400
MAX_MODULES = 20


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def everywhere() -> list[Path]:
    return [path for room in ALLOWED for path in modules(room)]


def dotted(path: Path) -> str:
    """The module's name below `shoal`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
            base: str | None = None
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *(node.module or "").split(".")]).rstrip(".")
            elif node.module and node.module.startswith("shoal."):
                base = node.module.removeprefix("shoal.")
            elif node.module == "shoal":
                found |= {alias.name for alias in node.names}
            if base is not None:
                below = [f"{base}.{alias.name}" for alias in node.names]
                found |= {name if name in NAMES else base for name in below}
    return found


NAMES = {dotted(path) for path in everywhere()}


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
            if room == "kernels" and target == "partition":
                assert name == "partition.memory_layout", f"{path.relative_to(ROOT)} imports {name}"
            assert target == room or target in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("folder", INNER)
def test_folders_of_a_room_know_little_of_each_other(folder: str) -> None:
    room, own = folder.split("/")[0], folder.replace("/", ".")
    for path in modules(folder):
        for name in imports(path):
            inside = not name.startswith(room + ".") or name == own or name.startswith(own + ".")
            assert inside or name in INNER[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {dotted(path): imports(path) & NAMES - {dotted(path)} for path in everywhere()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("room", ["engine", "client"])
def test_rooms_that_are_libraries_bring_no_daemon(room: str) -> None:
    code = f"import shoal.{room}, sys; print([m for m in sys.modules if m.split('.')[1:2] in (['daemon'], ['cli'])])"
    names = [name for name in NAMES if name.split(".")[0] == room]
    code = f"import importlib; [importlib.import_module('shoal.' + n) for n in {names!r}]; {code}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_only_the_reference_kernels_and_devices_use_torch() -> None:
    paths = {str(path.relative_to(ROOT)): path for path in everywhere()}
    assert {name for name, path in paths.items() if "torch" in packages(path)} == IN_TORCH
    assert {name for name, path in paths.items() if "triton" in packages(path)} == IN_TRITON
    others = ["shoal." + dotted(path) for name, path in paths.items() if name not in IN_TORCH | IN_TRITON]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {others!r}]"
    code += "; print('torch' in sys.modules, 'triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "False False"


def texts(path: Path) -> list[str]:
    """All strings in a module."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_only_the_command_line_knows_its_options() -> None:
    """Others name settings as the API does (`daemon.errors`), and `cli.wording` puts the option there."""
    option = re.compile(r"(?<![\w-])--[a-z]")
    paths = [path for path in everywhere() if path.relative_to(ROOT).parts[0] != "cli"]
    found = {str(path.relative_to(ROOT)) for path in paths if any(map(option.search, texts(path)))}
    assert found - OPTIONS_OF_OTHERS == set()


def test_packages_match_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({"shoal." + dotted(path.parent / "__init__.py") for path in everywhere()})


@pytest.mark.parametrize("room", ALLOWED)
def test_modules_open_with_a_docstring_and_stay_short(room: str) -> None:
    for path in modules(room):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"
        assert text.count("\n") <= MAX_LINES, f"{path.relative_to(ROOT)} is too long"


def test_folders_stay_small_and_names_tell_modules_apart() -> None:
    paths = [path for path in everywhere() if path.name != "__init__.py"]
    for folder, count in Counter(path.parent for path in paths).items():
        assert count <= MAX_MODULES, f"{folder.relative_to(ROOT)} has {count} modules"
    stems = Counter(path.stem for path in paths if path.stem != "errors")  # each room has its own errors
    assert {stem: n for stem, n in stems.items() if n > 1} == {}


def test_the_bench_is_as_tidy() -> None:
    paths = [path for path in (ROOT / "bench").rglob("*.py") if ".venv" not in path.parts]
    for folder, count in Counter(path.parent for path in paths).items():
        assert count <= MAX_MODULES, f"{folder.relative_to(ROOT)} has {count} modules"
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"
        assert text.count("\n") <= MAX_LINES, f"{path.relative_to(ROOT)} is too long"


def test_no_two_modules_give_one_name_to_two_things() -> None:
    """Of public classes, types and constants; names of one's own, such as `_F32`, mislead nobody."""
    owners: dict[str, set[str]] = {}
    for path in everywhere():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names: list[str] = []
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                if name[0].isupper() and len(name) > 1:
                    owners.setdefault(name, set()).add(dotted(path))
    assert {name: sorted(found) for name, found in owners.items() if len(found) > 1} == {}


def test_tests_lie_as_the_rooms_do() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    own = {"", ".", "bench"}
    assert [f for f in folders if str(f) not in own and not (ROOT / f / "__init__.py").exists()] == []
    for folder, count in Counter(path.parent for path in (ROOT / "tests").rglob("*.py")).items():
        assert count <= MAX_MODULES, f"{folder.relative_to(ROOT)} has {count} modules"


RUNS_BYTES = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "multiprocessing",
}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
LOADERS = {"torch", "np", "numpy", "yaml"}  # whose `load` may open a pickle
IMPORTS_BY_NAME = {"models/child_main.py": {"__import__"}}  # a module of ours, as the parent names it


def test_nothing_that_comes_in_can_be_code() -> None:
    """No pickle and nothing like it, from files or from the network."""
    for path in everywhere():
        name = str(path.relative_to(ROOT))
        assert packages(path) & RUNS_BYTES == set(), f"{name} imports what opens pickles"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id=called)):
                    assert called not in RUNS_TEXT - IMPORTS_BY_NAME.get(name, set()), (
                        f"{name} runs what it reads"
                    )
                case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr="load")):
                    assert owner not in LOADERS, f"{name} loads what may be a pickle"
                case ast.keyword(arg="allow_pickle"):
                    pytest.fail(f"{name} allows pickles")
