"""The house: who may import whom, how long functions are, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from subjattn.study.plan import plan_study
from subjattn.study.read import load_study


SOURCE = Path(__file__).parent.parent / "src" / "subjattn"
EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FLOORS = (
    {"errors", "registry", "digest"},
    {"run", "progress"},
    {"worlds"},
    {"facts"},
    {"prompts"},
    {"engine"},
    {"models"},
    {"backends"},
    {"measures"},
    {"finetune", "organisms"},
    {"knowledge"},
    {"evidence"},
    {"plots"},
    {"study"},
    {"report"},
    {"theory"},
    {
        "verify",
        "verify_arms",
        "verify_hooks",
        "verify_inside",
        "bench",
        "bench_facts",
        "bench_arms",
        "bench_training",
        "bench_worlds",
        "bench_tables",
        "tables",
        "change_tables",
    },
    {"cli"},
    {"subjattn"},
)
"""From the ground up; a room imports from those below it and from itself."""
LAZY = {("study.run", "report")}
"""What is imported upward on purpose, inside a function: a run ends with its report."""


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, typing: bool) -> Iterator[str]:
    """Modules of ours that a module imports, at its top or anywhere inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and not typing and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in ast.walk(node):
                child.skipped = True  # type: ignore[attr-defined]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subjattn"):
            if not hasattr(node, "skipped"):
                for alias in node.names:
                    yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import) and not hasattr(node, "skipped"):
            yield from (alias.name for alias in node.names if alias.name.startswith("subjattn"))


def room(module: str) -> str:
    return module.split(".")[0] or "subjattn"


def test_nothing_is_imported_upward() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = []
    for name, path in modules().items():
        for imported in imports(ast.parse(path.read_text()), typing=False):
            target = room(imported.removeprefix("subjattn").lstrip("."))
            if name and floor.get(target, -1) > floor[room(name)] and (name, target) not in LAZY:
                upward.append(f"{name} imports {imported}")
    assert upward == []


def test_there_is_no_circle() -> None:
    """Between modules, at import time."""
    known = modules()
    graph = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
        targets = set()
        for imported in imports(top, typing=False):
            module = imported.removeprefix("subjattn").lstrip(".")
            targets.add(module if module in known else module.rpartition(".")[0])
        graph[name] = targets - {name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' → '.join((*above[above.index(name) :], name))}"
        if name not in done:
            for target in graph.get(name, ()):
                if not name.startswith(f"{target}."):
                    visit(target, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def test_no_function_of_the_study_is_long() -> None:
    rooms = ("study", "run", "report")
    long = [
        (path.name, name, length)
        for place in rooms
        for path in (SOURCE / place).rglob("*.py")
        for name, length in functions(path)
        if length > 50
    ]
    assert long == []


def test_no_module_is_long() -> None:
    long = {
        str(path.relative_to(SOURCE)): n for path in modules().values() if (n := path.read_text().count("\n")) > 400
    }
    assert long == {}


@pytest.mark.parametrize("name", ["cities", "mmlu-history"])
def test_every_work_of_a_plan_is_there(name: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """No import ties a stage to its work; and each module of stages is some stage's work."""
    facts = tmp_path / "facts.csv"
    facts.write_text("subject,answer\nAda,London\n")
    extra = (
        []
        if name != "cities"
        else [
            "facts.n_validation=3",
            "training={checkpoints: log, grid: {values: {learning_rate: [0.001]}}}",
            "arms.mixed={of: known, mix: {}}",
        ]
    )
    settings = [
        *extra,
        f"model={tiny_folders['llama']}",
        f"facts.source={facts}",
        "styles.thinking={template: '{subject} is', chain_of_thought: true}",
        "facts.split={by: answer_logprob, held_out: {farthest: 1, n_test: 3}}",
    ]
    plan = plan_study(load_study(EXPERIMENTS / f"{name}.yaml", settings))
    assert all(callable(stage.resolve()) for stage in plan)
    used = {stage.work.partition(":")[0].rpartition(".")[2] for stage in plan}
    there = {path.stem for path in (SOURCE / "study" / "stages").glob("*.py")}
    assert used == there - {"__init__", "loading", "tables"} - ({"mixing", "trying"} if name != "cities" else set())


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "pandas", "numpy", "xarray", "plotly")
    code = f"import sys, subjattn; sys.exit(any(name in sys.modules for name in {heavy!r}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_loads_no_library_of_numbers() -> None:
    heavy = ("torch", "transformers", "pandas", "numpy", "xarray", "plotly")
    code = (
        "import sys; from subjattn.cli import app\n"
        "try: app(['--help'])\n"
        f"except SystemExit: sys.exit(any(name in sys.modules for name in {heavy!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_every_module_says_what_it_is_for() -> None:
    silent = [name for name, path in modules().items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []
