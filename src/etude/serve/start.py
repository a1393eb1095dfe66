"""What serve.py does first: everything that can be refused before the model is loaded."""

import os
from pathlib import Path

from etude.errors import Refusal
from etude.serve.address import bind

INSIDE = ("artifacts", "checkpoints", "export", "best", "last")  # folders of a run


def run(cfg: dict) -> int:
    """-> exit code."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise Refusal(f"serve.py needs {error.name}: pip install fastapi uvicorn prometheus-client") from None
    check_settings(cfg)
    keys = read_keys(cfg)
    template = read_template(cfg["chat_template"])
    listener = bind(cfg["host"], cfg["port"], keys)
    try:
        from etude.serve.process import listen

        return listen(cfg, name_of(cfg), keys, template, listener)
    finally:
        listener.close()


def check_settings(cfg: dict) -> None:
    for name in ("max_n", "max_body_mb", "body_timeout", "request_timeout"):
        if cfg[name] is not None and cfg[name] <= 0:
            raise Refusal(f"{name}={cfg[name]} should be above 0")
    if cfg["drain_seconds"] < 0:
        raise Refusal(f"drain_seconds={cfg['drain_seconds']} should be at least 0")
    if not 0 <= cfg["port"] <= 65535:
        raise Refusal(f"port={cfg['port']} should be between 0 (any that is free) and 65535")


def read_keys(cfg: dict) -> list[str]:
    """From the config, ETUDE_API_KEYS (with commas between them) and a file (one a line)."""
    keys = [*cfg["keys"], *os.environ.get("ETUDE_API_KEYS", "").split(",")]
    if cfg["key_file"] is not None:
        try:
            keys += Path(cfg["key_file"]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"key_file={cfg['key_file']} cannot be read: {error}") from None
        if not any(k.strip() for k in keys):
            raise Refusal(f"key_file={cfg['key_file']} holds no key; write one a line")
    return [k.strip() for k in keys if k.strip()]


def read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"chat_template={path} cannot be read: {error}; give a file with a Jinja template") from None


def name_of(cfg: dict) -> str:
    """served_name, else the name of the run's folder."""
    if cfg["served_name"]:
        return cfg["served_name"]
    path = Path(cfg["ckpt"]).expanduser().absolute()
    while (path.name in INSIDE or path.name.startswith("step_")) and path.parent.name:
        path = path.parent
    return path.name
