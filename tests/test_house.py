"""Imports go down only, rooms on one floor do not know each other; heavy packages are not dragged in; the wheel carries every room."""
import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "llmjax"


def floors() -> dict[str, int]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    return {room: int(number) for number, rooms in re.findall(r"^\s{0,8}(\d)\s{1,4}([a-z_ ]+)$", text, re.M) for room in rooms.split()}


def room_of(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: pathlib.Path):
    """Rooms that a file imports, with line numbers."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"llmjax.{a.name}" for a in node.names] if node.module == "llmjax" else [node.module or ""]
        else:
            continue
        yield from ((name.split(".")[1], node.lineno) for name in names if name.startswith("llmjax."))


FILES = [f for f in sorted(PACKAGE.rglob("*.py")) if room_of(f) not in ("__init__", "__main__")]


def test_every_room_stands_on_a_floor():
    assert {room_of(f) for f in FILES} <= set(floors())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file):
    known, here = floors(), room_of(file)
    upward = [f"{file.name}:{line} imports {there}" for there, line in imports(file) if there != here and there != "__version__" and known[there] >= known[here]]
    assert not upward


def test_importing_is_light():
    code = ("import sys, llmjax, llmjax.train, llmjax.decode, llmjax.run\n"
            "heavy = [m for m in ('torch', 'tensorflow', 'transformers', 'tensorflow_datasets', 'matplotlib', 'sentencepiece', 'pyarrow', 'gguf', 'orbax') if m in sys.modules]\n"
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_wheel_carries_every_room():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(f.parent.relative_to(ROOT).parts) for f in PACKAGE.rglob("__init__.py")}
    assert declared == there | {"llmjax.configs"}
