"""MLflow as a group runs it: its server on Postgres, artefacts in an S3 bucket, all of it on this machine."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_for

__all__ = ["MlflowServer", "answers", "free_port", "mlflow_on_postgres", "postgres"]

BUCKET = "mlflow"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class MlflowServer:
    """What a client needs to know of the server.

    Attributes:
        uri: Tracking URI; clients need no key of the bucket, artefacts go through the server.
        database: SQLAlchemy's address of the Postgres database behind it.
        s3_endpoint: Address of the S3 service; any access key will do (`KEYS`).
        bucket: Bucket that holds the artefacts.
    """

    uri: str
    database: str
    s3_endpoint: str
    bucket: str = BUCKET

    def s3(self) -> Any:
        """A boto3 client of the S3 service."""
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.s3_endpoint, **keys)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on.

    Below those that systems give to outgoing connections and to who asks for any port, and above Ray's for
    its workers: nobody gets it before the server that it is for.
    """
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(20_000, 32_000)
            listener.bind(("127.0.0.1", port))
            return port


def _program(name: str) -> str:
    """Path of a Postgres program; Debian keeps them out of PATH. Skips the test where there is none."""
    found = shutil.which(name) or max(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), default=None)
    if found is None:
        pytest.skip("Postgres is not installed (Debian: apt-get install postgresql)")
    return found


@contextmanager
def postgres() -> Iterator[str]:
    """A Postgres server with a database "mlflow", as long as the block lasts; yields SQLAlchemy's address.

    Postgres refuses to run as root: there it runs as the user "postgres" that Debian's package makes.
    """
    pytest.importorskip("psycopg2", reason="pip install psycopg2-binary")
    initdb, server = _program("initdb"), _program("postgres")
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="galray-postgres-"))  # pytest's folders are closed to that user
    try:
        if user is not None:
            shutil.chown(folder, user)
        data, port = folder / "data", free_port()
        options = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        command = [initdb, "-D", str(data), "-U", "mlflow", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*command, "--locale=C.UTF-8"], check=True, **options)
        command = [server, "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, "-c", "fsync=off"], stderr=log, **options)
        try:
            _create_database(port, process, folder / "log")
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
        finally:
            process.terminate()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _create_database(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg2

    def connect() -> Any:
        with contextlib.suppress(psycopg2.OperationalError):
            return psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres")

    connection = wait_for(connect, "a connection to Postgres", process, log)
    connection.autocommit = True
    connection.cursor().execute("CREATE DATABASE mlflow")
    connection.close()


@contextmanager
def mlflow_on_postgres(folder: Path) -> Iterator[MlflowServer]:
    """`mlflow server` on Postgres and S3, as `deploy/mlflow` sets it up, as long as the block lasts.

    Arguments:
        folder: Where the server's log and temporary files go.
    """
    from moto.server import ThreadedMotoServer

    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        store = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        store.start()
        stack.callback(store.stop)
        endpoint = "http://{}:{}".format(*store.get_host_and_port())
        port = free_port()
        found = MlflowServer(f"http://127.0.0.1:{port}", database, endpoint)
        found.s3().create_bucket(Bucket=BUCKET)
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database]
        command += ["--artifacts-destination", f"s3://{BUCKET}", "--host", "127.0.0.1", "--port", str(port)]
        environment = os.environ | KEYS | {"MLFLOW_S3_ENDPOINT_URL": endpoint}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        environment.pop("MLFLOW_TRACKING_URI", None)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        log = stack.enter_context((folder / "mlflow-server.log").open("wb"))
        process = subprocess.Popen(
            [*command, "--workers", "2"], cwd=folder, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            log_path = folder / "mlflow-server.log"
            wait_for(lambda: answers(f"{found.uri}/health"), "MLflow's server", process, log_path, every=0.3)
            yield found
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def answers(address: str) -> bool:
    """Whether somebody answers there."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(address, timeout=60).close()
        return True
    return False
