"""Damaged and hostile checkpoints, opened in a process of their own: `hostile.py KIND NUMBER`.

Prints one line of JSON: how many were refused, how many harmless, how far memory grew. An abort, a
hang or an error that is no `CheckpointError` is a failure.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import tensorstore as ts
import torch
from hypothesis import strategies as st

import functional_ckpt as fc
from functional_ckpt import testing
from functional_ckpt.core.records import records

# Imported late by damaged checkpoints only; decoding a module is an event that `Watch` refuses.
from functional_ckpt.format import database, tensorstore_index  # noqa: F401
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify import checkpoint

MEMORY_BYTES = 2 * 2**30
EXTENSION = "_FUNCTIONAL_CKPT"

Mutate = Callable[["Site", random.Random, Any], None]

Pair = collections.namedtuple("Pair", "left right")


def items() -> dict[str, Any]:
    """One leaf, container and tie of every kind."""
    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "tree": {
            "shared": shared,
            "tied": shared,
            "big": torch.arange(40_000, dtype=torch.int32),
            "half": torch.ones(5, dtype=torch.bfloat16),
            "layout": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
            "scalar": torch.tensor(3.0),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "sparse": torch.eye(3).to_sparse(),
            "compressed": torch.eye(3).to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 1, torch.qint8),
            "channels": torch.quantize_per_channel(
                torch.ones(2, 3), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.qint8
            ),
            "numpy": np.arange(6, dtype=">i4").reshape(2, 3),
            "words": np.array(["a", "bc"]),
            "when": np.array(["2020-01-01"], "datetime64[D]"),
            "number": np.float32(1.5),
            "bytes": b"abc",
            "text": "some \ud800 text",
            "plain": [1, 2**70, 1.5, float("nan"), 1 + 2j, True, None],
            "types": (torch.float16, torch.device("cpu"), torch.Size([1, 2])),
            "pair": Pair(torch.ones(1), 2),
            "queue": collections.deque([1, 2], maxlen=3),
            "ordered": collections.OrderedDict(a=1),
            "counter": collections.Counter(a=1),
            "defaults": collections.defaultdict(list, a=[1]),
            3: {(1, "a"): 0, b"k": 1, None: 2},
        },
        "config": fc.Json({"rate": 0.1, "layers": [1, 2]}),
    }


# ------------------------------------------------------------------------------------ the sites


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A checkpoint to be damaged."""

    path: Path

    def seal_item(self, record: dict[str, Any]) -> None:
        """Writes the item's record as if it were genuine, the step's digest of it included."""
        data = seal(record)
        (self.path / "tree" / EXTENSION).write_bytes(data)
        step = json.loads((self.path / EXTENSION).read_bytes())
        step["files"][f"tree/{EXTENSION}"] = [len(data), records.digest_hex(data)]
        self.seal_step(step)

    def seal_step(self, record: dict[str, Any]) -> None:
        (self.path / EXTENSION).write_bytes(seal(record))


def seal(record: dict[str, Any]) -> bytes:
    """As `records.with_checksum`, for values that the JSON encoder refuses."""
    record.pop("xxh3", None)
    body = dump(record)[:-1]
    return body + f', "xxh3": "{records.digest_hex(body)}"}}'.encode()


def dump(record: Any) -> bytes:
    """JSON text, with the nests that `deep` stands for."""
    text = json.dumps(record, separators=(",", ":"))
    for number, (begin, end) in DEEP.items():
        text = text.replace(f'"@{number}@"', begin * number + "1" + end * number)
    return text.encode()


DEEP = {
    number: brackets
    for start, brackets in ((0, ("[", "]")), (1, ('{"a":', "}")), (2, ('[{"dict":["a"]},', "]")))
    for number in (start + 3, start + 90, start + 300, start + 3000, start + 100_000)
}


SECRET = "content outside of the checkpoint"


def make_canaries(root: Path) -> None:
    """Files next to a checkpoint that must not be reached through it, in every layout."""
    (root / "canary").mkdir()
    (root / "canary" / "secret").write_text(json.dumps(SECRET))
    (root / "canary" / "metadata").write_text(json.dumps({"a": SECRET}))
    for driver in ("zarr", "zarr3"):
        spec = {"driver": driver, "kvstore": f"file://{root}/canary/{driver}/"}
        array = ts.open(spec, create=True, shape=(3,), dtype="int32").result()
        array.write(np.full(3, 31337, np.int32)).result()


def make_ours(path: Path) -> None:
    fc.save(path, items(), custom_metadata={"note": "mine"})


def make_foreign(path: Path) -> None:
    """The same as written by Orbax: without native records."""
    make_ours(path)
    (path / EXTENSION).unlink()
    (path / "tree" / EXTENSION).unlink()


def make_zarr2(path: Path) -> None:
    """A small item in zarr version 2, in plain files as well as in a database."""
    make_foreign(path)
    keep = {"half", "scalar", "big"}
    metadata = json.loads((path / "tree/_METADATA").read_text())
    tree = metadata["tree_metadata"]
    metadata["tree_metadata"] = {key: tree[key] for key in tree if key[2:-3] in keep}
    metadata |= {"use_zarr3": False, "use_ocdbt": False}
    (path / "tree/_METADATA").write_text(json.dumps(metadata))
    arrays = {"half": np.ones(5, "<f4"), "scalar": np.array(3.0), "big": np.arange(40_000)}
    for name, array in arrays.items():
        spec = {
            "driver": "zarr",
            "kvstore": f"file://{path}/tree/{name}/",
            "metadata": {"compressor": None, "chunks": [max(1, n // 2) for n in array.shape]},
        }
        ts.open(spec, create=True, shape=array.shape, dtype=array.dtype).result().write(
            array
        ).result()


# ------------------------------------------------------------------------------------ mutations

HOSTILE: tuple[Any, ...] = (
    *(2**62, 2**62 - 1, 2**31, 2**63, -1, 0, 1, 3, 10**30, 1.5, float("1e308"), True, False, None),
    *("", "r8", "r16", "object", "|O", ">f4", "float32", "float64", "int4", "complex128", "float8"),
    *("../../canary/zarr", "../../canary/zarr3", "../canary", "/etc/passwd", ".", "..", "a/b"),
    *("a\0b", "x" * 5000),
    *("tree", "json", "tensor", "9" * 5000, "zz", "7ff8000000000000", "\u2028", "class", "_x"),
    *([], {}, [[]], [2**62], [2**62] * 2, [2**31] * 40, [0, 2**61], [-1], [1] * 100, ["x"]),
    *([0, 2**40], list(range(5000)), {"a": 1}, {"tensor": ["float32", [2**62]]}, {"list": 2**40}),
    *({"exec": ["import os"]}, {"registered": ["a"], "detail": {"type": "os.system"}}),
    *({"named_tuple": ["x"], "detail": {"type": "__import__('os')"}}, {"int": "f" * 3000}),
    *({"subclass": ["a"], "detail": {"type": "T", "context": None, "shape": [2**62]}},),
    *({"deque": 0, "detail": {"maxlen": -1}}, {"torch_device": "evil:9"}, {"torch_dtype": "nn"}),
    *({"tensor": ["float32", [3, 4]], "detail": {"strides": [2**40, 2**40]}},),
    *({"tensor": ["float32", [3, 4]], "detail": {"strides": [-4, 1]}},),
    *({"tensor": ["int8", [4]], "detail": {"dtype": "float64"}},),
    *({"ndarray": ["int32", [2, 3]], "detail": {"dtype": "O"}},),
    *({"ndarray": ["uint8", [2, 8]], "detail": {"dtype": "<U999999999"}},),
    *({"tensor": ["float32", [3, 4]], "tied_to": "shared"}, {"float": "00"}, {"complex": [1]}),
)


def mutate_json(record: Any, choose: random.Random, value: Any) -> Any:
    """The record with one entry replaced, removed, doubled, emptied or renamed."""
    places: list[tuple[Any, Any]] = []
    todo = [record]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and node[key]:
                todo.append(node[key])
    parent, key = choose.choice(places)
    action = choose.choice(("replace",) * 6 + ("delete", "double", "rename", "deepen", "swap"))
    if action == "delete":
        del parent[key]
    elif action == "double" and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif action == "rename" and isinstance(parent, dict):
        parent[str(value)[:300]] = parent.pop(key)
    elif action == "deepen":
        parent[key] = f"@{choose.choice(tuple(DEEP))}@"
    elif action == "swap":
        other, place = choose.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            parent[key], other[place] = other[place], parent[key]
    else:
        parent[key] = value
    return record


def damage_bytes(path: Path, choose: random.Random) -> None:
    """Flips bits, cuts, lengthens, removes, or replaces it by another file of the checkpoint."""
    data = bytearray(path.read_bytes())
    kinds = ("flip", "flip", "flip", "cut", "add", "zero", "remove", "swap", "folder")
    action = choose.choice(kinds)
    if action == "flip" and data:
        for _ in range(choose.choice((1, 1, 3, 20))):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif action == "cut":
        del data[choose.randrange(len(data) + 1) :]
    elif action == "add":
        data += choose.randbytes(choose.choice((1, 100)))
    elif action == "zero" and data:
        start = choose.randrange(len(data))
        data[start : start + 50] = bytes(len(data[start : start + 50]))
    elif action == "swap":
        data[:] = choose.choice(files_of(path.parent)).read_bytes()
    path.unlink()
    if action == "folder":
        path.mkdir()
    elif action != "remove":
        path.write_bytes(data)


def files_of(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file())


def contents(path: Path) -> dict[str, bytes | None]:
    return {
        str(each.relative_to(path)): None if each.is_dir() else each.read_bytes()
        for each in path.rglob("*")
    }


def bytes_of_any_file(site: Site, choose: random.Random, value: Any) -> None:
    del value
    damage_bytes(choose.choice(files_of(site.path)), choose)


def bytes_of_the_database(site: Site, choose: random.Random, value: Any) -> None:
    del value
    names = [f for f in files_of(site.path) if f.suffix in (".ocdbt", ".safetensors", ".bin")]
    damage_bytes(choose.choice(names), choose)


def sealed_item(site: Site, choose: random.Random, value: Any) -> None:
    record = json.loads((site.path / "tree" / EXTENSION).read_bytes())
    site.seal_item(mutate_json(record, choose, value))


def sealed_step(site: Site, choose: random.Random, value: Any) -> None:
    record = json.loads((site.path / EXTENSION).read_bytes())
    site.seal_step(mutate_json(record, choose, value))


def small_json(site: Site, choose: random.Random, value: Any) -> None:
    """A foreign JSON file, with a corrected digest."""
    name = choose.choice(("_CHECKPOINT_METADATA", "config/metadata"))
    record = mutate_json(json.loads((site.path / name).read_text()), choose, value)
    data = dump(record)
    (site.path / name).write_bytes(data)
    if (site.path / EXTENSION).exists():
        step = json.loads((site.path / EXTENSION).read_bytes())
        step["files"][name] = [len(data), records.digest_hex(data)]
        site.seal_step(step)


def orbax_metadata(site: Site, choose: random.Random, value: Any) -> None:
    name = choose.choice(("tree/_METADATA", "tree/_METADATA", "tree/_strings.json"))
    if not (site.path / name).exists():
        name = "tree/_METADATA"
    record = mutate_json(json.loads((site.path / name).read_text()), choose, value)
    (site.path / name).write_bytes(dump(record))


def array_metadata(site: Site, choose: random.Random, value: Any) -> None:
    """A `zarr.json` inside the database, or a `.zarray` among plain files."""
    plain = sorted((site.path / "tree").glob("*/.zarray"))
    if plain:
        path = choose.choice(plain)
        path.write_bytes(dump(mutate_json(json.loads(path.read_text()), choose, value)))
        return
    store = ts.KvStore.open(
        {"driver": "ocdbt", "base": f"file://{site.path}/tree/"},
        context=ts.Context({"cache_pool": {"total_bytes_limit": 0}}),
    ).result()
    names = [key.decode() for key in store.list().result() if key.endswith(b"zarr.json")]
    key = choose.choice(names)
    record = json.loads(store.read(key).result().value)
    store.write(key, dump(mutate_json(record, choose, value))).result()


KINDS: dict[str, tuple[Callable[[Path], None], tuple[Mutate, ...], bool]] = {
    # target, damage, and whether a successful restore must equal the saved values
    "bytes": (make_ours, (bytes_of_any_file,), True),
    "records": (make_ours, (sealed_item, sealed_item, sealed_step, small_json), False),
    "orbax": (make_foreign, (orbax_metadata, array_metadata, small_json), False),
    "zarr2": (make_zarr2, (orbax_metadata, array_metadata), False),
    "databases": (make_foreign, (bytes_of_the_database,), False),
}


# ------------------------------------------------------------------------------------ the trial


_FORBIDDEN = (
    *("pickle.", "os.exec", "os.posix_spawn", "os.system", "os.remove", "os.rename", "os.mkdir"),
    *("subprocess.", "socket.", "marshal.loads", "code.__new__", "ctypes.dlopen", "shutil."),
)


_LOOKING = ("open", "os.listdir", "os.scandir")


class Watch:
    """What happens in this process while a hostile checkpoint is open."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {arguments!r}")
        elif event in _LOOKING and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(self.allowed):
                self.seen.append(f"{event} {path}")


def try_everything(
    path: Path, expected: Any, watch: Watch, choose: random.Random | None = None
) -> bool:
    """Opens a checkpoint in every way, or in some; whether any of them refused."""
    refused = False
    target = {"tree": items()["tree"], "config": None}
    is_changed = expected is not None and contents(path) != contents(path.with_name("good"))

    def verified() -> None:
        findings = checkpoint.verify_checkpoint(LocalStorage(), str(path))
        # Of our own checkpoints not one bit may change unseen.
        assert findings or not is_changed, "verify saw nothing"

    actions: list[Callable[[], Any]] = [
        lambda: fc.restore(path),
        lambda: fc.restore(path, verify="first"),
        lambda: fc.restore(path, target, strict=False, cast=True),
        lambda: fc.restore(path, only="tree.b*"),
        lambda: fc.metadata(path),
        verified,
        lambda: fc.restore(path, verify=False),
    ]
    watch.allowed = (str(path), *_PYTHONS_OWN)
    for number, action in enumerate(actions):
        if choose is not None and number and choose.random() < 0.5:
            continue  # each way is tried on half of the trials, the plain one on all
        try:
            got = action()
        except fc.CheckpointError as error:
            refused = True
            str(error)
        else:
            if expected is not None and number < 2:
                assert testing.differences(dict(got), expected) == []
            assert SECRET not in shown(got) and "31337" not in shown(got)
    watch.allowed = None
    assert watch.seen == [], watch.seen
    return refused


def shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python does not print integers of thousands of digits, which are allowed
        return ""


# Modules that are imported late, and the system's own files.
_PYTHONS_OWN = (*{sys.prefix, sys.base_prefix, os.path.dirname(fc.__file__)}, "/proc", "/sys")


def run(kind: str, number: int) -> dict[str, Any]:
    make, mutations, must_equal = KINDS[kind]
    watch = Watch()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        root = Path(folder)
        make_canaries(root)
        make(root / "good")
        expected = dict(fc.restore(root / "good"))
        try_everything(root / "good", expected, watch)
        limit = _memory_bytes() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts = {"refused": 0, "harmless": 0}

        @hypothesis.settings(
            max_examples=number,
            database=None,
            deadline=None,
            derandomize=True,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(
            st.sampled_from(mutations), st.integers(0, 2**32), st.sampled_from(HOSTILE)
        )
        def trial(mutate: Mutate, seed: int, value: Any) -> None:
            path = root / "bad"
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(root / "good", path)
            choose = random.Random(seed)
            mutate(Site(path), choose, json.loads(json.dumps(value)))
            refused = try_everything(path, expected if must_equal else None, watch, choose)
            counts["refused" if refused else "harmless"] += 1

        trial()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**counts, "grown_kib": grown}


def _memory_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]))))
