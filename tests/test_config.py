"""The config: every choice fits its constructor, every mistake is one line that says what to type, before torch."""

import copy
import dataclasses
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from etude.cli import TEXT_KEYS, flags_first, quote
from etude.config import CONF, Train, build, check, check_all, check_targets, nodes
from etude.errors import Refusal
from etude.signature import fits, signature

ROOT = CONF.parent


def composed(script: str, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(script, overrides=list(overrides))


# ---------------------------------------------------------------- conf/ as it is


def test_every_choice_composes_passes_and_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument that only the code knows could not be overridden without `+`, nor be found in a run's config."""
    made = []

    def recorded(script: str, overrides: list[str]):
        made.append((script, overrides, compose(script, overrides)))
        return made[-1][2]

    monkeypatch.setattr(hydra, "compose", recorded)
    assert check_all() == []
    assert len(made) == len(list(CONF.rglob("*.yaml")))
    for script, overrides, cfg in made:
        parts = list(nodes(OmegaConf.to_container(cfg)))
        for path, node in parts:
            wanted = {p.name for p in signature(node["_target_"]).params.values() if p.keyword_only}
            assert {k for k in node if not k.startswith("_")} == wanted, (script, overrides, path)
        assert len(parts) > 5 or script != "train", (script, overrides)


def test_self_comes_first_in_the_roots() -> None:
    """Else a group's or an experiment's value would be overruled by the root's."""
    assert yaml.safe_load((CONF / "train.yaml").read_text())["defaults"][0] == "_self_"
    cfg = composed("train", "experiment=shakespeare_char")
    assert (cfg.model.dim, cfg.batch_size, cfg.tokenizer._target_) == (384, 64, "etude.text.tokenizer.char")


def test_parts_of_the_model_are_partial() -> None:
    """A part that is built once and not once a layer would be shared by all layers without a word. A rope may be: it is
    a frozen dataclass of numbers, without weights or state."""
    for model in sorted(p.stem for p in (CONF / "model").glob("*.yaml")):
        cfg = composed("train", f"model={model}")
        for path, node in nodes(OmegaConf.to_container(cfg.model)):
            if path == "attn.rope":
                found = build(node)
                assert dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen  # type: ignore[attr-defined]
                assert all(isinstance(v, (int, float, str, type(None))) for v in vars(found).values())
            else:
                assert node.get("_partial_") is True, path


# ---------------------------------------------------------------- what a user mistypes

BAD = {
    ("stategy=seq",): "unknown key stategy; did you mean strategy?",
    ("model.attn.n_head=4",): "unknown key model.attn.n_head; did you mean model.attn.n_heads?",
    ("optimizer.lr=fast",): "optimizer.lr=fast should be a number",
    (
        "model.dim=100",
        "model.attn.n_heads=3",
    ): "dim=100 is not divisible by n_heads=3; set model.attn.n_heads to a divisor",
    ("data=text", "data.path=nowhere"): "data.path=nowhere does not exist .*; give a file, a folder or a glob",
    ("data.path=nowhere",): r"unknown key data.path; .*\(path belongs to data=bin, .*shakespeare, text\)",
    ("data=text",): "data.path is missing: type data.path=<a file, a folder or a glob>",
    ("model=dence",): "model has no choice 'dence'; did you mean dense?",
    ("model/attn=mqqa",): "model/attn has no choice 'mqqa'; did you mean mqa?",
    ("model=llama/2b",): "model/llama has no choice '2b'; there is: 13b, 1b, 3b, 70b",
    ("model=moe", "model.ffn.top_k=9"): "top_k=9 should be between 1 and n_experts=8; set model.ffn.top_k",
    ("model=deepseek_v3", "model.ffn.top_k=2"): "unknown key model.ffn.top_k",
    ("+foo=1",): "unknown key foo",
    ("~optimizer.lr",): "missing optimizer.lr: etude.optim.adamw needs it; type optimizer.lr=<value>",
    (
        "+tracker.x._target_=os.system",
    ): r"tracker.x._target_=os.system is outside trusted=\[etude\]; add its package: trusted=\[etude,os\]",
    (
        "+tracker.x._target_=etude.trackers.tensorboard.TensorBord",
    ): "there is no etude.trackers.tensorboard.TensorBord; did you mean etude.trackers.tensorboard.TensorBoard?",
    ("+optimizer.nesterov=true",): "unknown key optimizer.nesterov",
    ("tokenizer=file", "tokenizer.path=nope.json"): "there is no tokenizer file nope.json",
    ("model.dim=[1",): "",
}


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `torch` cannot be imported."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "torch.py").write_text("raise ImportError('torch was imported')\n")
    return folder


@pytest.mark.parametrize("overrides", BAD, ids=" ".join)
def test_mistakes_are_one_line(
    overrides: tuple[str, ...], etude_run, no_torch: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Exit code 2, one line on stderr with the remedy, nothing on stdout, no torch, no run's folder."""
    more = ["data=text", f"data.path={tiny_text}"] if any(o.startswith("tokenizer") for o in overrides) else []
    done = etude_run(*overrides, *more, f"runs_dir={tmp_path}/runs", before=no_torch)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert re.search(BAD[overrides].replace("?", r"\?"), lines[0]), lines[0]
    assert done.stdout == "" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve", "model=gpt"]])
def test_help_is_quick(flags: list[str], etude_run, no_torch: Path) -> None:
    """The groups and every key, without torch. Seconds of the processor: neighbours make a clock's longer."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    begun = spent()
    done = etude_run(*flags, before=no_torch)
    assert done.returncode == 0 and done.stderr == "" and spent() - begun < 4
    shown = yaml.safe_load(done.stdout) if flags[0] == "--cfg" else None
    if shown is None:
        assert (
            re.search("^model: .*dense.*gpt", done.stdout, re.M)
            and "weight_decay: " in done.stdout
            and "Try:" in done.stdout
        )
    else:
        assert shown["model"]["pos"] == ("learned" if "model=gpt" in flags else "rope")
        assert shown.keys() >= {f.name for f in dataclasses.fields(Train)}


def test_generate_says_what_is_missing(etude_run, no_torch: Path) -> None:
    done = etude_run(script="generate.py", before=no_torch)
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["error: ckpt is missing: type ckpt=<runs/<run>, a checkpoint folder or an export>"],
    )


@pytest.mark.parametrize(
    "override,message",
    [
        ("max_steps=null", "nothing says when to stop"),
        ("batch_size=-1", "batch_size=-1 should be above 0"),
        ("eval_every=0", r"eval_every=0 should be above 0 \(null: never\)"),
        ("clip=0", "clip=0"),
        ("keep=1", "keep=1 is too few"),
        ("tag=a/b", "tag=a/b becomes part of a folder's name"),
        ("micro_batch_size=1000003", r"batch_size=\d+ is not a multiple of micro_batch_size=1000003"),
        ("seed=true", "seed=true should be a whole number"),
        ("max_steps=1.5", "max_steps=1.5 should be a whole number or null"),
        ("precision=fp16", "precision=fp16 should be one of auto, fp32, bf16"),
        ("sample_prompts=def", "sample_prompts=def should be a list of texts"),
        ("sample_prompts=[a,1]", r"sample_prompts=\[a,1\] should be a list"),
        ("model.pos=learned", "pos=learned and a rotary attention"),
        ("model.pos=absolute", "model.pos=absolute should be one of rope, learned, sinusoidal"),
        ("model.n_layers=0", "n_layers=0 should be at least 1"),
        ("model.attn.n_kv_heads=1009", r"n_heads=\d+ is not divisible by n_kv_heads=1009"),
        ("model.attn.head_dim=7", "head_dim=7 is odd"),
        ("model.tied=1", "model.tied=1 should be true or false"),
        ("model.attn=null", "model.attn=null should be a part with a _target_"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9 should be a list of numbers"),
        ("model.dim=${nothing}", "config: model.dim: Interpolation key 'nothing' not found"),
    ],
)
def test_values_that_do_not_fit(override: str, message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        check(composed("train", override), "train")
    assert "\n" not in str(caught.value)


def test_every_key_of_every_part_is_guarded() -> None:
    """Each argument of each part, misspelt or (where it has no default) left out, is found and named: nothing filters or
    translates keys."""
    plain = check(composed("train"), "train")
    parts = {k: v for k, v in plain.items() if isinstance(v, dict)}
    checked = 0
    for path, node in nodes(parts):
        for key in [k for k in node if not k.startswith("_")]:
            required = signature(node["_target_"]).params[key].required
            for change in ("misspell", "drop") if required else ("misspell",):
                broken = copy.deepcopy(parts)
                there = dict(nodes(broken))[path]
                value = there.pop(key)
                if change == "misspell":
                    there[key[:-1] + "q" + key[-1]] = value
                with pytest.raises(
                    Refusal, match="did you mean" if change == "misspell" else f"missing {path}.{key}"
                ) as caught:
                    check_targets(broken, ["etude"])
                assert f"{path}.{key}" in str(caught.value)
                checked += 1
    assert checked > 60


def test_trusted_is_a_prefix_of_whole_names() -> None:
    """`etude_evil` does not begin with the package `etude`."""
    for target in ("etude_evil.part", "os.system", "builtins.eval", 3, "etudex"):
        with pytest.raises(Refusal, match="outside trusted"):
            check_targets({"x": {"deep": [{"_target_": target}]}}, ["etude"])
    check_targets({"x": {"_target_": "fractions.Fraction", "_partial_": True}}, ["etude", "fractions"])


# ---------------------------------------------------------------- reading sources


def test_signatures_are_read_without_importing() -> None:
    """torch.optim.AdamW's arguments, through two re-exports, with torch not loaded; an own module runs no code."""
    code = (
        "import sys; from etude.signature import signature\n"
        "s = signature('torch.optim.AdamW'); p = s.params\n"
        "assert list(p)[:3] == ['params', 'lr', 'betas'] and p['fused'].keyword_only and p['params'].required and not p['lr'].required\n"
        "assert 'n_kv_heads' in signature('etude.model.gqa.GQA').params\n"
        "assert not {'torch', 'etude.model', 'etude.model.gqa'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somepackage").mkdir()
    (tmp_path / "somepackage" / "__init__.py").write_text("from .inner import Kept as Renamed\nraise SystemExit\n")
    (tmp_path / "somepackage" / "inner.py").write_text(
        "import dataclasses\n"
        "class Base:\n    def __init__(self, dim, *, width: int, **rest): ...\n"
        "class Kept(Base): pass\n"
        "@dataclasses.dataclass(kw_only=True)\nclass Data:\n    a: int\n    b: str = 'x'\n"
        "@dataclasses.dataclass(kw_only=True)\nclass More(Data):\n    c: float\n"
        "def f(x, /, y, z=1, *, k, d=2): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def facts(target: str) -> tuple:
        s = signature(target)
        return [(p.name, p.required, p.keyword_only) for p in s.params.values()], s.open

    kept = ([("dim", True, False), ("width", True, True)], True)
    assert facts("somepackage.Renamed") == facts("somepackage.inner.Kept") == kept
    assert facts("somepackage.inner.More") == ([("a", True, True), ("b", False, True), ("c", True, True)], False)
    assert facts("somepackage.inner.f")[0] == [
        ("x", True, False), ("y", True, False), ("z", False, False), ("k", True, True), ("d", False, True)
    ]  # fmt: skip
    for absent in ("somepackage.inner.Keep", "somepackage.nothing.f", "nowhere.f", "f"):
        with pytest.raises(Refusal, match=f"there is no {absent}"):
            signature(absent)


@pytest.mark.parametrize(
    "annotation,good,bad",
    [
        ("int", [0, -3], [1.0, True, "1", None, [1]]),
        ("float", [0, 1.5, float("inf")], [True, "1", None]),
        ("bool", [True, False], [1, 0, "true", None]),
        ("str", ["", "a"], [1, None, ["a"], True]),
        ("int | None", [1, None], [1.5, "x", False]),
        ("Literal['a', 'b'] | None", ["a", None], ["c", 1]),
        ("list[str]", [[], ["a"]], ["a", [1], None]),
        ("list[float] | None", [[1, 2.5], None], [["a"], 1.0]),
        ("dict", [{}, {"a": 1}], [1, "a", [1], None]),
        ("Callable[[int], Any]", [{"_target_": "x"}], ["x", 1, None]),
    ],
)
def test_fits(annotation: str, good: list, bad: list) -> None:
    assert [v for v in good if not fits(v, annotation)] == []
    assert [v for v in bad if fits(v, annotation)] == []


# ---------------------------------------------------------------- prompts hold any character

TEXTS = [
    "def ", "it's", "'", '"', "\\", "\\'", "a\\\\", "a\\", "${x}", "\\${x}", "$", "$${a}", "{a: 1}", "[1, 2]", "a,b,c", "a=b", " = ",
    "x\ny\n", "\n", " leading and trailing  ", "# not a comment", "true", "1e5", "~", "%", "日本 👍", "(1)", "a:b", "???x", "${oc.env:HOME}",
    '"Well," he said, "no."', "'tis so, 'twas so'", "'\\'",
]  # fmt: skip


def through_grammar(text: str) -> object:
    """As Hydra does it: parse the override, set the value, resolve."""
    override = OverridesParser.create().parse_override(quote("prompt=" + text))
    return OmegaConf.to_container(OmegaConf.create({"prompt": override.value()}), resolve=True)["prompt"]  # type: ignore[index,call-overload]


def test_prompts_hold_any_character() -> None:
    """Known traps through Hydra as a whole, random ones through its grammar."""
    for text in TEXTS:
        cfg = check(composed("generate", "ckpt=x", quote("prompt=" + text)), "generate")
        assert cfg["prompt"] == text
    rng = random.Random(0)
    pieces = [*"'\"\\\\${},[]()=:# \n\tabé👍~*@", "${x}", "${", "\\", "\\'"]
    for _ in range(800):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        if re.fullmatch(r"""(?s)'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""", text):
            continue  # quoted already
        assert through_grammar(text) == text, repr(text)


def test_quoted_and_null_stay_as_they_are() -> None:
    assert through_grammar("null") is None
    assert (
        through_grammar("'null'") == "null"
        and through_grammar('"a b"') == "a b"
        and through_grammar("'it\\'s'") == "it's"
    )
    for other in ("model.dim=3", "--help", "-m", "seed=0,1", "~tracker", "+data.path", "optimizer.betas=[0.9,0.95]"):
        assert quote(other) == other
    assert "data.path" in TEXT_KEYS and quote("data.path=a b,c") == "data.path='a b,c'"


def test_flags_may_stand_anywhere() -> None:
    assert flags_first(["a=1", "-m", "+b=2", "--cfg", "job", "~c"]) == ["-m", "--cfg", "job", "a=1", "+b=2", "~c"]
