"""Where the server listens, and who can reach it there."""

import errno
import ipaddress
import socket

from etude.errors import Refusal


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


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
