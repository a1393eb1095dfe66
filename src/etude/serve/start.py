"""What serve.py does first: everything that can be refused before the model is loaded."""

import errno
import ipaddress
import os
import socket
from pathlib import Path

from etude.errors import Refusal

INSIDE = ("artifacts", "checkpoints", "export", "best", "last")  # folders of a run


def run(cfg: dict) -> int:
    """-> exit code."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise Refusal(f"serve.py needs {error.name}: pip install 'etude[serve]'") from None
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


def bind(host: str, port: int, keys: list[str]) -> socket.socket:
    """Raises Refusal for an address that is taken or not this machine's, or one that others reach without a key."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise Refusal(f"host={host}: {error.strerror or error}; type host=127.0.0.1") from None
    if not keys and not is_loopback(str(address[0])):
        raise Refusal(
            f"host={host} can be reached from other machines, which needs a key: set ETUDE_API_KEYS=<key>, or type key_file=<file>"
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        what = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        raise Refusal(f"port={port} on host={host} {what}; type port=<another>, or port=0 for any") from None
    return listener


def name_of(cfg: dict) -> str:
    """served_name, else the name of the run's folder."""
    if cfg["served_name"]:
        return cfg["served_name"]
    path = Path(cfg["ckpt"]).expanduser().absolute()
    while (path.name in INSIDE or path.name.startswith("step_")) and path.parent.name:
        path = path.parent
    return path.name


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
