"""Weights in folders: what is written is what is read, nothing is drawn at random, no name leads out of the folder."""

import json
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import MODELS, made, tokens, uninitialised
from torch import Tensor

from etude.errors import Refusal, StorageFault
from etude.model import weights
from etude.model.transformer import Transformer
from etude.text import tokenizer as tok

CHOICES = {
    **{m: [m] for m in MODELS},
    "untied": ["dense", "model.tied=false"],
    "tied v3": ["deepseek_v3", "model.tied=true"],
    "layers": ["dense", "model.attn.window=[3,null]", "model.attn.rope_layers=[true,false]", "model/attn/rope=yarn"],
    "post": ["gpt", "model.norm_at=post", "model.residual_scale=0.5", "model.logit_cap=5.0", "model.embed_scale=2.0"],
}


def names(m: torch.nn.Module) -> dict[str, Tensor]:
    return dict(m.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_model_comes_back(choice: str, tmp_path: Path) -> None:
    """Every parameter bit for bit, what is tied, what is not trained, the settings that have no parameters, and so the
    logits; in evaluation mode."""
    m = made(*CHOICES[choice], dropout=0.5)
    m.save_pretrained(tmp_path / "deep" / "export")
    again = Transformer.from_pretrained(tmp_path / "deep" / "export")
    assert type(again) is Transformer and not again.training and again.node == m.node
    assert names(again).keys() == names(m).keys()
    for name, p in names(m).items():
        found = names(again)[name]
        assert torch.equal(found, p) and found.dtype == p.dtype and found.requires_grad == p.requires_grad, name
        assert found.device.type == "cpu" and isinstance(found, torch.nn.Parameter)
    assert (again.head.weight is again.embed.weight) == (m.head.weight is m.embed.weight)
    assert torch.equal(again(tokens()), m.eval()(tokens()))
    stored = load_file(tmp_path / "deep" / "export" / "model.safetensors")
    assert stored.keys() == {n for n, _ in m.named_parameters()}, "a tied weight is written once"
    again.save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "deep" / "export" / name).read_bytes()


def test_a_model_that_came_back_can_be_trained(tmp_path: Path) -> None:
    """Its parameters are its own: training it changes neither the file nor the model that was saved."""
    m = made("deepseek_v3")
    m.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    again = Transformer.from_pretrained(tmp_path).train()
    scores, aux = again(tokens(), targets=tokens(seed=2))
    (aux.loss.sum() - scores.logprob.sum()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in again.parameters())
    torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(again.embed.weight, m.embed.weight)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(Transformer.from_pretrained(tmp_path)(tokens()), m(tokens()))


@pytest.mark.parametrize("model", ["dense", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_dtypes(model: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """All that is trained, cast as `to` casts it; None keeps the file's; a router's bias stays exact."""
    m = made(model)
    m.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path, dtype=dtype)
    for name, p in m.named_parameters():
        expected = p.to(dtype) if dtype is not None and p.requires_grad else p
        assert names(again)[name].dtype == expected.dtype and torch.equal(names(again)[name], expected), name
    assert (again.head.weight is again.embed.weight) == (m.head.weight is m.embed.weight)
    assert again(tokens()).dtype == torch.float32 and again(tokens()).isfinite().all()
    again.save_pretrained(tmp_path / "half")
    kept = Transformer.from_pretrained(tmp_path / "half")
    assert {n: p.dtype for n, p in names(kept).items()} == {n: p.dtype for n, p in names(again).items()}
    assert torch.equal(kept(tokens()), again(tokens()))


def test_nothing_is_drawn_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither generator moves, init_weights is not called, and no memory is filled to be overwritten."""
    made("moe").save_pretrained(tmp_path)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    monkeypatch.setattr(Transformer, "init_weights", lambda self: pytest.fail("initialised"))
    filled: list[str] = []

    def spied(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(*a: Any, **k: Any) -> Tensor:
            filled.append((a[0] if a else k["tensor"]).device.type)
            return real(*a, **k)

        return spy

    for name in ("kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, name, spied(getattr(torch.nn.init, name)))
    Transformer.from_pretrained(tmp_path)
    assert filled and set(filled) == {"meta"}
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizer = tok.byte([], [])
    made("dense", vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path, tokenizer)
    again = tok.load(tmp_path)
    assert again.sha256() == tokenizer.sha256() and again.eos == tokenizer.eos and again.stop_ids == tokenizer.stop_ids
    assert Transformer.from_pretrained(tmp_path).vocab_size == tokenizer.vocab_size


def test_files_are_readable_as_others_are(tmp_path: Path) -> None:
    """The library makes its files for their owner alone; an export is for others too."""
    made("dense").save_pretrained(tmp_path)
    (tmp_path / "other").write_text("")
    usual = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    for name in ("model.safetensors", "config.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == usual


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFault, match="could not write .*file"):
        made("dense").save_pretrained(tmp_path / "file")


# ---------------------------------------------------------------- shards


def sharded(m: Transformer, folder: Path, n: int = 3) -> dict[str, str]:
    """`m` in n files with an index, as Hugging Face lays them out; -> the file of each tensor."""
    m.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    tensors = weights.model_tensors(m)
    where = {name: f"model-{i % n + 1:05}-of-{n:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(where.values())):
        save_file({k: t for k, t in tensors.items() if where[k] == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return where


@pytest.mark.parametrize("choice", ["dense", "untied", "deepseek_v3"])
def test_shards_with_an_index(choice: str, tmp_path: Path) -> None:
    """The same model; and saved over the shards, the one file counts and not what is left of them."""
    m = made(*CHOICES[choice])
    where = sharded(m, tmp_path)
    assert len(set(where.values())) == 3
    again = Transformer.from_pretrained(tmp_path)
    assert all(torch.equal(p, names(again)[n]) for n, p in names(m).items())
    assert torch.equal(again(tokens()), m(tokens()))
    other = made(*CHOICES[choice], seed=1)
    other.save_pretrained(tmp_path)
    assert torch.equal(Transformer.from_pretrained(tmp_path)(tokens()), other(tokens()))


def test_tensors_one_at_a_time(tmp_path: Path) -> None:
    """`Stored` reads shards and single files, shapes without their data, and scalars."""
    m = made("gpt")
    sharded(m, tmp_path / "shards")
    m.save_pretrained(tmp_path / "one")
    for folder in ("shards", "one"):
        stored = weights.Stored(tmp_path / folder)
        assert set(stored.names()) == {n for n, _ in m.named_parameters()}
        for name, p in m.named_parameters():
            assert stored.shape(name) == tuple(p.shape) and torch.equal(stored.get(name), p)
    save_file({"a": torch.tensor(3.0), "b": torch.zeros(0, 2)}, tmp_path / "model.safetensors")
    stored = weights.Stored(tmp_path)
    assert stored.get("a").item() == 3 and stored.get("a").shape == () and stored.get("b").shape == (0, 2)


# ---------------------------------------------------------------- what is refused


def damage(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def link_out(folder: Path, name: str) -> None:
    """The file `name` moved out of the folder, with a link to it in its place."""
    outside = folder.parent / f"outside-{name}"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


SINGLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no .*config.json"),
    "cut short": (lambda f: damage(f / "model.safetensors", 0.7), "model.safetensors cannot be read"),
    "a header alone": (lambda f: damage(f / "model.safetensors", 0.001), "model.safetensors cannot be read"),
    "empty": (lambda f: damage(f / "model.safetensors", 0.0), "model.safetensors cannot be read"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 99), "model.safetensors cannot be read"),
    "a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "model.safetensors cannot be read",
    ),
    "a link out": (lambda f: link_out(f, "model.safetensors"), "model.safetensors is a link out of its folder"),
    "a config linked out": (lambda f: link_out(f, "config.json"), "config.json is a link out of its folder"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json cannot be read"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json should be a JSON object, it is a list"),
    "hugging face's": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}'),
        "is a Hugging Face model \\(llama\\); first: python convert.py from=",
    ),
    "an older format": (lambda f: rewrite(f / "config.json", lambda c: c.update(format=1)), "has format 1 and this version reads 2"),
    "no vocabulary": (lambda f: rewrite(f / "config.json", lambda c: c.pop("vocab_size")), "config.json"),
    "a foreign target": (
        lambda f: rewrite(f / "config.json", lambda c: c["model"].update(_target_="os.system")),
        "os.system is outside trusted",
    ),
    "a foreign part": (
        lambda f: rewrite(f / "config.json", lambda c: c["model"]["attn"].update(_target_="antigravity.fly")),
        "antigravity.fly is outside trusted",
    ),
    "an unknown argument": (lambda f: rewrite(f / "config.json", lambda c: c["model"].update(dims=3)), "unknown key model.dims"),
    "a missing argument": (lambda f: rewrite(f / "config.json", lambda c: c["model"].pop("dim")), "missing model.dim"),
    "a wrong kind": (lambda f: rewrite(f / "config.json", lambda c: c["model"].update(dim="x")), "model.dim=x should be a whole number"),
    "another width": (lambda f: rewrite(f / "config.json", lambda c: c["model"].update(dim=64)), "the weights do not fit the model"),
    "more layers": (lambda f: rewrite(f / "config.json", lambda c: c["model"].update(n_layers=3)), "blocks.2.* the file has nothing"),
    "fewer layers": (lambda f: rewrite(f / "config.json", lambda c: c["model"].update(n_layers=1)), "it has no blocks.1"),
    "settings that do not fit": (lambda f: rewrite(f / "config.json", lambda c: c["model"]["attn"].update(n_heads=5)), "n_heads=5"),
    "another vocabulary": (lambda f: rewrite(f / "config.json", lambda c: c.update(vocab_size=9)), "embed.weight should be \\(9, 32\\)"),
    "no model": (lambda f: rewrite(f / "config.json", lambda c: c.update(model="dense")), "config.json"),
    "an empty model": (lambda f: rewrite(f / "config.json", lambda c: c.update(model={})), "config.json"),
    "a vocabulary in words": (lambda f: rewrite(f / "config.json", lambda c: c.update(vocab_size="many")), "vocab_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", SINGLE)
def test_folders_that_are_refused(case: str, tmp_path: Path) -> None:
    """One line that names the file and what is wrong with it; nothing is imported or run."""
    folder = tmp_path / "export"
    made("dense").save_pretrained(folder)
    spoil, message = SINGLE[case]
    spoil(folder)
    with pytest.raises(Refusal, match=message) as caught:
        Transformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_config_calls_nothing_but_parts_of_a_model(tmp_path: Path) -> None:
    """A folder from elsewhere may name anything in the trusted package, also what was imported there: none of it may
    write or delete a file. Refused, and the victims are as they were."""
    folder, victim, home = tmp_path / "export", tmp_path / "victim", tmp_path / "home"
    made("dense").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    victim.write_text("precious")
    home.mkdir()
    (home / "thesis").write_text("precious")
    path = {"_target_": "etude.checkpoint.Path", "_args_": [str(home)]}
    evil: list[dict[str, Any]] = [
        {"_target_": "etude.model.weights.save_file", "tensors": {}, "filename": str(victim)},
        {"_target_": "etude.checkpoint.save", "folder": path, "files": {"evil.sh": "rm -rf ~"}},
    ]
    for node in evil:
        changed = config | {"model": config["model"] | {"norm": node}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises((Refusal, TypeError)) as caught:
            Transformer.from_pretrained(folder)
        assert victim.read_text() == "precious" and [p.name for p in home.iterdir()] == ["thesis"], node["_target_"]
        assert caught.type is Refusal


def point(name: str) -> Callable[[Path], object]:
    """The first tensor of the index lies in a file of that name."""

    def change(index: dict) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = name

    return lambda f: rewrite(f / "model.safetensors.index.json", change)


ONE = "model-00001-of-00003.safetensors"
SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "up": (point("../x.safetensors"), r"names a file '../x.safetensors': only plain names"),
    "up and down": (point(f"../export/{ONE}"), "only plain names"),
    "absolute": (point("/etc/passwd"), "names a file '/etc/passwd': only plain names"),
    "a subfolder": (point(f"sub/{ONE}"), "only plain names"),
    "a backslash": (point("..\\x.safetensors"), "only plain names"),
    "itself": (point("."), "only plain names"),
    "its parent": (point(".."), "only plain names"),
    "no name": (point(""), "only plain names"),
    "a number": (point(3), "only plain names"),  # type: ignore[arg-type]
    "a link out": (lambda f: link_out(f, ONE), f"{ONE} is a link out of its folder"),
    "a missing shard": (lambda f: (f / ONE).unlink(), f"{ONE} cannot be read"),
    "a damaged shard": (lambda f: damage(f / ONE, 0.5), f"{ONE} cannot be read"),
    "no map": (lambda f: rewrite(f / "model.safetensors.index.json", lambda i: i.pop("weight_map")), "has no weight_map"),
    "an empty map": (lambda f: rewrite(f / "model.safetensors.index.json", lambda i: i.update(weight_map={})), "has no weight_map"),
    "a map that is a list": (lambda f: rewrite(f / "model.safetensors.index.json", lambda i: i.update(weight_map=["a"])), "has no weight_map"),
    "no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("no"), "index.json cannot be read"),
    "an index linked out": (lambda f: link_out(f, "model.safetensors.index.json"), "index.json is a link out"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDED)
def test_shards_that_are_refused(case: str, tmp_path: Path) -> None:
    """By from_pretrained and by the reader that takes one tensor at a time; what lies outside is whole and would load."""
    folder = tmp_path / "export"
    m = made("dense")
    where = sharded(m, folder)
    first = load_file(folder / next(iter(where.values())))
    for outside in (tmp_path / "x.safetensors", folder / "sub" / ONE):
        outside.parent.mkdir(exist_ok=True)
        save_file(first, outside)
    spoil, message = SHARDED[case]
    spoil(folder)
    with pytest.raises(Refusal, match=message) as caught:
        Transformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(Refusal):
        stored = weights.Stored(folder)
        for name in where:
            stored.get(name)


def test_links_that_stay_are_followed(tmp_path: Path) -> None:
    """To a file beside it; and as Hugging Face's cache lays a model out, to the blobs of the same model."""
    m = made("dense")
    m.save_pretrained(tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").rename(tmp_path / "export" / "real.safetensors")
    (tmp_path / "export" / "model.safetensors").symlink_to("real.safetensors")
    assert torch.equal(Transformer.from_pretrained(tmp_path / "export")(tokens()), m(tokens()))
    cache = tmp_path / "models--someone--model"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    m.save_pretrained(snapshot)
    blobs.mkdir()
    for i, name in enumerate(("model.safetensors", "config.json")):
        (snapshot / name).rename(blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert torch.equal(Transformer.from_pretrained(snapshot)(tokens()), m(tokens()))
    other = tmp_path / "models--someone--other" / "blobs"
    other.mkdir(parents=True)
    (blobs / "0").rename(other / "0")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "0")
    with pytest.raises(Refusal, match="is a link out of its folder"):
        Transformer.from_pretrained(snapshot)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="nothing is not a folder"):
        Transformer.from_pretrained(tmp_path / "nothing")
    made("dense").save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="config.json is not a folder"):
        Transformer.from_pretrained(tmp_path / "config.json")
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refusal, match="pytorch_model.bin may hold code; save the model with safetensors"):
        weights.Stored(tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    """A mixed-up folder names the first parameter that does not fit, also when loading into a model that is there."""
    made("dense").save_pretrained(tmp_path / "dense")
    tensors = weights.tensors(tmp_path / "dense")
    m = uninitialised("gpt")
    with pytest.raises(Refusal, match="the weights do not fit the model: blocks.0.attn.k.bias is only in the model"):
        weights.load_model(m, tensors)
    wide = uninitialised("dense", "model.ffn.hidden=64")
    with pytest.raises(Refusal, match=r"blocks.0.ffn.*weight is \(.*\) in the file and \(.*\) in the model"):
        weights.load_model(wide, tensors)
