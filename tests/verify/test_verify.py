"""A checkpoint is damaged in every way, and verification must name file, item and leaves."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tensorstore as ts
import torch
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.core.files import file_plan
from functional_ckpt.core.records import records
from functional_ckpt.core.records.records import EXTENSION_FILE, FileRecord
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify import foreign
from functional_ckpt.verify.checkpoint import Finding, verify_checkpoint

STORAGE = LocalStorage()
WIDE = torch.arange(600, dtype=torch.int16)  # larger than values that OCDBT keeps inside its tree
STORED = ("b", "lr", "n", "v", "w")  # the leaves that the database holds


def items() -> dict[str, object]:
    tree = {"w": WIDE, "v": WIDE, "b": torch.arange(8), "lr": 0.5, "n": 3, "s": "text"}
    return {"m": tree, "c": fc.Json({"lr": 0.1})}


def verify(path: Path, step: int | None = None) -> list[Finding]:
    return verify_checkpoint(STORAGE, str(path), step)


def one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, "\n".join(map(str, findings))
    assert findings[0].is_damage
    return findings[0]


def files(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Two files of data, and the root of the tree with the small values.
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_plan, "BYTES_PER_FILE", WIDE.nbytes // 2)
        fc.save(path, items())
    assert len(list((path / "m").glob("*.safetensors"))) == 2
    return path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with fc.CheckpointManager(tmp_path / "root") as manager:
        for step in (1, 2):
            tree = {"w": WIDE + step, "b": torch.arange(8)}
            manager.save(step, {"m": tree, "other": {"x": WIDE}}, metrics={"loss": 0.1 * step})
    return tmp_path / "root"


# ------------------------------------------------------------------------------------ intact


def test_intact_checkpoint_has_no_findings(checkpoint: Path, root: Path) -> None:
    assert verify(checkpoint) == []
    assert verify(root / "1", 1) == verify(root / "2", 2) == []


def test_path_may_have_characters_that_urls_may_not(tmp_path: Path) -> None:
    path = tmp_path / "a b%41?x#y:é%zz"
    fc.save(path, {"m%d ?#": {"w": WIDE, "v": WIDE}})
    restored = fc.restore(path)["m%d ?#"]
    assert torch.equal(restored["w"], WIDE)
    assert restored["w"] is restored["v"]
    assert verify(path) == []


def test_progress_ends_at_the_total_and_never_goes_back(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify_checkpoint(STORAGE, str(root / "1"), 1, progress=lambda *now: seen.append(now))
    done = [now for now, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {done[-1]}
    on_disk = sum((root / "1" / name).stat().st_size for name in files(root / "1"))
    assert done[-1] > on_disk / 2


def test_neither_torch_nor_jax_is_needed(checkpoint: Path) -> None:
    script = (
        "import sys\n"
        "from functional_ckpt.verify import verify_checkpoint\n"
        "from functional_ckpt.storage.local import LocalStorage\n"
        "assert verify_checkpoint(LocalStorage(), sys.argv[1]) == []\n"
        "assert not {'torch', 'jax', 'orbax'} & set(sys.modules)\n"
    )
    path = os.pathsep.join(filter(None, sys.path))  # a build may not have installed anything
    subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )


# ------------------------------------------------------------------------------------ flipped bits


def leaves_of(path: Path, file: str, offset: int) -> tuple[str, ...] | None:
    """Which leaves a flip takes, according to TensorStore's own view of the database.

    None in the metadata of an array, where it depends on the byte.
    """
    if file == "m/manifest.ocdbt":
        return STORED
    if not file.endswith((".safetensors", "index.ocdbt")):
        return ()
    root, entries = _database(path)
    if _covers(root, file, offset):
        return STORED
    keys = [e["key"].decode() for e in entries if _covers(e["indirect_value"], file, offset)]
    if any(key.endswith("/zarr.json") for key in keys):
        return None
    return tuple(sorted({key.partition("/")[0] for key in keys}))


@functools.cache
def _database(path: Path) -> tuple[str, list[Any]]:
    """The location of the root node, and its entries; to be read before anything is damaged."""
    base = ts.KvStore.open(f"file://{path}/m/").result()
    root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
    return root, ts.ocdbt.dump(base, root).result()["entries"]


def _covers(location: str, file: str, offset: int) -> bool:
    """Whether a `kind::path:offset:length` holds a byte."""
    _, _, name, start, length = location.split(":")
    return name == file.removeprefix("m/") and int(start) <= offset < int(start) + int(length)


def flips(path: Path, stride: int) -> Iterator[tuple[str, int]]:
    names = files(path)
    assert {name.split("/")[0] for name in names} >= {"m", "c", EXTENSION_FILE}
    for name in names:
        size = (path / name).stat().st_size
        yield from ((name, offset) for offset in range(0, size, stride))


def check_flips(path: Path, stride: int) -> int:
    """Flips one bit at a time and puts it back; returns how many."""
    count = 0
    _database(path)
    reached: set[tuple[str, ...]] = set()
    for name, offset in flips(path, stride):
        file = path / name
        content = file.read_bytes()
        leaves = leaves_of(path, name, offset)
        damaged = bytearray(content)
        damaged[offset] ^= 1 << (offset % 8)
        file.write_bytes(damaged)
        found = verify(path)
        file.write_bytes(content)
        where = f"bit {offset % 8} of byte {offset} of {name}"
        assert [each.file for each in found] == [name], f"{where}: {list(map(str, found))}"
        finding = found[0]
        assert finding.problem == ("record" if EXTENSION_FILE in name else "content"), where
        assert finding.item == (name.split("/")[0] if "/" in name else None), where
        assert leaves is None or finding.leaves == leaves, f"{where}: {finding}"
        reached.add(finding.leaves)
        count += 1
    assert reached >= {(), ("v", "w"), STORED, ("b",)}
    assert verify(path) == []
    return count


def test_a_flipped_bit_in_any_region_is_found(checkpoint: Path) -> None:
    assert check_flips(checkpoint, 11) > 300


@pytest.mark.slow
@pytest.mark.skipif(not IS_FULL, reason="a minute; the test above takes every eleventh byte")
@pytest.mark.timeout(900)
def test_a_flipped_bit_in_any_byte_is_found(checkpoint: Path) -> None:
    assert check_flips(checkpoint, 1) > 3000


def test_every_step_of_a_manager_is_covered_to_its_last_file(root: Path) -> None:
    step = root / "2"
    for name in files(step):
        content = (step / name).read_bytes()
        for offset in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[offset] ^= 0x10
            (step / name).write_bytes(damaged)
            assert one(verify(step, 2)).file == name
        (step / name).write_bytes(content)


def test_damaged_files_are_reported_with_their_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 1)  # several files
    path = tmp_path / "checkpoint"
    tree = {name: torch.full((2000,), i, dtype=torch.int32) for i, name in enumerate("abcd")}
    fc.save(path, {"m": tree})
    assert verify(path) == []
    owners: dict[str, list[str]] = {}
    for name, file in itertools.product(tree, files(path)):
        content = (path / file).read_bytes()
        start = content.find(tree[name].numpy().tobytes()) if file.endswith(".safetensors") else -1
        if start >= 0:
            owners.setdefault(file, []).append(name)
            damaged = bytearray(content)
            damaged[start + 5] ^= 1
            (path / file).write_bytes(damaged)
    assert len(owners) == 4
    assert sorted(itertools.chain(*owners.values())) == list("abcd")
    found = {each.file: list(each.leaves) for each in verify(path)}
    assert found == owners


# ------------------------------------------------------------------------------------ files


def test_a_truncated_file_is_found(checkpoint: Path) -> None:
    for name in files(checkpoint):
        file = checkpoint / name
        content = file.read_bytes()
        for size in {0, 1, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:size])
            finding = one(verify(checkpoint))
            assert finding.file == name
            assert finding.problem == ("record" if EXTENSION_FILE in name else "size")
        file.write_bytes(content + b"\0")
        assert one(verify(checkpoint)).file == name
        file.write_bytes(content)


def test_a_missing_file_is_found(checkpoint: Path) -> None:
    for name in files(checkpoint):
        file = checkpoint / name
        content = file.read_bytes()
        file.unlink()
        finding = one(verify(checkpoint))
        assert (finding.file, finding.problem, finding.got) == (name, "missing", "nothing")
        if content.startswith(WIDE.numpy().tobytes()):
            assert set(finding.leaves) >= {"v", "w"}
        file.write_bytes(content)


def test_a_missing_item_is_found(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "m")
    assert one(verify(checkpoint)).file == f"m/{EXTENSION_FILE}"
    shutil.rmtree(checkpoint / "c")
    assert {each.item for each in verify(checkpoint)} == {"m", "c"}


@pytest.mark.parametrize("name", ["x", "m/x", "m/d/0123", "c/x", "new/x", "new/_FUNCTIONAL_CKPT"])
def test_a_file_too_many_is_found(checkpoint: Path, name: str) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"")
    finding = one(verify(checkpoint))
    assert (finding.file, finding.problem) == (name, "unexpected")


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_what_is_no_regular_file_is_found(checkpoint: Path, kind: str) -> None:
    for name in files(checkpoint):
        file = checkpoint / name
        elsewhere = checkpoint.parent / "elsewhere"
        file.rename(elsewhere)
        if kind == "link":
            file.symlink_to(elsewhere)
        elif kind == "directory":
            file.mkdir()
        else:
            os.mkfifo(file)
        finding = one(verify(checkpoint))
        assert (finding.file, finding.problem) == (name, "missing")
        assert finding.got == {"pipe": "a special file"}.get(kind, f"a {kind}")
        file.rmdir() if kind == "directory" else file.unlink()
        elsewhere.rename(file)


class Unreadable(testing.FaultyStorage):
    """A store in which no file whose path ends in a text can be read."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end

    def operation(self, kind: str, path: str) -> None:
        if kind == "read" and path.endswith(self.end):
            raise fc.errors.StorageError("Input/output error", path=path)


def test_unreadable_files_are_reported(checkpoint: Path) -> None:
    found = verify_checkpoint(Unreadable("_METADATA"), str(checkpoint))
    assert {each.problem for each in found} == {"unreadable"}
    assert {each.file for each in found} == {"_CHECKPOINT_METADATA", "m/_METADATA"}


def test_an_unreadable_file_of_arrays_is_reported(checkpoint: Path) -> None:
    names = [name for name in files(checkpoint / "m") if not name.startswith("_")]
    assert len(names) == 4
    for name in names:
        found = one(verify_checkpoint(Unreadable(name), str(checkpoint)))
        assert (found.file, found.problem) == (f"m/{name}", "unreadable")
        assert found.leaves and set(found.leaves) <= set(STORED)
        assert found.leaves == STORED or name != "manifest.ocdbt"


# ------------------------------------------------------------------------------------ swaps


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def test_verify_reports_swapped_files(root: Path) -> None:
    step = root / "1"
    first, second = (n for n in files(step) if n.endswith("manifest.ocdbt") and n.count("/") == 1)
    swap(step / first, step / second)
    found = {each.file: each for each in verify(step, 1)}
    assert {name: each.problem for name, each in found.items()} == dict.fromkeys(
        (first, second), "swapped"
    )
    assert found[first].got == f"that of {second}"


def test_verify_reports_swapped_items(root: Path) -> None:
    swap(root / "1" / "m", root / "1" / "other")
    found = {each.file: each for each in verify(root / "1", 1) if each.problem == "swapped"}
    assert found[f"m/{EXTENSION_FILE}"].got == "that of item 'other'"
    assert found[f"other/{EXTENSION_FILE}"].got == "that of item 'm'"


def test_verify_reports_swapped_steps(root: Path) -> None:
    swap(root / "1", root / "2")
    finding = one(verify(root / "1", 1))
    assert (finding.file, finding.problem, finding.got) == (
        EXTENSION_FILE,
        "swapped",
        "that of step 2",
    )
    assert verify(root / "1") == []  # as a separate directory it is intact


def test_verify_reports_an_item_of_another_step(root: Path) -> None:
    swap(root / "1" / "m", root / "2" / "m")
    finding = one(verify(root / "1", 1))
    assert (finding.file, finding.problem) == (f"m/{EXTENSION_FILE}", "swapped")
    assert finding.got == "that of the same item in another save"


def test_a_data_file_of_another_step_is_found(root: Path) -> None:
    pattern = "m/manifest.ocdbt"
    shutil.copy(root / "2" / pattern, root / "1" / pattern)
    found = verify(root / "1", 1)
    assert {each.file for each in found} == {pattern}


# ------------------------------------------------------------------------- an inconsistent database


def reseal(path: Path) -> None:
    """Makes the records agree with the files again, so that only the arrays differ."""
    item = path / "m"
    record = records.parse_item((item / EXTENSION_FILE).read_bytes(), "item")
    listed = {
        name: STORAGE.checksum(str(item / name)) for name in files(item) if name != EXTENSION_FILE
    }
    sealed = records.ItemRecord(
        item=record.item,
        handler=record.handler,
        root=record.root,
        arrays=record.arrays,
        files=listed,
    ).to_json()
    (item / EXTENSION_FILE).write_bytes(sealed)
    step = records.parse_step((path / EXTENSION_FILE).read_bytes(), "step")
    kept = {
        **step.files,
        f"m/{EXTENSION_FILE}": FileRecord(len(sealed), records.digest_hex(sealed)),
    }
    text = records.StepRecord(step=step.step, items=step.items, files=kept).to_json()
    (path / EXTENSION_FILE).write_bytes(text)


def edit(path: Path, change: Callable[[ts.KvStore], object]) -> list[Finding]:
    base = {"driver": "file", "path": f"{path / 'm'}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    change(store)
    reseal(path)
    return verify(path)


def rewrite_metadata(store: ts.KvStore, name: str, field: str, value: object) -> None:
    record = json.loads(store.read(f"{name}/zarr.json").result().value)
    assert field in record
    store[f"{name}/zarr.json"] = json.dumps({**record, field: value}).encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [599]),
        ("data_type", "uint16"),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [300]}}),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}]),
    ],
)
def test_array_metadata_must_agree_with_the_record(
    checkpoint: Path, field: str, value: object
) -> None:
    finding = one(edit(checkpoint, lambda store: rewrite_metadata(store, "w", field, value)))
    assert (finding.item, finding.leaves, finding.problem) == ("m", ("w",), "mismatch")
    assert field in finding.expected
    assert finding.file.startswith("m/d/")


def test_array_metadata_that_is_no_json(checkpoint: Path) -> None:
    def change(store: ts.KvStore) -> None:
        store["w/zarr.json"] = b"[1"
        store["b/zarr.json"] = b"[1]"

    found = edit(checkpoint, change)
    assert {each.problem for each in found} == {"unreadable"}
    assert {leaf for each in found for leaf in each.leaves} == {"b", "w"}


def test_a_tied_name_must_resolve_to_the_same_bytes(checkpoint: Path) -> None:
    other = (WIDE + 1).numpy().tobytes()
    finding = one(edit(checkpoint, lambda store: store.write("v/c/0", other).result()))
    assert (finding.leaves, finding.problem) == (("v",), "mismatch")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"[64,1264]", b"[60,1260]", "'w' at byte 60 overlaps"),
        (b"[64,1264]", b"[65,1265]", "'w' at byte 65 follows a gap"),
        (b'"w":{', b'"b":{', "'b' occurs twice"),
        (b'"w":{', b'"x":{', ""),  # only the name on the hub may be another one
        (b"[600]", b"[9223372036854775808]", "tensor 'w'"),
        (b'"I16"', b'"U16"', "tensor 'w': uint16"),
        (b'"I16","shape":[600]', b'"I64","shape":[150]', "tensor 'w': int64"),
        (None, b"\0\0\0\0\0\0\0\x80", "a header of 9,223,372,036,854,775,808 bytes"),
    ],
)
def test_a_hostile_header_is_named(old: bytes | None, new: bytes, why: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "x"
    fc.save(checkpoint, items())
    file = checkpoint / "m" / "data.safetensors"
    data = file.read_bytes()
    changed = new + data[8:] if old is None else data.replace(old, new, 1)
    if old is not None:
        assert old in data
        spare = len(old) - len(new)
        changed = changed.replace(b"}}" + b" " * -spare, b"}}" + b" " * max(spare, 0), 1)
    assert len(changed) == len(data) and changed != data
    file.write_bytes(changed)
    reseal(checkpoint)
    found = verify(checkpoint)
    if why:
        finding = one(found)
        assert (finding.item, finding.file) == ("m", "m/data.safetensors")
        assert why in finding.got
    else:
        assert found == []


def test_a_chunk_of_another_size(checkpoint: Path) -> None:
    longer = WIDE.numpy().tobytes() + b"\0"
    finding = one(edit(checkpoint, lambda store: store.write("w/c/0", longer).result()))
    assert (finding.leaves, finding.got) == (("w",), "1,201 bytes")


@pytest.mark.parametrize(("key", "leaf"), [("w/c/0", "w"), ("v/zarr.json", "v"), ("lr/c", "lr")])
def test_a_value_that_is_gone(checkpoint: Path, key: str, leaf: str) -> None:
    finding = one(
        edit(
            checkpoint,
            lambda store: store.delete_range(ts.KvStore.KeyRange(key, key + "\0")).result(),
        )
    )
    assert finding.leaves == (leaf,)
    assert finding.got == "nothing"


def test_a_number_that_orbax_would_read_differently(checkpoint: Path) -> None:
    finding = one(edit(checkpoint, lambda store: store.write("n/c", b"\4" + bytes(7)).result()))
    assert finding.leaves == ("n",)
    assert finding.expected == "the number 3"


def test_a_large_chunk_is_compared_too(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    fc.save(path, {"m": {"x": torch.zeros(100_000), "y": torch.zeros(3)}})
    assert verify(path) == []
    other = torch.ones(100_000).numpy().tobytes()
    finding = one(edit(path, lambda store: store.write("x/c/0", other).result()))
    assert (finding.leaves, finding.problem) == (("x",), "mismatch")


def test_a_record_that_asks_for_more_than_there_is(checkpoint: Path) -> None:
    path = checkpoint / "m" / EXTENSION_FILE
    record = records.verify_checksum(path.read_bytes(), "item")
    record.pop("xxh3")
    text = json.dumps(record).replace("[600]", f"[{2**40}]")
    path.write_bytes(records.with_checksum(json.loads(text)))
    assert {each.problem for each in verify(checkpoint)} == {"record"}


# ------------------------------------------------------------------------------------ no checkpoint


def test_an_item_alone_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(fc.errors.UsageError, match="is one item; verify its checkpoint"):
        verify(checkpoint / "m")


def test_verify_of_other_directories_raises(tmp_path: Path) -> None:
    with pytest.raises(fc.errors.StepNotFoundError, match="no checkpoint"):
        verify(tmp_path / "nothing")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    with pytest.raises(fc.errors.CorruptCheckpointError, match="not a checkpoint"):
        verify(tmp_path / "folder")


def test_verify_leaves_no_file_open(saved: Path) -> None:
    assert verify(saved) == []
    assert all(str(saved) not in os.path.realpath(each) for each in Path("/proc/self/fd").iterdir())


def test_a_foreign_tree_without_arrays_is_sound(tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "texts", {"a": "text"})
    (finding,) = verify(tmp_path / "texts")
    assert finding.problem == "no digests" and not finding.is_damage


@pytest.mark.parametrize(
    ("error", "file"),
    [
        (errors.CorruptCheckpointError("broken", path="/c/m/d/0"), "m/d/0"),
        (errors.CorruptCheckpointError("broken"), "."),
        (ValueError("broken"), "."),
    ],
    ids=["a file", "no file", "a ValueError"],
)
def test_the_file_of_a_foreign_checkpoint_that_cannot_be_read_is_named(
    error: Exception, file: str
) -> None:
    search = mock.Mock(path="/c")
    foreign._add(search, "m", error, ("w",))
    assert search.add.call_args.args[:3] == ("m", file, "unreadable")
