"""Real servers on loopback, of S3 (moto's) and of a folder by HTTP, and a network before them that fails."""

import functools
import http.server
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs
from moto.server import ThreadedMotoServer

KINDS = ("stall", "500", "503", "cut")
STALL_SECONDS = 4.0
"""Longer than the store's client waits for an answer."""


class S3Server:
    """An S3 server in this process; its buckets end with it."""

    def __init__(self) -> None:
        # For tests with hosts of their own, on all interfaces; what it holds is drawn.
        self._server = ThreadedMotoServer(ip_address="0.0.0.0", port=0, verbose=False)
        self._server.start()
        self.port: int = self._server.get_host_and_port()[1]
        self._buckets = 0

    def environment(self, port: int | None = None, host: str = "127.0.0.1") -> dict[str, str]:
        """What a process needs to reach it, or a network before it by its port."""
        return {
            "AWS_ENDPOINT_URL": f"http://{host}:{port or self.port}",
            "AWS_ACCESS_KEY_ID": "user",
            "AWS_SECRET_ACCESS_KEY": "planted-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def bucket(self) -> str:
        """The name of a new bucket."""
        self._buckets += 1
        name = f"bucket-{self._buckets}"
        files = pyarrow.fs.S3FileSystem(
            access_key="user",
            secret_key="planted-secret",
            endpoint_override=f"http://127.0.0.1:{self.port}",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        files.create_dir(name)
        return name

    def stop(self) -> None:
        """End it."""
        self._server.stop()


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """The address of a web server of a folder, in this process."""
    handler = functools.partial(_Files, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class FaultyNetwork:
    """Passes connections on to a port of this machine, and now and then fails one.

    Args:
        port: that is passed on to.
        rate: of connections that stall, are answered 500 or 503, or are cut in the body.
        seed: of what fails.
        kinds: what may happen.
    """

    def __init__(self, port: int, rate: float, seed: int = 0, kinds: Sequence[str] = KINDS) -> None:
        self.rate = rate
        self.failed = dict.fromkeys(kinds, 0)
        self._target = port
        self._random = random.Random(seed)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                fault = self._random.choice(list(self.failed)) if self._random.random() < self.rate else None
                threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str | None) -> None:
        with suppress(OSError), client:
            if fault is not None:
                self.failed[fault] += 1
            if fault == "stall":
                client.recv(2**16)
                time.sleep(STALL_SECONDS)
            elif fault in ("500", "503"):
                client.recv(2**16)
                client.sendall(f"HTTP/1.1 {fault} Failed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            else:
                with socket.create_connection(("127.0.0.1", self._target)) as server:
                    threading.Thread(target=_pass, args=(client, server), daemon=True).start()
                    _pass(server, client, 700 if fault == "cut" else None)


def _pass(source: socket.socket, target: socket.socket, most: int | None = None) -> None:
    """Bytes from one to the other, until one ends or `most` have passed."""
    with suppress(OSError):
        while block := source.recv(2**16 if most is None else max(1, most)):
            target.sendall(block)
            if most is not None:
                most -= len(block)
                if most <= 0:
                    break
        target.shutdown(socket.SHUT_WR)
