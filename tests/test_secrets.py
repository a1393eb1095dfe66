"""Secrets that are about while a run is made: they are found nowhere under runs/."""

import json
import os
from pathlib import Path

import pytest
from running import ROOT, run_in, tiny, train

from etude import redact

ENVIRONMENT = {
    "MY_TOKEN": "planted-env-1",
    "AWS_SECRET_ACCESS_KEY": "planted/env+2",
    "WANDB_API_KEY": "planted-env-3",
    "HF_TOKEN": "planted-env-4",
    "DATABASE_URL": "postgres://me:planted-env-5@db/x",
}
FORMS = ["sk-planted0123456789ab", "ghp_planted0123456789abcdef", "hf_planted0123456789abcdef", "AKIAPLANTED012345678"]

TRACKER = """
class Leaky:
    def __init__(self, *, api_key: str, url: str, timeout: float = 5.0):
        self.api_key, self.url, self.timeout = api_key, url, timeout

    def open(self, folder, config, start_step):
        import os
        raise OSError(f"{self.url} refused {self.api_key}, {os.environ['MY_TOKEN']}, {os.environ['AWS_SECRET_ACCESS_KEY']}")
"""

LOSS = """
import os
from etude.strategy.seq import Seq

class Fails(Seq):
    def __init__(self, *, secret: str):
        super().__init__(label_smoothing=0.0, z_loss=0.0)
        self.secret = secret

    def loss(self, model, ref, batch):
        raise RuntimeError(f"https://me:planted-in-url-2@host/x said no to {self.secret} and {os.environ['HF_TOKEN']} and %s")
"""


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Overrides with secrets in them, and parts that quote them in what they raise."""
    (tmp_path / "conf" / "tracker").mkdir(parents=True)
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "leaky.py").write_text(TRACKER)
    (tmp_path / "fails.py").write_text(LOSS % FORMS[1])
    (tmp_path / "conf" / "tracker" / "leaky.yaml").write_text(
        "leaky:\n  _target_: leaky.Leaky\n  api_key: x\n  url: https://me:planted-in-url-3@host/x?token=planted-in-url-4\n"
    )
    (tmp_path / "conf" / "strategy" / "fails.yaml").write_text("_target_: fails.Fails\nsecret: planted-in-file\n")
    overrides = tiny(tmp_path, max_steps=2, eval_every="null", save_every="null")
    return [
        f"--config-dir={tmp_path / 'conf'}",
        *[o for o in overrides if not o.startswith("tracker")],
        "trusted=[etude,leaky,fails]",
        "tracker=leaky",
        "tracker.leaky.api_key=planted-override-1",
        f"sample_prompts=[a {FORMS[0]},{FORMS[2]}]",
    ]


def environment(tmp_path: Path) -> dict[str, str]:
    return ENVIRONMENT | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{tmp_path}"}


def clean(folder: Path) -> int:
    """-> how many files were looked into, binary ones too."""
    secrets = [b"planted", *(form.encode() for form in FORMS)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert not any(secret.lower() in content.lower() for secret in secrets), (path, content[:3000])
    assert not any("planted" in str(path) for path in folder.rglob("*"))
    return len(files)


def test_no_secret_lands_in_a_run(tmp_path: Path, given: list[str]) -> None:
    """Environment, overrides, config files, command line, tokens by their form, and what an error quotes of them: not even
    in the output, which a sweep would keep."""
    done = train(*given, **environment(tmp_path))
    run = run_in(tmp_path / "runs")
    assert clean(tmp_path / "runs") > 20
    assert "planted" not in done.stdout + done.stderr and "tracker leaky failed" in done.stderr
    assert "<redacted>" in (run / "meta" / "overrides").read_text()
    assert "tracker.leaky.api_key=<redacted>" in (run / "meta" / "command").read_text()


def test_nor_in_one_that_fails(tmp_path: Path, given: list[str]) -> None:
    """The traceback in status.json and summary.txt, and on standard error."""
    done = train(*given, "strategy=fails", "strategy.secret=planted-override-2", check=False, **environment(tmp_path))
    run = run_in(tmp_path / "runs")
    assert done.returncode == 1 and "said no to" in done.stderr
    error = json.loads((run / "status.json").read_text())["error"]
    assert "RuntimeError: https://host/x said no to <redacted> and <redacted> and <redacted>" in error
    clean(tmp_path / "runs")
    assert "planted" not in done.stdout + done.stderr


def test_nor_in_a_sweep(tmp_path: Path, given: list[str]) -> None:
    """Hydra writes a multirun.yaml with every override, and jobs have their output kept."""
    done = train(
        "-m", *given, "hydra/launcher=basic", "tag=x", "seed=0", check=False, cwd=tmp_path, **environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert clean(tmp_path / "runs") > 20


def test_a_tag_that_is_a_secret_is_refused(tmp_path: Path) -> None:
    done = train(*tiny(tmp_path), f"tag={FORMS[2]}", check=False)
    assert done.returncode == 2 and "looks like a secret" in done.stderr and not (tmp_path / "runs").exists()


def test_what_is_redacted_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact.redact({"a": {"api_key": "x", "password": 12, "token": ["y"], "max_tokens": 5, "tokenizer": "z", "auth": None}}) == {
        "a": {"api_key": "<redacted>", "password": "<redacted>", "token": ["<redacted>"], "max_tokens": 5, "tokenizer": "z", "auth": None}
    }  # fmt: skip
    for name in (
        "secret_key", "signing_key", "api_keys", "passwords", "db.pwd", "authorization", "accessToken", "dbPassword", "clientSecret"
    ):  # fmt: skip
        assert redact.redact({name: "abcdef"}) == {name: "<redacted>"}, name
        assert redact.redact_override(f"+x={{n: 1, {name}: abcdef}}") == f"+x={{n: 1, {name}: <redacted>}}"
    for name in ("max_tokens", "keys", "key", "author", "pad_tokens", "secretary", "tokenPath", "n_keys"):
        assert redact.redact({name: "abcdef"}) == {name: "abcdef"}, name
    for text, wanted in {
        "https://user:pw@host/x.git": "https://host/x.git",
        "https://user:p@w@host/x.git and ssh://git@host/y": "https://host/x.git and ssh://host/y",
        "http://h/x?a=1&access_token=abc&b=2": "http://h/x?a=1&access_token=<redacted>&b=2",
        "Authorization: Bearer abcdefghijkl0123": "Authorization: Bearer <redacted>",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nrest": "<redacted>\nrest",
        "git@github.com:me/x.git 1.5 task-specific hf_hub": "git@github.com:me/x.git 1.5 task-specific hf_hub",
    }.items():
        assert redact.scrub(text) == wanted
    for text, wanted in {
        "+tracker.wandb.api_key=abc": "+tracker.wandb.api_key=<redacted>",
        "+tracker.x={api_key: abc, n: 1}": "+tracker.x={api_key: <redacted>, n: 1}",
        "+tracker.x={\"password\":'a b', n: 1}": '+tracker.x={"password":<redacted>, n: 1}',
        "seed=1": "seed=1",
        "strategy.max_tokens=5": "strategy.max_tokens=5",
    }.items():
        assert redact.redact_override(text) == wanted
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "correct horse")
    assert redact.scrub("said: correct horse!") == "said: <redacted>!"
    assert redact.has_secret("password = 'abcdefgh'") and not redact.has_secret(
        "token = tokens[0]; pad_token = '<pad>'"
    )
