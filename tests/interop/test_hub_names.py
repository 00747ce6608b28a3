"""Names in files of models are those of the Hugging Face hub; exports copy files as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from full import IS_FULL
from gloo_workers import Workers
from torch.distributed import device_mesh, fsdp

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.cli import app
from functional_ckpt.interop import huggingface, plain_files
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_TEXT: dict[str, Any] = {**_SMALL, "vocab_size": 64, "num_key_value_heads": 1}


class HeadFirst(transformers.LlamaForCausalLM):
    """A model in which the parameter that is tied to another comes first."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._modules = {"lm_head": self._modules.pop("lm_head"), **self._modules}


def renamed() -> Any:
    """A model with other names in memory than on the hub."""
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**_SMALL, image_size=8, patch_size=4)
    )


def converted() -> Any:
    """A model with other tensors in memory than on the hub."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TEXT, num_local_experts=2))


def tied() -> Any:
    """A model whose tied parameter comes first."""
    return HeadFirst(transformers.LlamaConfig(**_TEXT, tie_word_embeddings=True))


MODELS = {"renamed": renamed, "converted": converted, "tied": tied}


def stored_names(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


def check_pretrained(model: Any, directory: Path) -> None:
    loaded, report = type(model).from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def saved(kind: str, path: Path) -> Any:
    """Saves a model, and checks that its step is as before to this library."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    fc.save(path, {"model": model})
    assert checkpoint.verify_checkpoint(LocalStorage(), str(path), None) == []
    state = model.state_dict()
    restored = fc.restore(path)["model"]
    assert list(restored) == list(state)
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())
    return model


@pytest.mark.parametrize("kind", ["renamed", "tied"])
def test_files_have_the_names_that_transformers_would_write(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "step")
    model.save_pretrained(tmp_path / "own")
    assert stored_names(tmp_path / "step" / "model") == stored_names(tmp_path / "own")
    check_pretrained(model, tmp_path / "step" / "model")


@pytest.mark.parametrize("kind", ["renamed", "tied"])
def test_merged_and_cast_models_are_directories_of_the_hub(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "step")
    fc.transform.merge([tmp_path / "step"] * 3, tmp_path / "mean")
    assert stored_names(tmp_path / "mean" / "model") == stored_names(tmp_path / "step" / "model")
    check_pretrained(model, tmp_path / "mean" / "model")
    fc.transform.edit(tmp_path / "mean", tmp_path / "half", cast={"model": "bfloat16"})
    loaded = type(model).from_pretrained(tmp_path / "half" / "model")
    assert loaded.dtype == torch.bfloat16
    state = model.bfloat16().state_dict()
    assert all(torch.equal(state[name], each) for name, each in loaded.state_dict().items())


def test_a_model_with_other_tensors_claims_no_directory_of_the_hub(tmp_path: Path) -> None:
    model = saved("converted", tmp_path / "step")
    files = set(os.listdir(tmp_path / "step" / "model"))
    assert {"data.safetensors", "runtime.config.json"} <= files
    assert not {"config.json", "model.safetensors", "model.safetensors.index.json"} & files
    with pytest.raises(OSError, match="no file named"):
        type(model).from_pretrained(tmp_path / "step" / "model")


@pytest.mark.parametrize("max_shard_size", ["5GB", 2000] if IS_FULL else [2000])
@pytest.mark.parametrize("kind", MODELS)
def test_exports_have_the_names_that_transformers_would_write(
    kind: str, max_shard_size: str | int, tmp_path: Path
) -> None:
    model = saved(kind, tmp_path / "step")
    model.save_pretrained(tmp_path / "own")
    huggingface.export(tmp_path / "step", tmp_path / "out", max_shard_size=max_shard_size)
    assert stored_names(tmp_path / "out") == stored_names(tmp_path / "own")
    check_pretrained(model, tmp_path / "out")
    huggingface.save(model, tmp_path / "saved", max_shard_size=max_shard_size)
    assert stored_names(tmp_path / "saved") == stored_names(tmp_path / "own")
    check_pretrained(model, tmp_path / "saved")


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_files_that_need_no_change_are_copied(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    fc.save(tmp_path / "step", {"model": model})
    monkeypatch.setattr(plain_files, "write", None)
    out = tmp_path / ("out" if to == "hf" else "out.safetensors")
    assert app.main(["export", str(tmp_path / "step"), str(out), "--to", to]) == 0
    file = out / "model.safetensors" if to == "hf" else out
    stored = tmp_path / "step" / "model" / "model.safetensors"
    assert file.read_bytes() == stored.read_bytes() and file.stat().st_ino != stored.stat().st_ino
    data = bytearray(stored.read_bytes())
    data[-5] ^= 1
    stored.write_bytes(data)
    with pytest.raises(errors.CorruptCheckpointError, match="changed"):
        huggingface.export(tmp_path / "step", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_several_files_and_those_of_a_run_with_a_store_get_names_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functional_ckpt.core.files import file_plan

    monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 1)
    model = saved("tied", tmp_path / "step")
    folder = tmp_path / "step" / "model"
    assert len(list(folder.glob("*.safetensors"))) == 4
    monkeypatch.setattr(plain_files, "write", None)
    huggingface.export(tmp_path / "step", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert names == {f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)}
    check_pretrained(model, tmp_path / "out")


def save_sharded(directory: str) -> None:
    """Saves the two models that the hub has in another form, sharded over the ranks."""
    mesh = device_mesh.init_device_mesh("cpu", (2,))
    items: dict[str, Any] = {}
    for kind in ("renamed", "converted"):
        torch.manual_seed(0)
        items[kind] = fsdp.fully_shard(MODELS[kind](), mesh=mesh)
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, items)


@pytest.fixture
def workers() -> Iterator[Workers]:
    started = Workers()
    yield started
    started.close()


@pytest.mark.skipif(not IS_FULL, reason="starts ranks that import transformers")
def test_exports_of_sharded_models_have_the_names_of_the_hub(
    tmp_path: Path, workers: Workers
) -> None:
    workers.run(2, save_sharded, str(tmp_path / "run"))
    for kind in ("renamed", "converted"):
        torch.manual_seed(0)
        model = MODELS[kind]()
        model.save_pretrained(tmp_path / f"own-{kind}")
        huggingface.export(tmp_path / "run" / "0", tmp_path / kind, item=kind)
        assert stored_names(tmp_path / kind) == stored_names(tmp_path / f"own-{kind}")
        check_pretrained(model, tmp_path / kind)
