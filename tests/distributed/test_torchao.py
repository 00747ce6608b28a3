"""torchao's tensors under FSDP2 come back bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gloo_workers import Workers

if os.environ.get("FUNCTIONAL_CKPT_FULL") != "1":
    pytest.skip("a full run has it", allow_module_level=True)
pytest.importorskip("torchao")
import torchao_jobs


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_low_bit_optimizers_resume_exactly(name: str, workers: Workers, tmp_path: Path) -> None:
    directory = str(tmp_path / "a")
    expected = workers.run(2, torchao_jobs.trained, directory, name)
    for is_used in (False, True):
        assert workers.run(2, torchao_jobs.resumed, directory, name, is_used) == expected


def test_quantized_weights(workers: Workers, tmp_path: Path) -> None:
    # Other weights of torchao, such as Int8WeightOnlyConfig, make no DTensor.
    directory, config = str(tmp_path / "a"), "Float8WeightOnlyConfig"
    expected = workers.run(2, torchao_jobs.saved_weights, directory, config)
    assert workers.run(2, torchao_jobs.restored_weights, directory, config) == expected
