"""Check that a server can listen on its address, before slow work such as loading models begins."""

import errno
import socket

from uni_instruct.errors import RequestError


def free_address(host: str, port: int) -> str:
    """The IP address of the host, after binding the port once as a check. Raises RequestError if that fails."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise RequestError(f"host {host} is unknown", remedy="choose another --host", param="host") from None
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(place)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            problem = f"port {port} is already in use" if taken else f"cannot listen on {host}:{port}: {error.strerror}"
            # On an address of another machine no port works, so the host is at fault.
            wrong = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
            raise RequestError(problem, remedy=f"choose another --{wrong}", param=wrong) from None
    return str(place[0])
