"""The house stands as docs/architecture.md draws it: imports point down, heavy ones come late."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"cli", "swarm", "blocks", "routing"}
MOST_LINES = 400
MOST_FUNCTION_LINES = 50


def _sources(package: str) -> list[Path]:
    path = ROOT / package
    return sorted(path.rglob("*.py")) if path.is_dir() else [ROOT / f"{package}.py"]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _foreign(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _sources(package)
        for name in _imports(path)
        if name.split(".")[0] in forbidden
    ]


def test_routing_imports_the_standard_library_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"routing"}
    found = [
        f"{path.name} imports {name}"
        for path in _sources("routing")
        for name in _imports(path)
        if name.split(".")[0] not in allowed
    ]
    assert not found


def test_blocks_know_no_network() -> None:
    assert not _foreign("blocks", {"trio", "libp2p", "swarm", "routing", "cli"})


def test_nothing_in_swarm_imports_the_command() -> None:
    assert not _foreign("swarm", {"cli"})


def test_nothing_below_the_commands_imports_one() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _sources("swarm")
        for name in _imports(path)
        if name.startswith("swarm.commands") and path.parent.name != "commands"
    ]
    assert not found


def test_only_the_host_imports_libp2p() -> None:
    found = [line for line in _foreign("swarm", {"libp2p"}) if not line.startswith("swarm/host/")]
    assert not found + _foreign("cli", {"libp2p"})


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _runtime_imports(path: Path) -> Iterator[str]:
    """Imports at module level, those for type checkers left out."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_no_import_cycle() -> None:
    modules = {_module_name(path): path for package in OURS for path in _sources(package)}
    graph = {
        name: {other for other in _runtime_imports(path) if other in modules and other != name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize(
    "path", [p for package in sorted(OURS) for p in _sources(package)], ids=str
)
def test_a_file_fits_in_a_head(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            is_command = path.parent.name == "commands"  # its length is that of its options
            assert is_command or lines <= MOST_FUNCTION_LINES, f"{node.name}: {lines} lines"


def _loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return {name.split(".")[0] for name in made.stdout.split()}


def test_the_thin_client_imports_no_torch() -> None:
    loaded = _loaded_after("import swarm.prompt, swarm.host, swarm.gateway.entry")
    assert not loaded & {"torch", "transformers", "bitsandbytes"}


def test_status_and_help_import_neither_libp2p_nor_torch_nor_trio() -> None:
    loaded = _loaded_after("import cli, swarm.commands.app, swarm.status, swarm.console")
    heavy = {"torch", "transformers", "libp2p", "trio", "numpy", "starlette", "h11"}
    assert not loaded & heavy
