"""Azurite, Microsoft's emulator of Azure Blob Storage, where it is installed (npm)."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import hmac
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Generator, Mapping

# The account that every emulator has; not a secret.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def command() -> str | None:
    """Returns the path of `azurite-blob`; None if it is not installed."""
    return os.environ.get("AZURITE") or shutil.which("azurite-blob")


@contextlib.contextmanager
def server() -> Generator[Mapping[str, str]]:
    """Starts the emulator on a free port, and yields the variables with which it is reached."""
    options = ["--inMemoryPersistence", "--blobPort", "0", "--skipApiVersionCheck"]
    with subprocess.Popen([str(command()), *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stdout or ())
            found = next(m for line in lines if (m := re.search(r"listens on (http://\S+)", line)))
            yield {
                "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": KEY,
                "AZURE_STORAGE_ENDPOINT": f"{found[1]}/{ACCOUNT}",
            }
        finally:
            process.terminate()


def create_container(endpoint: str, name: str) -> None:
    """Creates a container by a request that is signed with the account's key."""
    headers = {
        "x-ms-date": email.utils.formatdate(usegmt=True),
        "x-ms-version": "2021-08-06",
    }
    lines = [f"{key}:{value}" for key, value in sorted(headers.items())]
    resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    text = "\n".join(["PUT", *[""] * 11, *lines, resource])
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    headers["Content-Length"] = "0"
    url = f"{endpoint}/{name}?restype=container"
    request = urllib.request.Request(url, method="PUT", headers=headers)
    urllib.request.urlopen(request).close()
