"""The address that a server listens on: bound before the model is loaded, so that a port in use is known at once.

Inputs: a host and a port. Outputs: a bound socket, or a fault that names another port. Deliberately not here: the
server (`process`).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket

from trl_sft.errors import Fault, RecipeError

_BACKLOG = 128
_TRIED_PORTS = 100  # after the one that is in use
_LOOPBACK = "127.0.0.1"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address and does not listen yet.

    Args:
        host: A name or an address of this machine.
        port: 0 = one that the system chooses.

    Raises:
        RecipeError: The port is in use or reserved, or the host is none of this machine.

    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise _explain_host(host, str(getattr(error, "strerror", None) or error)) from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise explain(error, host, port) from None
    return listener


def listen(listener: socket.socket, host: str) -> None:
    """Let a bound socket take connections. Raises RecipeError: another process has taken the port meanwhile."""
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise explain(error, host, get_port(listener)) from None


def explain(error: OSError, host: str, port: int) -> RecipeError:
    """Return the fault of an address that cannot be used."""
    if error.errno == errno.EADDRINUSE:
        problem = f"port {port} is in use on {host}"
        free = find_free_port(host, port)
        fix = f"Write `--port {free}`." if free else "Write `--port 0`: the system then chooses a free port."
        return RecipeError(Fault("--port", problem, fix, code="serve.port_in_use"))
    if error.errno in (errno.EACCES, errno.EPERM):
        problem = f"port {port} is reserved for the administrator of this machine"
        return RecipeError(Fault("--port", problem, "Write a port from 1024.", code="serve.bad_address"))
    return _explain_host(host, error.strerror or str(error))


def find_free_port(host: str, port: int) -> int | None:
    """Return the next port that is free; None = there is none among the next ones."""
    for candidate in range(port + 1, min(port + 1 + _TRIED_PORTS, 65536)):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe, contextlib.suppress(OSError):
            probe.bind((host, candidate))
            return candidate
    return None


def get_port(listener: socket.socket) -> int:
    """Return the port of a bound socket."""
    return int(listener.getsockname()[1])


def is_loopback(host: str) -> bool:
    """Tell whether only programs of this machine reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def format_url(host: str, port: int) -> str:
    """Return the URL by which a program of this machine reaches a host."""
    try:
        if ipaddress.ip_address(host).is_unspecified:  # 0.0.0.0 and :: name every address of this machine
            host = "[::1]" if ":" in host else _LOOPBACK
    except ValueError:
        pass
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"


def _explain_host(host: str, reason: str) -> RecipeError:
    """Return the fault of a host that is none of this machine."""
    fix = f"Write `--host {_LOOPBACK}` for this machine alone, or `--host 0.0.0.0` for its network."
    return RecipeError(Fault("--host", f"{host}: {reason}", fix, code="serve.bad_address"))
