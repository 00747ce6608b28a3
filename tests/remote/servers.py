"""Real servers of object stores, on this machine, for as long as a test needs them."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
from collections.abc import Generator

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
    """What a user sets to reach the S3 server at `url`."""
    return {
        "S3_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


def make_bucket(url: str, name: str) -> None:
    """Makes a bucket of the S3 server, as no client of ours does."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
