"""Copies objects of a store to files, as a client does that knows no checkpoints."""

from __future__ import annotations

from pathlib import Path

import obstore
import servers
from obstore.store import S3Store


def copy_down(url: str, bucket: str, prefix: str, to: Path) -> int:
    """Every object below a prefix becomes a file; how many there are."""
    store = S3Store(
        bucket,
        endpoint=url,
        access_key_id=servers.KEY_ID,
        secret_access_key=servers.SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    names = [str(each["path"]) for page in obstore.list(store, f"{prefix}/") for each in page]
    for name in names:
        path = to / name.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(obstore.get(store, name).bytes()))
    return len(names)
