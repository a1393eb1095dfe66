"""The notebooks run from top to bottom on real runs, without a word on stderr."""

import json
from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import pytest

from etude import analysis

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_valid_and_hold_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id


def execute(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Run a notebook in a kernel of its own -> what its cells show, by mime type."""
    monkeypatch.setenv("ETUDE_RUNS", str(runs))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(ROOT / "notebooks" / name, 4)
    nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o.text for o in outputs if o.get("name") == "stderr"]
    return [{"text/plain": o.text} if o.output_type == "stream" else dict(o.data) for o in outputs]


def text(outputs: list[dict]) -> str:
    return "\n".join(o.get("text/html", o["text/plain"]) for o in outputs)


def test_compare_runs(tiny: list[str], tmp_path: Path, etude_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ("seed=0", "seed=1"):
        done = etude_run(*tiny, change)
        assert done.returncode == 0, done.stdout + done.stderr
    runs = analysis.load_runs(tmp_path / "runs")
    for row in runs.to_dict("records"):  # what the folders of today's train.py say
        last = json.loads((Path(row["run"]) / "status.json").read_text())["metrics"]
        assert (row["status"], row["step"], row["tokens"], row["unreadable"]) == ("completed", 6, last["tokens"], "")
        assert row["val/full_loss"] == last["val/full_loss"] and row["best_val_loss"] <= row["val/loss"]
    assert analysis.varying(runs) == ["config.seed"]

    both = execute("compare_runs.ipynb", tmp_path / "runs", monkeypatch)
    shown = text(both)
    assert "2 runs, 2 of them completed" in shown and "sample/0, step 6" in shown
    assert all(name in o for name in runs["name"] for o in (shown, text(both[1:2])))
    assert len([o for o in both if "image/png" in o]) == 1
    assert f"{runs['val/full_loss'].mean():.4f}" in text(both[-1:]), "the seeds' mean"

    one = execute("compare_runs.ipynb", Path(runs["run"][0]), monkeypatch)
    assert runs["name"][0] in text(one) and "It takes two runs to compare" in text(one)


def test_compare_runs_with_a_run_that_only_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/began").mkdir(parents=True)
    (tmp_path / "runs/began/status.json").write_text('{"status": "running"}')
    outputs = execute("compare_runs.ipynb", tmp_path / "runs", monkeypatch)
    assert "began" in text(outputs) and any("image/png" in o for o in outputs)
