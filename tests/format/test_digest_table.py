"""Items of many digests: a reader reads the pages that it needs, and notices a changed one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.core.records import records
from functional_ckpt.format import digest_table, write_index
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify import verify_checkpoint

TREE = {f"w{number}": torch.arange(500.0 * (number % 9 + 1)) for number in range(80)}


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MAX_DIGESTS", 5)
        for module in (records, digest_table, write_index):
            patch.setattr(module, "PAGE_BYTES", 64)
        fc.save(tmp_path / "x", {"tree": {**TREE, "tied": TREE["w3"]}})
        yield tmp_path / "x"


def table_of(path: Path) -> records.DigestTable:
    table = records.parse_item((path / "tree" / "_FUNCTIONAL_CKPT").read_bytes(), "item").table
    assert table is not None and table.num_digests == len(TREE)
    return table


def test_values_are_verified_with_the_table(saved: Path) -> None:
    table_of(saved)
    for verify in ("first", "stream"):
        restored = fc.restore(saved, verify=verify)["tree"]
        assert testing.differences(restored, {**TREE, "tied": TREE["w3"]}) == []
    data = saved / "tree" / "data.safetensors"
    content = bytearray(data.read_bytes())
    content[-3] ^= 1
    data.write_bytes(content)
    with pytest.raises(errors.CorruptCheckpointError, match="changed after it was written"):
        fc.restore(saved)


def test_a_part_needs_few_pages(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[int] = []
    original = digest_table._Pages._page

    def count(self: digest_table._Pages, number: int) -> bytes:
        pages.append(number)
        return original(self, number)

    monkeypatch.setattr(digest_table._Pages, "_page", count)
    fc.restore(saved, {"tree": None}, only="tree.w7")
    assert len(set(pages)) == 1


def test_a_changed_table_is_damage_of_its_file(saved: Path) -> None:
    assert verify_checkpoint(LocalStorage(), str(saved)) == []
    index = saved / "tree" / "index.ocdbt"
    content = bytearray(index.read_bytes())
    content[table_of(saved).offset + 70] ^= 1
    index.write_bytes(content)
    with pytest.raises(errors.CorruptCheckpointError, match="digests at byte"):
        fc.restore(saved)
    (finding,) = verify_checkpoint(LocalStorage(), str(saved))
    assert finding.file == "tree/index.ocdbt" and len(finding.leaves) == 8


def test_a_hostile_table_is_refused(saved: Path) -> None:
    file = saved / "tree" / "_FUNCTIONAL_CKPT"
    record = records.verify_checksum(file.read_bytes(), "item")
    del record["xxh3"]
    name, offset, count, pages = record["digests"]
    for wrong in (
        ["missing", offset, count, pages],
        [name, 2**62, count, pages],
        [name, -1, count, pages],
        [name, offset, count + 1, pages],
        [name, offset, 2**60, pages],
        [name, offset, count, pages[:-16]],
        [name, offset, count],
        7,
    ):
        text = records.with_checksum({**record, "digests": wrong})
        with pytest.raises(errors.CorruptCheckpointError, match="malformed record"):
            records.parse_item(text, "item")
