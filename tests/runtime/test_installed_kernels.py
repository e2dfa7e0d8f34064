"""Apex or Transformer Engine may be installed on a machine without a GPU, as in a container.

Megatron-Core takes their CUDA kernels wherever they can be imported. The modules here have apex's
names, and every kernel says that it was called. With Transformer Engine's own packages, which need
CUDA's libraries, it was tried by hand (docs/gpu.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.forking.client import run_python

_KERNELS = """
def called(*_, **__):
    raise RuntimeError("a CUDA kernel was called")

FusedAdam = FusedSGD = multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = called
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_kernels_are_not_used_without_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    for file in ("apex/optimizers.py", "apex/multi_tensor_apply.py", "amp_C.py"):
        (tmp_path / file).write_text(_KERNELS)
    done = run_python(
        ["-m", "megatron_dwm.doctor"], environment={"PYTHONPATH": str(tmp_path)}, fresh=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tangent probe agrees with finite_difference" in done.stdout
    assert "NVIDIA apex         installed" in done.stdout
    assert "Adam                plain: needs a GPU" in done.stdout
