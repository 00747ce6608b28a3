"""One set of bytes, every reader: a step as it is on disk, opened by the programs of others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import meshes
import pytest
import safetensors
import torch
import torch.distributed.checkpoint as dcp
import transformers
from gloo_workers import Workers
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.nn.parallel import DistributedDataParallel

import functional_ckpt as fc
from functional_ckpt import interop
from functional_ckpt.core.files import file_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def bert() -> Any:
    """A model with tied weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return transformers.BertForMaskedLM(config)


def resnet() -> Any:
    """A model with counters: buffers without dims."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    model = transformers.ResNetForImageClassification(config).train()
    model(torch.randn(2, 3, 32, 32))
    return model


MODELS = {"tied": bert, "counters": resnet}


def check_pretrained(model: Any, item: Path) -> None:
    """The item's directory gives an equal model, with nothing missing and nothing left."""
    loaded, report = type(model).from_pretrained(item, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype, name


@pytest.mark.parametrize("num_files", [1, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_a_directory_of_the_hub(
    kind: str, num_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if num_files > 1:
        monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 1)
    model = MODELS[kind]()
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(3, {"model": model})
    item = tmp_path / "3" / "model"
    check_pretrained(model, item)
    names = {path.name for path in item.glob("*.safetensors")}
    expected = {f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)}
    assert names == (expected if num_files > 1 else {"model.safetensors"})
    assert (item / "model.safetensors.index.json").exists() == (num_files > 1)
    assert interop.open(item).format == "step"
    assert len(interop.open(item, format="huggingface")["model"]) == len(model.state_dict())


def test_a_model_of_another_dtype_comes_back_in_it(tmp_path: Path) -> None:
    model = bert().to(torch.bfloat16)
    fc.save(tmp_path / "x", {"model": model})
    check_pretrained(model, tmp_path / "x" / "model")


def test_other_items_are_valid_files_and_no_model(tmp_path: Path) -> None:
    tree = {
        "w": torch.randn(5, 7).bfloat16(),
        "n": 3,
        "complex": torch.ones(2, dtype=torch.complex128),
        "__metadata__": torch.arange(3),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    fc.save(tmp_path / "x", {"tree": tree, "part": fc.Module(bert(), only="cls.*")})
    item = tmp_path / "x" / "tree"
    assert {path.name for path in item.iterdir() if path.suffix in (".safetensors", ".bin")} == {
        "data.safetensors",
        "chunks.bin",
    }
    with safetensors.safe_open(item / "data.safetensors", "pt") as file:
        assert set(file.keys()) == {"w", "empty", "scalar"}
        assert torch.equal(file.get_tensor("w"), tree["w"])
    assert not (tmp_path / "x" / "part" / "config.json").exists()
    restored = fc.restore(tmp_path / "x")["tree"]
    assert torch.equal(restored["__metadata__"], tree["__metadata__"])
    assert torch.equal(restored["complex"], tree["complex"])


# ------------------------------------------------------------------------------------ ranks


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers()
    yield started
    started.close()


def save_ddp(directory: Path, kind: str) -> None:
    model = DistributedDataParallel(MODELS[kind]())
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, {"model": model})


@pytest.mark.parametrize("kind", MODELS)
def test_ranks_of_a_replicated_model_write_a_directory_of_the_hub(
    kind: str, tmp_path: Path, workers: Workers
) -> None:
    workers.run(2, save_ddp, tmp_path, kind)
    item = tmp_path / "0" / "model"
    assert {path.name for path in item.glob("*.safetensors")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    check_pretrained(MODELS[kind](), item)
    index = json.loads((item / "model.safetensors.index.json").read_bytes())
    sizes = [path.stat().st_size for path in item.glob("*.safetensors")]
    assert index["metadata"]["total_size"] < sum(sizes) < index["metadata"]["total_size"] + 30_000


def save_mesh(directory: Path, layout: meshes.Layout) -> None:
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, {"tree": meshes.tree(layout, filled=True)})


@pytest.mark.parametrize("layout", [(2,), (4,), (2, 2)], ids=str)
def test_torch_reads_the_shards(layout: meshes.Layout, tmp_path: Path, workers: Workers) -> None:
    workers.run(math.prod(layout), save_mesh, tmp_path, layout)
    item = tmp_path / "0" / "tree"
    names = {path.name for path in item.glob("*.safetensors")}
    assert names == {f"shard-{r:05d}-data.safetensors" for r in range(math.prod(layout))}
    expected = {n: meshes.whole(n, shape, dtype) for n, shape, dtype, _ in meshes.names(layout)}
    got = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(got, storage_reader=HuggingFaceStorageReader(str(item)), no_dist=True)
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    restored = fc.restore(tmp_path / "0")["tree"]
    assert [n for n in restored if not torch.equal(restored[n], expected[n])] == []
