"""The rules of the house, checked on the syntax tree: layers, side effects, sizes."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "engine", "export", "runtime", "benchmarks", "training")
# room -> rooms it may import. tests and examples use the installed package and are not listed.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "export": {"export", "engine", "kernels", "runtime"},
    "runtime": {"runtime", "engine", "kernels"},
    "benchmarks": {"benchmarks", "runtime", "engine", "kernels", "training"},
    "training": {"training", "engine", "kernels"},
}
# Training reads CLIP image tokens where Stage I does. The tower is the runtime's, so that training feeds the model what
# inference does; the tasks take it as an argument, and the command line, which puts parts together, alone names it.
ALSO = {("training/cli.py", "runtime.encoders.ClipVisionEncoder")}
FILE_LINES, FUNCTION_LINES = 400, 80
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def is_cli(path: Path) -> bool:
    return path.name == "cli.py" or path.name.startswith("cli_")


def relative_imports(path: Path) -> list[tuple[tuple[str, ...], int]]:
    """(dotted parts below the package root, line) of every relative import in a file."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                found.append(((*base, *module, alias.name), node.lineno))
    return found


def names_used(tree: ast.AST) -> list[tuple[str, int]]:
    """Dotted names that a file reads or calls, such as ``os.environ``, with their lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.append((node.id, node.lineno))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append((f"{node.value.id}.{node.attr}", node.lineno))
    return found


def test_there_is_something_to_check():
    assert {room_of(path) for path in SOURCES} >= {"kernels", "engine", "runtime"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path: Path):
    room = room_of(path)
    for parts, line in relative_imports(path):
        target = parts[0]
        if target not in ROOMS:
            assert target == "__version__", f"{path}:{line} imports {'.'.join(parts)}"
            continue
        if (path.relative_to(ROOT).as_posix(), ".".join(parts)) in ALSO:
            continue
        assert target in MAY_IMPORT[room], f"{path}:{line} {room} imports {target}"
        if room == "export" and target == "runtime":
            assert parts[1].startswith("backend_"), f"{path}:{line} export may import only runtime/backend_*"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(n.split(".")[0] == "swifti2v" for n in names), f"{path}:{node.lineno} import relatively"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_a_cli_prints_exits_or_reads_the_environment(path: Path):
    if is_cli(path):
        return
    banned = {"print", "exit", "quit", "sys.exit", "os._exit", "os.environ", "os.getenv", "sys.argv"}
    for name, line in names_used(ast.parse(path.read_text())):
        assert name not in banned, f"{path}:{line} uses {name}; that belongs in a cli file"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_engine_and_kernels_open_no_files(path: Path):
    if room_of(path) not in ("engine", "kernels") or path.name == "weights.py":
        return
    opens = {"open", "safe_open", "load_file", "torch.load", "torch.save", "save_file"}
    for name, line in names_used(ast.parse(path.read_text())):
        assert name not in opens, f"{path}:{line} uses {name}; engine/weights.py alone opens files"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES, f"{path} has {lines} lines, the cap is {FILE_LINES}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_folders_below_the_root_are_namespace_packages():
    found = [p for p in ROOT.rglob("__init__.py") if p.parent != ROOT and ".venv" not in p.parts]
    found = [p for p in found if not {".typing", "build"} & set(p.relative_to(ROOT).parts)]
    assert not found


def test_the_root_holds_one_python_file():
    assert [p.name for p in ROOT.glob("*.py")] == ["__init__.py"]


def test_every_room_is_packaged():
    text = (ROOT / "pyproject.toml").read_text()
    for room in ROOMS:
        if any((ROOT / room).glob("*.py")):
            assert f'"swifti2v.{room}"' in text, f"{room} is missing from packages in pyproject.toml"


def test_the_package_is_imported_once():
    """A second copy under another name would register the kernels' ops again, which takes the first copy's away."""
    import swifti2v  # noqa: F401

    copies = [name for name in sys.modules if name.endswith("kernels.modulation")]
    assert copies == ["swifti2v.kernels.modulation"]
