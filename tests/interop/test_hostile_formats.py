"""Foreign files that are damaged or made to harm: a clear error, soon, and without their memory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from full import IS_FULL
from hypothesis import strategies as st

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.interop import neuronx, pickles, training_state

SPARE_KIB = 64 * 2**10


def opened(path: Path, format: str | None = None) -> dict[str, Any]:
    """Everything that can be read of a checkpoint."""
    return dict(fc.interop.open(path, format))


def refuse(path: Path, read: Callable[[Path], Any] = opened) -> errors.CheckpointError:
    """Reads a file that must be refused, quickly and with little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, seconds = timed_refusal(path, read)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < SPARE_KIB
    if seconds >= 2:  # cores that are shared make processor time longer: once more, undisturbed
        found, seconds = timed_refusal(path, read)
    assert seconds < 2
    return found


def timed_refusal(path: Path, read: Callable[[Path], Any]) -> tuple[errors.CheckpointError, float]:
    """Returns the error, and the seconds of processor time until it was raised."""
    start = time.process_time()
    with pytest.raises(errors.CheckpointError) as caught:
        read(path)
    return caught.value, time.process_time() - start


# ------------------------------------------------------------------------------------ pickles


def from_above(count: int) -> bytes:
    """Lists that hold the next one twice; each grows after the one before it holds it."""
    empty = b"".join(b"]q" + bytes([number]) for number in range(count))
    pairs = (
        b"h" + bytes([number]) + (b"h" + bytes([number + 1]) + b"a") * 2
        for number in range(count - 1)
    )
    return b"\x80\x02}X\x01\x00\x00\x00x(" + empty + b"".join(pairs) + b"ts."


BOMBS = {
    "memo": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "memo of 150 million": b"\x80\x02Nr" + struct.pack("<I", 150_000_000) + b".",
    "memo as text": b"\x80\x02Np2147483640\n.",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"aaaa.",
    "long bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"aaaa.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**63 + 5) + b"N.",
    "doubled": b"\x80\x02)" + b"2\x86" * 60 + b".",
    "doubled by memo": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b".",
    "doubled key": b"\x80\x02}" + b")" + b"2\x86" * 60 + b"Ns.",
    "doubled from above": from_above(60),
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuple": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "records in records": b"\x80\x02N" + b"\x85q\x00ca\nb\nh\x00R" * 200_000 + b".",
    "records side by side": b"\x80\x02ca\nb\nq\x00(" + b"h\x00)R" * 80_000 + b"t.",
    "lists side by side": b"\x80\x02(" + b"]" * 300_000 + b"t.",
    "many classes": b"\x80\x02(" + b"".join(b"ca\nb%d\n" % n for n in range(50_000)) + b"t.",
    "nothing": b"",
    "mark": b"\x80\x02(a.",
    "buffer": b"\x80\x05\x97.",
    "digits": b"\x80\x02I" + b"9" * 5000 + b"\n.",
    "call": b"(cposix\nsystem\nVtrue\no.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_asks_for_more_than_it_holds_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(BOMBS[name])
    (folder / "__0_0.distcp").write_bytes(b"")
    refuse(folder)


IN_ARCHIVES = ["memo", "doubled", "doubled by memo", "doubled key", "doubled from above", "nothing"]


@pytest.mark.parametrize("name", [*IN_ARCHIVES, "deep", "deep tuple", "lists side by side"])
def test_an_archive_with_such_a_pickle_is_refused(name: str, tmp_path: Path) -> None:
    refuse(archive(tmp_path / "x.pt", BOMBS[name]))


def test_ordinary_pickles_are_read_as_they_were() -> None:
    shared = {"a": list(range(500)), "dtype": torch.bfloat16, "size": torch.Size([2, 3])}
    content = {"items": [shared] * 1000, "deep": [[[[1]]]], ("k", 1): (1, (2, 3))}
    for protocol in range(6):
        assert pickles.read_inert(pickle.dumps(content, protocol), "x") == content


# ------------------------------------------------------------------------------------ torch.save


def archive(
    path: Path, data: bytes, *, compress: bool = False, extra: dict[str, bytes] | None = None
) -> Path:
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        for name, content in (extra or {}).items():
            file.writestr(f"archive/{name}", content)
    return path


def test_tensors_that_repeat_a_few_bytes_are_not_expanded(tmp_path: Path) -> None:
    for number, shape in enumerate(((2**40,), (2**20, 2**20), (2**16, 2**16))):
        path = tmp_path / f"{number}.pt"
        torch.save({"model": {"w": torch.zeros(1).expand(shape)}}, path)
        assert path.stat().st_size < 10_000
        assert "repetition" in str(refuse(path))
    fine = tmp_path / "fine.pt"
    torch.save({"model": {"w": torch.ones(3).expand(1000, 3)}}, fine)
    assert opened(fine)["model"]["w"].shape == (1000, 3)


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", b"\x80\x02N." + bytes(200 * 2**20), compress=True)
    assert path.stat().st_size < 2**20
    assert "unpack" in str(refuse(path))


def test_changed_bits_of_a_torch_file_are_refused_or_harmless(tmp_path: Path) -> None:
    good = tmp_path / "good.pt"
    torch.save({"model": {"w": torch.arange(100.0)}, "s": [torch.ones(3)] * 2, "e": 3}, good)
    fuzz(good.read_bytes(), tmp_path / "bad.pt", opened)


def fuzz(data: bytes, path: Path, read: Callable[[Path], Any]) -> None:
    """Flips bits in many ways: every error must be one of this package."""

    @hypothesis.settings(
        max_examples=500 if IS_FULL else 40, database=None, deadline=None, derandomize=True
    )
    @hypothesis.given(st.integers(0, 2**32), st.sampled_from((1, 3, 30)), st.booleans())
    def trial(seed: int, count: int, is_cut: bool) -> None:
        choose = random.Random(seed)
        changed = bytearray(data)
        for _ in range(count):
            changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
        path.write_bytes(changed[: choose.randrange(len(changed))] if is_cut else changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(errors.CheckpointError):
                read(path)

    trial()


# ------------------------------------------------------------------------------------ DCP


@pytest.fixture
def dcp(tmp_path: Path) -> Path:
    import torch.distributed.checkpoint as checkpoint

    path = tmp_path / "dcp"
    state = {"model": {"w": torch.arange(1000.0), "v": torch.ones(5)}, "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(path), no_dist=True)
    return path


def test_changed_bits_of_a_dcp_index_are_refused_or_harmless(dcp: Path) -> None:
    index = dcp / ".metadata"
    fuzz(index.read_bytes(), index, lambda _: opened(dcp))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("offset", value) for value in (-1, 2**62, 2**70, "x", None, float("nan"))),
        *(("length", value) for value in (-1, 2**33, 2**62, float("inf"))),
        *(("relative_path", value) for value in ("../x", "/etc/passwd", "a\0", ".", "", ["x"])),
    ],
)
def test_a_dcp_index_that_names_what_is_not_there_is_refused(
    field: str, value: Any, dcp: Path
) -> None:
    metadata: Any = pickle.loads((dcp / ".metadata").read_bytes())
    (key,) = [key for key in metadata.storage_data if key.fqn == "model.w"]
    setattr(metadata.storage_data[key], field, value)
    (dcp / ".metadata").write_bytes(pickle.dumps(metadata))
    error = refuse(dcp)
    if value == -1:
        assert f"{field} of 'model.w'" in str(error) or "'model.w' is incomplete" in str(error)


@pytest.mark.parametrize(
    "keys",
    [([1],), (), tuple("a" * 50_000), "model", 5],
    ids=["list", "none", "deep", "str", "int"],
)
def test_keys_of_a_dcp_index_that_make_no_sense_are_refused_or_harmless(
    keys: Any, dcp: Path
) -> None:
    metadata: Any = pickle.loads((dcp / ".metadata").read_bytes())
    metadata.planner_data["model.w"] = keys
    (dcp / ".metadata").write_bytes(pickle.dumps(metadata))
    with contextlib.suppress(errors.CheckpointError):
        opened(dcp)


# ------------------------------------------------------------------------------------ safetensors


def _tensor(dtype: str, shape: list[int], start: int, end: int) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})


@pytest.mark.parametrize(
    ("header", "size_bytes"),
    [
        (f'{{"a": {_tensor("U8", [4], 0, 4)}, "b": {_tensor("U8", [4], 2, 6)}}}', 6),  # overlap
        (f'{{"a": {_tensor("U8", [4], 1, 5)}}}', 5),  # hole
        (f'{{"a": {_tensor("U8", [4], 0, 4)}}}', 5),  # tail
        (f'{{"a": {_tensor("U8", [4], 0, 4)}, "a": {_tensor("I8", [4], 0, 4)}}}', 4),  # twice
        (f'{{"a": {_tensor("U8", [2**63], 0, 2**63)}}}', 4),
        (f'{{"a": {_tensor("U8", [2**32, 2**32], 0, 4)}}}', 4),
        (f'{{"a": {_tensor("U8", [-4, -1], 0, 4)}}}', 4),
        ('{"a": ' * 50_000, 4),
    ],
)
def test_a_hostile_header_of_safetensors_is_refused(
    header: str, size_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    length = len(header).to_bytes(8, "little")
    path.write_bytes(length + header.encode() + bytes(size_bytes))
    assert "model.safetensors" in str(refuse(path))
    assert "model.safetensors" in str(refuse(tmp_path))  # a directory of the hub


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 100])
def test_a_hostile_length_of_a_header_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    refuse(path)
    refuse(path, lambda path: opened(path, "safetensors"))
    refuse(tmp_path)


# ------------------------------------------------------------------------------------ the others


@pytest.mark.parametrize(
    "weight_map",
    [
        *(
            {"w": value}
            for value in (["x"], {}, 5, None, "../x", "/etc/passwd", "a\0b", "a" * 5000)
        ),
        *(["w"], {}, "w", {"w": "junk.bin"}, {"w": "model.safetensors.index.json"}),
    ],
)
def test_an_index_of_weights_that_names_no_file_is_refused(weight_map: Any, tmp_path: Path) -> None:
    (tmp_path / "junk.bin").write_bytes(b"junk" * 10)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refuse(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, "\ud800", "", "[1]", "NaN"])
def test_an_index_that_is_no_json_object_is_refused(content: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode(errors="surrogatepass"))
    refuse(tmp_path)


def test_an_index_that_claims_to_be_endless_is_not_read(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    os.truncate(index, 2**40)
    assert "holes" in str(refuse(tmp_path))


@pytest.mark.parametrize("number", [99_999_999, 10**60])
def test_a_name_of_a_rank_is_no_reason_to_count_to_it(number: int, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    name = f"dp_rank_{number}_tp_rank_{number}_pp_rank_{number}.pt"
    torch.save({}, tmp_path / "model" / name)
    assert "missing" in str(refuse(tmp_path))
    stem = f"dp_rank_00_tp_rank_00_pp_rank_{number}"
    with pytest.raises(errors.CorruptCheckpointError, match="missing"):
        neuronx.parse_ranks([stem], "x")
    with pytest.raises(errors.CorruptCheckpointError, match="one rank"):
        neuronx.parse_ranks(
            ["dp_rank_0_tp_rank_0_pp_rank_0", "dp_rank_00_tp_rank_00_pp_rank_00"], "x"
        )


@pytest.mark.parametrize("state", [[1], 1, "x"])
def test_a_rank_that_holds_no_state_dict_is_refused(state: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save(state, tmp_path / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt")
    refuse(tmp_path)


@pytest.mark.parametrize("shard", [[1, 2], {"a": 1, 2: torch.ones(1)}, "x", {1.5: 2}])
def test_invalid_optimizer_shard_is_refused(shard: Any, tmp_path: Path) -> None:
    index = {"weight_map": {"0": "s.bin"}, "metadata": {"param_groups": "g.bin"}}
    (tmp_path / "pytorch_optim.bin.index.json").write_text(json.dumps(index))
    torch.save(shard, tmp_path / "s.bin")
    torch.save([], tmp_path / "g.bin")
    refuse(tmp_path)


def test_a_file_system_error_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "x.pt")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(errors.StorageError) as caught:
        opened(tmp_path / "x.pt")
    assert caught.value.errno == 5


@pytest.mark.parametrize("content", [{}, {"python": 1}, None, 3])
def test_states_of_generators_that_are_none_are_damage(content: Any) -> None:
    with pytest.raises(errors.CorruptCheckpointError, match="not the state of Python's"):
        training_state.rng_state(content, "x")
