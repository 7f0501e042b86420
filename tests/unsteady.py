"""Services that stumble: an S3 store that refuses one request in five, a server that is away for a while."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from typing import Any

from tests.mlflow_server import free_port

__all__ = ["Doorway", "unsteady_s3"]


@contextlib.contextmanager
def unsteady_s3(every: int) -> Iterator[tuple[str, list[int]]]:
    """moto's S3 with a bucket ``galray`` that answers every so many requests with 503.

    Yields:
        Its address, and the count of requests and of refusals so far.
    """
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    store = DomainDispatcherApplication(create_backend_app)
    counts, numbers, lock = [0, 0], itertools.count(1), threading.Lock()

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        with lock:
            counts[0] = number = next(numbers)
            counts[1] = number // every
        if number % every == 0:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [
                b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            ]
        return store(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="galray")
    try:
        yield address, counts
    finally:
        server.shutdown()
        thread.join()


class Doorway:
    """A port of this machine that leads to another one, and can be shut for a while.

    Arguments:
        port: Where it leads.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._open: list[socket.socket] = []
        self.port = free_port()
        self._listener = self._bind()
        self.reopen()

    def _bind(self) -> socket.socket:
        """The port is ours, and nobody is let in."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was shut
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._open += [here, there]
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def shut(self) -> None:
        """Refuse new connections and break the old ones."""
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open = []
        self._listener = self._bind()

    def reopen(self) -> None:
        """Let everybody in again."""
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
