"""Small file systems, and mounts, for tests that run as root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def mount(*arguments: str) -> None:
    """Mounts; skips the test where that is not allowed."""
    result = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"cannot mount here: {result.stderr.strip()}")


def unmount(path: Path) -> None:
    """Unmounts a mount, even if it is in use."""
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def small(kind: str, folder: Path) -> Iterator[Path]:
    """A file system of a few MiB: `ext4` in a loop-mounted file, or `tmpfs`, in memory."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    place = folder / "disk"
    place.mkdir()
    if kind == "tmpfs":
        mount("-t", "tmpfs", "-o", "size=4m", "none", str(place))
    else:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("there is no mkfs.ext4")
        image = folder / "image"
        image.write_bytes(b"")
        os.truncate(image, 8 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
        mount("-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        unmount(place)


@contextlib.contextmanager
def large(kind: str, folder: Path) -> Iterator[Path]:
    """A file system of some 300 MiB: `tmpfs`, `xfs`, `btrfs`, `overlay` or `fuse` (bindfs)."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    place = folder / "disk"
    place.mkdir()
    if kind == "tmpfs":
        mount("-t", "tmpfs", "-o", "size=300m", "none", str(place))
    elif kind == "overlay":
        # Its own layers cannot be on an overlay, as the root of a container often is.
        layers = folder / "layers"
        layers.mkdir()
        mount("-t", "tmpfs", "-o", "size=300m", "none", str(layers))
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        options = ",".join(f"{name}dir={layers / name}" for name in ("lower", "upper", "work"))
        mount("-t", "overlay", "-o", options, "none", str(place))
    elif kind == "fuse":
        _needs("bindfs")
        (folder / "beneath").mkdir()
        result = subprocess.run(
            ["bindfs", str(folder / "beneath"), str(place)], capture_output=True, text=True
        )
        if result.returncode:
            pytest.skip(f"cannot mount here: {result.stderr.strip()}")
    else:
        _needs(f"mkfs.{kind}")
        image = folder / "image"
        image.write_bytes(b"")
        os.truncate(image, 310 * 2**20)
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, capture_output=True)
        mount("-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        unmount(place)
        if kind == "overlay":
            unmount(folder / "layers")


def _needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")
