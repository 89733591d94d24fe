"""A client that costs little: many connections in one thread, each asks, waits for the answer and asks again. Linux only.

An HTTP library would take as long for a request as the servers that are measured with it.
"""

import random
import select
import socket
import time

# How an image may begin: a PNG as it is, or in base64 in JSON.
_PNG = (b"\x89PNG", b'["iVBORw0KGgo')


class Client:
    """One connection, and the answer that comes in on it."""

    def __init__(self, port: int, path: str, body: str):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        self._body = body
        self._received = b""
        self._length = -1
        self._asked_at = 0.0

    def ask(self) -> None:
        """One image of a random seed."""
        body = self._body % random.getrandbits(31)
        self._received, self._length, self._asked_at = b"", -1, time.perf_counter()
        self.socket.sendall(f"{self._head}{len(body)}\r\n\r\n{body}".encode())

    def hear(self) -> float | None:
        """To be called when something has come: the latency in ms where the answer is complete. It must be an image."""
        data = self.socket.recv(1 << 16)
        assert data, "the server has closed the connection"
        self._received += data
        if self._length < 0:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = self._received[:end].lower()
            self._length = end + 4 + int(head.partition(b"content-length:")[2].partition(b"\r")[0])
        if len(self._received) < self._length:
            return None
        latency_ms = 1e3 * (time.perf_counter() - self._asked_at)
        body = self._received.partition(b"\r\n\r\n")[2]
        assert self._received.startswith(b"HTTP/1.1 200"), self._received[:400]
        assert body.startswith(_PNG), body[:100]
        return latency_ms


def closed_loop(port: int, path: str, body: str, clients: int, seconds: float) -> tuple[list[float], float]:
    """Latencies in ms, and the seconds it took; at least one request of each client."""
    poll = select.epoll()
    of_file = {}
    for _ in range(clients):
        client = Client(port, path, body)
        of_file[client.socket.fileno()] = client
        poll.register(client.socket.fileno(), select.EPOLLIN)
    latencies: list[float] = []
    start = time.perf_counter()
    for client in of_file.values():
        client.ask()
    running = len(of_file)
    while running:
        for file, _ in poll.poll():
            latency = of_file[file].hear()
            if latency is None:
                continue
            latencies.append(latency)
            if time.perf_counter() - start < seconds:
                of_file[file].ask()
            else:
                running -= 1
    took = time.perf_counter() - start
    for client in of_file.values():
        client.socket.close()
    return latencies, took


def now_and_then(port: int, path: str, body: str, requests: int, pause_s: float) -> list[float]:
    """Latencies in ms of one client that asks a server at rest."""
    client = Client(port, path, body)
    latencies = []
    for _ in range(requests):
        time.sleep(pause_s)
        client.ask()
        while (latency := client.hear()) is None:
            pass
        latencies.append(latency)
    client.socket.close()
    return latencies
