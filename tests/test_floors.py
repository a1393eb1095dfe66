"""The house's floors (design.md): imports point down only, and bad input never waits for torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

# Longest prefix wins.
FLOORS = {
    "etude": 0,  # the version alone
    "etude.errors": 0,
    "etude.redact": 0,
    "etude.manifest": 0,
    "etude.signature": 0,
    "etude.config": 0,
    "etude.cli": 0,
    "etude.text": 0,
    "etude.schedule": 0,
    "etude.model.parts": 0,
    "etude.model": 1,
    "etude.data": 1,
    "etude.optim": 2,
    "etude.parallel": 2,
    "etude.checkpoint": 2,
    "etude.lora": 2,
    "etude.interop": 2,
    "etude.infer": 2,
    "etude.strategy": 3,
    "etude.reward": 3,
    "etude.eval": 3,
    "etude.git": 4,
    "etude.run": 4,
    "etude.sweep": 4,
    "etude.track": 4,
    "etude.trackers": 4,
    "etude.display": 4,
    "etude.window": 4,
    "etude.loop": 4,
    "etude.memory": 4,
    "etude.initial": 4,
    "etude.analysis": 4,
    "etude.bench": 4,
    "etude.bench_data": 4,
    "etude.bench_engine": 4,
    "etude.bench_steps": 4,
    "etude.bench_trl": 4,
    "etude.diagnosis": 4,
    "etude.inspection": 4,
    "etude.training": 4,
    "etude.reproduce": 4,
    "etude.replay": 4,
    "etude.tuning": 4,
    "etude.saving": 4,
    "etude.summary": 4,
    "etude.preparing": 4,
    "etude.preview": 4,
    "etude.scaling": 4,
    "etude.serve": 4,
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((SRC / "etude").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names imported anywhere in `tree`, in functions too. `from etude.model import parts` is etude.model.parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}: write it out"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def floor(name: str) -> int:
    parts = name.split(".")
    known = [".".join(parts[:n]) for n in range(len(parts), 1, -1)]
    found = next((FLOORS[k] for k in known if k in FLOORS), FLOORS.get(name) if name == "etude" else None)
    assert found is not None, f"{name} has no floor: add it to FLOORS"
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    """A part that reaches up cannot be read, tested or replaced by itself."""
    for other in imports(tree(name)):
        if other.split(".")[0] == "etude":
            assert floor(other) <= floor(name), f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"


def test_no_module_imports_itself_through_others() -> None:
    """Cycles within one floor would pass the rule above."""
    below = {n: {o for o in imports(tree(n)) if o in MODULES and o != n} for n in MODULES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(below[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_config_knows_only_errors() -> None:
    """conf points at code by string: a typo must be refused before any part is imported."""
    light = {"etude.errors", "etude.redact", "etude.signature", "etude.config"}
    for name in [*light, "etude.cli"]:
        assert {o for o in imports(tree(name)) if o.startswith("etude")} <= light, name


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("etude.model")])
def test_model_knows_neither_processes_nor_inference(name: str) -> None:
    for other in imports(tree(name)):
        assert not other.startswith(("torch.distributed", "etude.infer", "etude.parallel")), other
    source = MODULES[name].read_text(encoding="utf-8")
    assert "torch.distributed" not in source


def test_scripts_are_thin() -> None:
    """Scripts compose, build and call: they import the way in at the top, one function inside, and hold no logic."""
    for path in ROOT.glob("*.py"):
        script = ast.parse(path.read_text(encoding="utf-8"))
        top = {o for node in script.body if isinstance(node, (ast.Import, ast.ImportFrom)) for o in imports(node)}
        assert top == {"etude.cli"}, path.name
        assert len(path.read_text().splitlines()) < 50, path.name
        assert not any(isinstance(n, (ast.For, ast.While, ast.ClassDef, ast.Try)) for n in ast.walk(script)), path.name


def test_checks_and_data_do_not_import_torch() -> None:
    """torch takes a second or more to import: what runs before it must not pull it in, by any path."""
    light = [
        "cli",
        "config",
        "errors",
        "text.tokenizer",
        "data.text",
        "data.rows",
        "data.stored",
        "data.mixture",
        "data.order",
        "schedule",
        "parallel",
        "run",
        "training",
        "preparing",
    ]
    code = "import sys\n" + "".join(
        f"import etude.{name}\nassert 'torch' not in sys.modules, 'etude.{name} imports torch'\n" for name in light
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
