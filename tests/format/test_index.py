"""Trees of any height: written by this package and by TensorStore, read by both, hostile ones too.

A tree is as high as its nodes are small: tests lower the size of a node.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from written_items import write_by_tensorstore, write_item

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.records import orbax
from functional_ckpt.format import (
    backends,
    database,
    index,
    node_tree,
    ocdbt,
    ocdbt_decode,
    ocdbt_tree,
    tensorstore_index,
)
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.format.read_store import StoreReader
from functional_ckpt.format.write_files import ArrayWrite
from functional_ckpt.storage.local import LocalStorage

STORAGE = LocalStorage()
NAMES = st.lists(st.text("ab./c", min_size=1, max_size=6), min_size=1, max_size=80, unique=True)
SPEC = ArraySpec((4,), "int32")
GRID = ChunkGrid((4,), (4,))


def entries_of(names: Sequence[str], num_files: int = 3) -> ocdbt.Entries:
    entries = ocdbt.Entries()
    for number, name in enumerate(names):
        entries.add(name.encode(), number % num_files, number * 7, 200 + number)
    return entries


class Tree:
    """An encoded tree in memory."""

    def __init__(
        self, entries: ocdbt.Entries, num_files: int = 3, runs: Sequence[ocdbt_tree.Run] = ()
    ) -> None:
        self.data = bytearray()
        self.fetched: list[ocdbt.Span] = []
        files = [f"d/{number}" for number in range(num_files)]
        self.root = ocdbt_tree.encode_tree(files, entries, self.append, runs)

    def append(self, node: bytes) -> ocdbt.Span:
        self.data += node
        return ocdbt.Span("d/tree", len(self.data) - len(node), len(node))

    def read_spans(self, spans: Sequence[ocdbt.Span]) -> list[Any]:
        self.fetched += spans
        return [bytes(self.data[span.offset : span.offset + span.length]) for span in spans]

    def open(self, root: ocdbt.Root | None = None, *, skips_damage: bool = False) -> index.Index:
        fetch = index._decoded(self.read_spans)
        tree = node_tree.NodeTree("item", fetch, root or self.root, skips_damage=skips_damage)
        return index.Index("item", tree, self.read_spans)


def rows(opened: index.Index) -> dict[bytes, tuple[str, int, int]]:
    return {
        key: (opened.files[file], offset, length)
        for key, (file, offset, length) in opened.locations.items()
    }


def expected_rows(entries: ocdbt.Entries) -> dict[bytes, tuple[str, int, int]]:
    columns = zip(entries.files, entries.offsets, entries.lengths, strict=True)
    return {
        key: (f"d/{file}", offset, length)
        for key, (file, offset, length) in zip(entries.keys, columns, strict=True)
    }


# ------------------------------------------------------------------------------------ one encoding


@given(NAMES, st.sampled_from([1, 200, 1000, 2_000_000]), st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_tree_decodes_to_its_entries(names: list[str], node_bytes: int, random: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocdbt_tree, "MAX_NODE_BYTES", node_bytes)
        entries = entries_of(names)
        tree = Tree(entries)
    expected = expected_rows(entries)
    opened = tree.open()
    opened.load(None)
    assert rows(opened) == expected
    wanted = [name.encode() for name in random.sample(names, min(3, len(names)))]
    opened = tree.open()
    opened.load([*wanted, b"", b"zz"])  # keys that are not there are no error
    found = rows(opened)
    assert {key: found[key] for key in wanted} == {key: expected[key] for key in wanted}
    assert tree.root.num_keys == len(names)
    assert tree.root.tree_bytes == len(tree.data)
    assert tree.root.value_bytes == sum(entries.lengths)


def run_of(name: str, count: int, first_file: int, num_files: int = 3) -> ocdbt_tree.Run:
    keys = sorted(str(number).encode() for number in range(count))
    numbers = np.arange(count)
    return ocdbt_tree.Run(
        f"{name}/c/".encode(),
        ocdbt_tree.RunKeys.of(keys),
        (numbers + first_file) % num_files,
        numbers * 301,
        300,
    )


def listed(entries: ocdbt.Entries, runs: Sequence[ocdbt_tree.Run]) -> ocdbt.Entries:
    """Single keys and those of runs."""
    every = ocdbt.Entries([*entries.keys], entries.files[:], entries.offsets[:], entries.lengths[:])
    for run in runs:
        for number, (file, offset) in enumerate(zip(run.files, run.offsets, strict=True)):
            every.add(run.key(number), int(file), int(offset), run.length)
    return every


@given(
    st.lists(st.text("ab./c", min_size=1, max_size=4), max_size=20, unique=True),
    st.dictionaries(st.text("ab/c", min_size=1, max_size=4), st.integers(1, 40), min_size=1),
    st.sampled_from([1, 200, 1000, 2_000_000]),
    st.sampled_from([2, 8, 256]),
)
@settings(max_examples=25, deadline=None)
def test_runs_are_the_same_keys_one_by_one(
    names: list[str], counts: dict[str, int], node_bytes: int, run_keys: int
) -> None:
    entries = entries_of([f"{name}/zarr.json" for name in names])
    runs = [run_of(name, count, len(name)) for name, count in counts.items()]
    expected = expected_rows(listed(entries, runs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocdbt_tree, "MAX_NODE_BYTES", node_bytes)
        patch.setattr(ocdbt_tree, "RUN_KEYS", run_keys)
        tree = Tree(entries, runs=runs)
    opened = tree.open()
    opened.load(None)
    assert rows(opened) == expected
    assert tree.root.num_keys == len(expected)
    assert tree.root.value_bytes == sum(length for _, _, length in expected.values())


def test_a_part_of_many_runs_reads_few_locations() -> None:
    runs = [run_of(f"layers.{number:03}", 4096, 0) for number in range(50)]
    entries = entries_of([f"layers.{number:03}/zarr.json" for number in range(50)])
    opened = Tree(entries, runs=runs).open()
    opened.load([f"layers.{number:03}/c/77".encode() for number in range(50)])
    assert len(opened.locations) <= 50 * (ocdbt_tree.RUN_KEYS + 1)


def test_tensorstore_reads_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocdbt_tree, "RUN_KEYS", 8)
    names = [f"shard-{number:05}-data" for number in range(40)]
    runs = [run_of(name, count, 1, 40) for name, count in (("a", 40), ("a.b", 7), ("c", 16))]
    entries = entries_of(["a/zarr.json", "b/c/0", "b/zarr.json"], 40)
    data = bytearray()

    def append(node: bytes) -> ocdbt.Span:
        data.extend(node)
        return ocdbt.Span("index.ocdbt", len(data) - len(node), len(node))

    root = ocdbt_tree.encode_tree(names, entries, append, runs)
    (tmp_path / "index.ocdbt").write_bytes(data)
    (tmp_path / orbax.MANIFEST).write_bytes(ocdbt.encode_manifest(root, 1))
    content = {name: np.random.default_rng(len(name)).bytes(40_000) for name in names}
    for name, values in content.items():
        (tmp_path / name).write_bytes(values)
    store = ts.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}}
    ).result()
    every = listed(entries, runs)
    assert sorted(store.list().result()) == sorted(every.keys)
    columns = zip(every.files, every.offsets, every.lengths, strict=True)
    for key, (file, offset, length) in zip(every.keys, columns, strict=True):
        assert store[key] == content[names[file]][offset : offset + length]


def test_an_array_may_be_called_like_a_chunk() -> None:
    entries = entries_of(["a/c/1/zarr.json", "a/zarr.json"])
    runs = [run_of("a", 600, 0), run_of("a/c/1", 600, 1)]
    expected = expected_rows(listed(entries, runs))
    opened = Tree(entries, runs=runs).open()
    opened.load(None)
    assert rows(opened) == expected


def test_only_nodes_of_wanted_keys_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocdbt_tree, "MAX_NODE_BYTES", 500)
    tree = Tree(entries_of([f"layers.{number:04}/c/0" for number in range(2000)]))
    assert tree.root.height > 1
    opened = tree.open()
    assert tree.fetched == []
    for _ in range(2):  # a node is read once
        opened.load([b"layers.0003/c/0", b"layers.0004/c/0"])
        assert len(tree.fetched) <= tree.root.height + 2
    opened.load(None)
    assert len(opened.locations) == 2000
    assert len(tree.fetched) == len(set(tree.fetched))


def test_any_changed_byte_is_noticed() -> None:
    tree = Tree(entries_of(["a/c/0", "a/zarr.json"]))
    manifest = ocdbt.encode_manifest(tree.root, 1)
    assert ocdbt_decode.decode_manifest(manifest) == ocdbt.Root(tree.root.span, 0)
    leaf = bytes(tree.data)
    for data, decode in ((leaf, node_of), (manifest, ocdbt_decode.decode_manifest)):
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= 0x41
            assert decode(bytes(changed)) is None
        for end in range(len(data)):
            assert decode(data[:end]) is None


def node_of(data: bytes) -> ocdbt_decode.DecodedNode | None:
    with contextlib.suppress(ocdbt_decode.InvalidNodeError):
        return ocdbt_decode.decode_node(data)
    return None


# ------------------------------------------------------------------------------------ all writers


def writes_of(names: Iterable[str]) -> list[ArrayWrite]:
    return [
        ArrayWrite(name, SPEC, GRID, Box.whole((4,)), np.full(4, number, np.int32))
        for number, name in enumerate(names)
    ]


def write_small_nodes(path: Path, writer: str, names: Sequence[str]) -> None:
    """Writes a database of several levels."""
    path.mkdir()
    writes = writes_of(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocdbt_tree, "MAX_NODE_BYTES", 1000)
        if writer == "one rank":
            write_item(STORAGE, str(path), writes)
        elif writer == "ranks":
            write_item(STORAGE, str(path), *(writes[rank::3] for rank in range(3)))
        else:
            values: dict[str, bytes] = {}
            for write in writes:
                metadata = orbax.zarr3_metadata(SPEC, GRID.chunk_shape)
                values[f"{write.name}/zarr.json"] = json.dumps(metadata).encode()
                values[f"{write.name}/c/0"] = write.data.tobytes()
            inline_bytes = 0 if writer == "not inline" else 1024
            write_by_tensorstore(str(path), values, node_bytes=3000, inline_bytes=inline_bytes)


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "store"])
@pytest.mark.parametrize("writer", ["one rank", "ranks", "tensorstore", "not inline"])
def test_trees_of_every_writer_are_read_by_every_reader(
    tmp_path: Path, writer: str, is_remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"block.{number % 7}.w{number}" for number in range(400)]
    path = tmp_path / "item"
    write_small_nodes(path, writer, names)
    if is_remote:
        monkeypatch.setattr(backends, "reader_of", lambda _, opened: StoreReader(opened))
        remote = database.open_files_for_reading(str(path), STORAGE)
        monkeypatch.setattr(index, "span_reader", lambda *_: tensorstore_index.read_spans(remote))
    fetched = count_nodes(monkeypatch)
    some = read(path, {number: names[number] for number in (5, 6, 399)})
    assert all((some[number] == number).all() for number in some)
    all_nodes = len(list(itertools.chain.from_iterable(tree_nodes(path))))
    assert 0 < len(fetched) < all_nodes / 2 and all_nodes > 10
    everything = read(path, dict(enumerate(names)))
    assert all((everything[number] == number).all() for number in everything)


def test_small_values_of_a_store_are_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key is read alone: values that are stored side by side are one request."""
    names = [f"w{number:03}" for number in range(300)]
    path = tmp_path / "item"
    write_small_nodes(path, "not inline", names)
    monkeypatch.setattr(backends, "reader_of", lambda _, opened: StoreReader(opened))
    remote = tensorstore_index.read_spans(database.open_files_for_reading(str(path), STORAGE))
    requests: list[ocdbt.Span] = []

    def read_spans(spans: Sequence[ocdbt.Span]) -> list[Any]:
        requests.extend(spans)
        return remote(spans)

    monkeypatch.setattr(index, "span_reader", lambda *_: read_spans)
    read(path, dict(enumerate(names)))
    assert 0 < len(requests) < 20


def read(path: Path, names: dict[int, str]) -> dict[int, np.ndarray]:
    memory = {number: np.zeros(4, np.int32) for number in names}
    requests = [
        ReadRequest(
            name,
            SPEC,
            Box.whole((4,)),
            GRID,
            destination=Destination(lambda number=number: memory[number], lambda: None),
        )
        for number, name in names.items()
    ]
    with contextlib.closing(backends.open_reader(STORAGE, str(path), {})) as reader:
        for task in reader.tasks(requests):
            task()
    return memory


def count_nodes(monkeypatch: pytest.MonkeyPatch) -> list[ocdbt.Span]:
    """Returns a list that gets every node that is read."""
    fetched: list[ocdbt.Span] = []
    original = node_tree.NodeTree._fetch_nodes

    def fetch(tree: node_tree.NodeTree, unread: Any) -> Any:
        fetched.extend(node.span for node in unread)
        return original(tree, unread)

    monkeypatch.setattr(node_tree.NodeTree, "_fetch_nodes", fetch)
    return fetched


def tree_nodes(path: Path) -> Iterable[list[str]]:
    """Yields the nodes of each level, according to TensorStore."""
    base = ts.KvStore.open(f"file://{path}/").result()
    level = [ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]]
    while level:
        yield level
        nodes = [ts.ocdbt.dump(base, location).result() for location in level]
        level = [e["location"] for node in nodes for e in node["entries"] if "location" in e]


@pytest.mark.parametrize("writer", ["one rank", "ranks"])
def test_tensorstore_reads_high_trees(tmp_path: Path, writer: str) -> None:
    names = [f"block.{number % 7}.w{number}" for number in range(400)]
    path = tmp_path / "item"
    write_small_nodes(path, writer, names)
    assert len(list(tree_nodes(path))) > 2
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    keys = sorted(key.encode() for name in names for key in (f"{name}/c/0", f"{name}/zarr.json"))
    assert sorted(store.list().result()) == keys
    prefix = store.list(ts.KvStore.KeyRange("block.3.", "block.4.")).result()
    assert sorted(prefix) == [key for key in keys if key.startswith(b"block.3.")]
    for number in (0, 99, 399):
        assert store[f"{names[number]}/c/0"] == np.full(4, number, np.int32).tobytes()
    store["block.3.new"] = b"x"  # it can add to it, in nodes of the same size
    assert len(store.list().result()) == len(keys) + 1
    assert (read(path, {7: names[7]})[7] == 7).all()


# ------------------------------------------------------------------------------------ hostile trees


class Forged(Tree):
    """Nodes whose every field is given."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.fetched = []

    def leaf(self, keys: Sequence[bytes], files: Sequence[str] = ("d/x",)) -> ocdbt.Span:
        column = np.zeros(len(keys), np.int64)
        part = ocdbt_tree.part_of(keys, column, column, column)
        table = ocdbt.encode_files(files)
        return self.append(ocdbt_tree.encode_leaf([part], table, ocdbt.varints(column)))

    def parent(
        self, height: int, children: Sequence[tuple[bytes, ocdbt.Span]], num_omitted: int = 0
    ) -> ocdbt.Span:
        """Appends a parent whose children omit the first bytes of their keys."""
        count, numbers = len(children), ocdbt.varints
        body = (
            bytes([height]) + ocdbt.encode_files(["d/tree"]) + numbers([count]),
            numbers([0] * (count - 1)) + numbers([len(key) for key, _ in children]),
            numbers([num_omitted] * count),
            *(key for key, _ in children),
            numbers([0] * count) + numbers([span.offset for _, span in children]),
            numbers([span.length for _, span in children]) + numbers([0] * count) * 3,
        )
        return self.append(ocdbt.seal(ocdbt.NODE_MAGIC, b"".join(body)))


def loop(tree: Forged) -> ocdbt.Root:
    """A node that refers to itself."""
    own = len(tree.data)
    for length in range(1, 200):
        del tree.data[own:]
        span = ocdbt.Span("d/tree", own, length)
        if tree.parent(1, [(b"a", span)]).length == length:
            return ocdbt.Root(span, 1)
    raise AssertionError


def bomb(tree: Forged) -> ocdbt.Root:
    """Two hundred levels of two references to the same node each."""
    span, height = tree.leaf([b"a"]), 0
    while height < 200:
        height += 1
        span = tree.parent(height, [(b"a", span), (b"b", span)], num_omitted=1)
    return ocdbt.Root(span, height)


def keys_bomb(tree: Forged) -> ocdbt.Root:
    """Keys that share 60,000 bytes each: gigabytes in memory."""
    count, long = 5000, b"k" * 60_000
    numbers = ocdbt.varints
    body = b"".join(
        (
            b"\0",
            ocdbt.encode_files(["d/x"]),
            numbers([count]),
            numbers([60_000] * (count - 1)),
            numbers([60_000] + [2] * (count - 1)),
            long,
            *(number.to_bytes(2, "big") for number in range(1, count)),
            numbers([0] * count) + b"\1" * count + numbers([0] * count) * 2,
        )
    )
    return ocdbt.Root(tree.append(ocdbt.seal(ocdbt.NODE_MAGIC, body)), 0)


def dolls(tree: Forged) -> ocdbt.Root:
    """Nodes inside of nodes: more bytes than the file has."""
    contents: list[bytes] = []
    for letter in (b"a", b"b", b"c"):
        tree.leaf([letter * 500 + b"".join(contents[-1:])])
        contents.append(bytes(tree.data))
        tree.data.clear()
    tree.data += contents[-1]
    spans = [ocdbt.Span("d/tree", tree.data.index(part), len(part)) for part in contents]
    return ocdbt.Root(tree.parent(1, list(zip((b"a", b"b", b"c"), spans, strict=True))), 1)


def prefixes(tree: Forged) -> ocdbt.Root:
    """A child that omits more than its key."""
    return ocdbt.Root(tree.parent(1, [(b"a", tree.leaf([b"a"]))], num_omitted=2), 1)


HOSTILE = {
    "loop": (loop, "has height 1, expected 0"),
    "bomb": (bomb, "repeated references"),
    "keys bomb": (keys_bomb, "bytes of keys"),
    "dolls": (dolls, "overlaps another node"),
    "prefixes": (prefixes, "longer than its key"),
    "order": (lambda t: ocdbt.Root(t.leaf([b"b", b"a"]), 0), "not in order"),
    "twice": (lambda t: ocdbt.Root(t.leaf([b"a", b"a"]), 0), "not in order"),
    "order of children": (
        lambda t: ocdbt.Root(t.parent(1, [(b"c", t.leaf([b"c"])), (b"b", t.leaf([b"b"]))]), 1),
        "not in order",
    ),
    "below": (
        lambda t: ocdbt.Root(t.parent(1, [(b"a", t.leaf([b"a"])), (b"c", t.leaf([b"b"]))]), 1),
        "outside the range",
    ),
    "above": (
        lambda t: ocdbt.Root(t.parent(1, [(b"a", t.leaf([b"d"])), (b"c", t.leaf([b"e"]))]), 1),
        "outside the range",
    ),
    "height": (lambda t: ocdbt.Root(t.leaf([b"a"]), 3), "has height 0, expected 3"),
    "file": (lambda t: ocdbt.Root(t.leaf([b"a"], ["../x"]), 0), "'../x', which is outside"),
    "out of the item": (
        lambda t: ocdbt.Root(ocdbt.Span("../x", 0, 9), 0),
        "'../x' is outside the item",
    ),
    "out of the file": (lambda t: ocdbt.Root(ocdbt.Span("d/tree", 0, 2**40), 0), "impossible"),
    "past the end": (lambda t: ocdbt.Root(ocdbt.Span("d/tree", 10**9, 50), 0), "is not one"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_a_hostile_tree_is_refused_by_name(case: str) -> None:
    forge, message = HOSTILE[case]
    tree = Forged()
    root = forge(tree)
    with pytest.raises(errors.CorruptCheckpointError, match=f"index node .*{message}"):
        tree.open(root).load(None)
    assert len(tree.fetched) < 2500
    skipping = tree.open(root, skips_damage=True)  # as verify does
    skipping.load(None)
    assert skipping.damaged and message in str(skipping.damaged[0].error)


def test_children_may_omit_a_prefix_of_their_keys() -> None:
    tree = Forged()
    span = tree.leaf([b"x", b"y"])
    span = tree.parent(1, [(b"b", span)], num_omitted=1)
    opened = tree.open(ocdbt.Root(tree.parent(2, [(b"a", span)], num_omitted=1), 2))
    opened.load([b"aby"])
    assert sorted(opened.locations) == [b"abx", b"aby"]


def test_intact_nodes_beside_a_damaged_one_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocdbt_tree, "MAX_NODE_BYTES", 500)
    names = [f"w{number:04}" for number in range(200)]
    tree = Tree(entries_of(names))
    tree.data[30] ^= 1  # in the first leaf
    opened = tree.open(skips_damage=True)
    opened.load(None)
    [damage] = opened.damaged
    assert damage.file == "d/tree" and opened.damage_of(b"w0000") == damage
    assert opened.damage_of(b"w0199") is None and b"w0199" in opened.locations
    tree.open().load([b"w0199"])
    with pytest.raises(errors.CorruptCheckpointError, match="checksum"):
        tree.open().load([b"w0000"])


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "d/../../x", ""])
def test_a_path_out_of_the_database_is_not_followed(tmp_path: Path, file: str) -> None:
    manifest = ocdbt.encode_manifest(ocdbt.Root(ocdbt.Span(file, 0, 9), 0), 1)
    (tmp_path / "manifest.ocdbt").write_bytes(manifest)
    with pytest.raises(errors.CorruptCheckpointError, match="is outside the item"):
        index.open_index(STORAGE, str(tmp_path))
