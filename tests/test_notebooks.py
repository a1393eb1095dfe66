"""The notebooks run from top to bottom on real runs, without a word on stderr."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest
from running import run_in, tiny, train
from test_post_training import ROLLOUTS
from test_post_training import tiny as tiny_rows
from test_scaling import equal_flops, folders, rates

from etude import analysis

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_valid_and_hold_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id


def read(name: str, settings: dict[str, str]) -> nbformat.NotebookNode:
    """A notebook, with `settings` in place of lines of its first cell, as a reader would type them."""
    notebook = nbformat.read(ROOT / "notebooks" / name, 4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for key, value in settings.items():
        (line,) = [line for line in first.source.splitlines() if line.startswith(f"{key} = ")]
        first.source = first.source.replace(line, f"{key} = {value}")
    return notebook


def execute(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> list[dict]:
    """Run a notebook in a kernel of its own -> what its cells show, by mime type."""
    monkeypatch.setenv("ETUDE_RUNS", str(runs))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = read(name, settings)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o.text for o in outputs if o.get("name") == "stderr"]
    return [{"text/plain": o.text} if o.output_type == "stream" else dict(o.data) for o in outputs]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[Callable[..., tuple[str, int]]]:
    """`here(name, runs, **settings)`: a notebook once more in this process, where torch is imported already -> (what it
    prints, how many figures it draws)."""

    def run(name: str, runs: Path, **settings: str) -> tuple[str, int]:
        monkeypatch.setenv("ETUDE_RUNS", str(runs))
        plt.close("all")
        capsys.readouterr()
        names: dict = {}
        for cell in read(name, settings).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, cell.id, "exec"), names)
        return capsys.readouterr().out, len(plt.get_fignums())

    yield run
    plt.close("all")


def text(outputs: list[dict]) -> str:
    return "\n".join(o.get("text/html", o["text/plain"]) for o in outputs)


def figures(outputs: list[dict]) -> int:
    return len([o for o in outputs if "image/png" in o])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a dense and of a sparse model, in a folder each."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        for kind, choices in {"dense": [], "sparse": ["model=moe", "model/attn=mla"]}.items():
            changes = {"seed": seed, "runs_dir": folder / "runs" / kind, "sample_every": 3}
            settings = tiny(folder, **changes)
            if kind == "sparse":
                settings = [s for s in settings if "n_kv_heads" not in s]
            train(*choices, *settings)
    return folder / "runs"


def test_compare_runs(trained: Path, here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = analysis.load_runs(trained / "dense")
    for row in runs.to_dict("records"):  # what the folders of today's train.py say
        last = json.loads((Path(row["run"]) / "status.json").read_text())["metrics"]
        assert (row["status"], row["step"], row["tokens"], row["unreadable"]) == ("completed", 6, last["tokens"], "")
        assert row["val/full_loss"] == last["val/full_loss"] and row["best_val_loss"] <= row["val/loss"]
    assert analysis.varying(runs) == ["config.seed"]

    both = execute("compare_runs.ipynb", trained / "dense", monkeypatch)
    shown = text(both)
    assert "2 runs, 2 of them completed" in shown and "sample/0, step 6" in shown
    assert all(name in o for name in runs["name"] for o in (shown, text(both[1:2])))
    assert figures(both) == 1
    assert f"{runs['val/full_loss'].mean():.4f}" in text(both[-2:-1]), "the seeds' mean"
    assert "Nothing to compare: these runs differ in the seed at most" in text(both[-1:])

    one, drawn = here("compare_runs.ipynb", Path(runs["run"][0]))
    assert runs["name"][0] in one and "It takes two runs to compare" in one and drawn == 1
    assert "Nothing to compare: these runs differ in the seed at most" in one


def test_compare_runs_of_two_arms(trained: Path, here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part is `compare` in words, as a table and as a figure; an arm of one seed is refused in a line."""
    result = analysis.compare(trained, "model")
    outputs = execute("compare_runs.ipynb", trained, monkeypatch)
    assert result.sentences()[0] in text(outputs) and "moe" in result.sentences()[0] and figures(outputs) == 2
    assert f"{result.table['difference'][0]:.4f}" in text(outputs)
    few = [str(p) for p in (*trained.glob("dense/2*"), run_in(trained / "sparse"))]
    said, drawn = here("compare_runs.ipynb", trained, RUNS=repr(few), BY='"model/attn"')
    assert "Nothing to compare: mla has one seed" in said and drawn == 1


def test_compare_runs_with_a_run_that_only_began(tmp_path: Path, here: Callable) -> None:
    (tmp_path / "runs/began").mkdir(parents=True)
    (tmp_path / "runs/began/status.json").write_text('{"status": "running"}')
    said, drawn = here("compare_runs.ipynb", tmp_path / "runs")
    assert "began" in said and drawn == 1 and "Nothing to compare" in said


def test_inspect_model(trained: Path, here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dense and of a sparse model: the newest run is taken, or the one named; a long text is cut."""
    newest = execute("inspect_model.ipynb", trained, monkeypatch)
    assert analysis.load_runs(trained)["name"].iloc[-1].partition("/")[2] in text(newest)
    assert figures(newest) == 3 and "layer 1: entropy" in text(newest), "maps, lens and router load"
    run = run_in(trained / "dense")
    said, drawn = here("inspect_model.ipynb", trained, RUN=repr(str(run)), TEXT='"on a mat " * 9')
    assert f"step_00000006 of {run.name}" in said and "32 tokens: o | n | ·" in said
    assert drawn == 2 and "This model has no experts" in said


def test_read_samples(trained: Path, tmp_path: Path, here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text of samples.jsonl is there, beside its other steps; rollouts of GRPO with their rewards; new texts."""
    settings = ["batch_size=4", "seed=0", *ROLLOUTS.split(), "max_steps=2", "sample_every=1", "eval_every=null"]
    train("strategy=grpo", *tiny_rows(tmp_path / "runs", *settings))
    outputs = execute("read_samples.ipynb", tmp_path / "runs", monkeypatch, **{"PROMPT, CHAT": '"2 + 2?", True'})
    shown, texts = text(outputs), analysis.samples(run_in(tmp_path / "runs"))
    assert set(texts["step"]) == {1, 2} and shown.count("<th>step 1</th><th>step 2</th>") == 2
    rewarded = texts[texts["text"].str.contains(r"\(reward -?[0-9.]+\)$")]
    assert len(rewarded) and shown.count("(reward ") == len(rewarded) and figures(outputs) == 1
    assert "--- temperature 0.8" in shown and "2 + 2?" not in shown, "of a chat the answer alone"

    said, drawn = here("read_samples.ipynb", trained / "dense")
    assert ": 2 texts at 2 steps" in said and "drew no completions" in said and not drawn
    assert "--- temperature 0.0\nthe " in said


def test_scaling(tmp_path: Path, here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws and transfer of synthetic sweeps whose truth is known; without enough runs, what is lacking."""
    sweeps = tmp_path / "runs/sweeps"
    folders(sweeps / "20260101_000000_isoflop", equal_flops(3, 0.002), {"params": "model.dim"})
    keys = {"mup": "model.mup", "width": "model.dim", "lr": "optimizer.lr", "seed": "seed"}
    folders(sweeps / "20260101_000001_lr_transfer", rates(3, seeds=2, lrs=5), keys)
    outputs = execute("scaling.ipynb", tmp_path / "runs", monkeypatch)
    shown = text(outputs)
    assert "24 runs of 24 sizes" in shown and figures(outputs) == 4
    assert "N_opt = " in shown and "size_exponent" in shown and "with 1e+20 FLOPs" in shown
    assert "muP      from width 64 to 256 the best rate is multiplied by" in shown
    few = repr([str(p) for p in sorted((sweeps / "20260101_000000_isoflop").glob("*"))[:5]])
    said, drawn = here("scaling.ipynb", tmp_path / "runs", ISOFLOP=few, RATES='f"{RUNS}/none"')
    assert "Not yet: the power laws need 3 budgets" in said and "8 runs or more" in said and drawn == 1
    assert "there is no such folder" in said
