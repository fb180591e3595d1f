"""What the README says exists: its commands parse, its configurations resolve, its Python compiles and names what is there, its links lead somewhere, its table is the report's."""
import argparse
import ast
import functools
import importlib
import importlib.util
import json
import pathlib
import re
import shlex

import pytest

from llmjax import cli, settings

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
INDENTED = re.findall(r"^    (.+)$", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S), re.M)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()] + INDENTED
COMMANDS = [words[words.index("llmjax"):] for line in LINES for part in line.split("&&") if "llmjax" in (words := shlex.split(part, comments=True))]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))

BENCHMARK_FLAGS = set(re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / "benchmarks" / "common.py").read_text()))


@functools.cache
def options() -> dict[str, set[str]]:
    """Every verb's flags."""
    verbs = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {verb: {flag for action in parser._actions for flag in action.option_strings} for verb, parser in verbs.choices.items()}


def found(dotted: str):
    """The object that "llmjax.a.b" names. Raises AttributeError."""
    first, *rest = dotted.split(".")
    thing = importlib.import_module(first)
    for name in rest:
        thing = getattr(thing, name)
    return thing


def test_there_is_something_to_check():
    assert len(COMMANDS) > 10 and len(PYTHON) > 3
    assert {words[1] for words in COMMANDS} == set(cli.VERBS), "the tour shows every verb"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands(words):
    overrides, rest = cli.take_overrides(words[1:])
    args = cli.build_parser().parse_args(rest)
    config = getattr(args, "config", None)
    if config and config.startswith("configs/"):
        settings.load(str(ROOT / config), overrides)
    else:
        assert not overrides


def test_inline_names():
    for text in INLINE:
        for flag in re.findall(r"--([a-z][\w.-]*)", text):
            assert flag.startswith("config.") or any("--" + flag in flags for flags in (*options().values(), BENCHMARK_FLAGS)), text
        for dotted in re.findall(r"^(?:llmjax\.)?((?:train|decode|objectives|core|run)\.(?!py$)\w+)", text):
            found("llmjax." + dotted)
        if re.fullmatch(r"[\w./]+/[\w.]+\.(py|md|ipynb|json)", text) and not text.startswith("runs/"):
            assert (ROOT / text).exists(), text
        if text.startswith("--config."):
            settings.load(str(ROOT / "configs/quickstart.py"), [text.removeprefix("--config.")] if "a.b=" not in text else [])


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.strip().splitlines()[0][:40])
def test_python(block):
    tree = ast.parse(block)
    compile(tree, "README.md", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"(llmjax|jax|jnp|optax)(\.\w+)+", name := ast.unparse(node)):
            found(name.replace("jnp.", "jax.numpy."))
        if isinstance(node, ast.ImportFrom) and node.module == "llmjax":
            for alias in node.names:
                assert importlib.util.find_spec(f"llmjax.{alias.name}") or hasattr(importlib.import_module("llmjax"), alias.name)


def test_links():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("benchmarks_report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_reports(report):
    assert report.tables(README) == README, "run python benchmarks/report.py"


def test_the_table_of_a_result(report, tmp_path):
    row = {"what": "a step", "unit": "s", "more_is_better": False, "sides": {"torch float32": 0.9, "llmjax bf16": 0.45}, "ratio": 2.0}
    (tmp_path / "x.json").write_text(json.dumps({"benchmark": "train_step", "rows": [row], "hardware": {"cpu": "a CPU", "cores": 2}, "versions": {"jax": "1"}}))
    made = report.table(report.results(tmp_path))
    assert "On a CPU, 2 cores (jax 1):" in made
    assert "| a step | 0.45 s (bf16) | 0.9 s (torch float32) | 2.00 × |" in made
    with pytest.raises(ValueError, match="twice"):
        report.put("no markers", made)


def test_the_list_of_families_is_whole():
    """docs/families.md is written by benchmarks/families.py, which measures; a family or a size that came later is missing there until it is run again."""
    from llmjax.checkpoint import FAMILIES, PUBLISHED
    text = (ROOT / "docs" / "families.md").read_text()
    missing = [kind for family in FAMILIES.values() for kind in family.model_types if f"`{kind}`" not in text] + [name for name in PUBLISHED if f"{name} (" not in text]
    assert not missing, f"run python benchmarks/families.py (or with --table): {missing}"


def test_what_is_marked_slow_is_there():
    for line in (ROOT / "tests" / "slow.txt").read_text().splitlines()[1:]:
        file, name = line.split("[")[0].split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), line
