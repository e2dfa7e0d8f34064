#!/usr/bin/env bash
# An environment of its own, .venv-signatures, for `bash tests/run.sh -m signatures`: the real
# transformer-engine package, pure Python, on top of .venv. Nothing of it is installed in .venv,
# where an importable Transformer Engine would change what Megatron-Core does.
#   bash tests/signatures/prepare.sh [VERSION]       VERSION: 2.9.0 to 2.11.x, default 2.11.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tools/environment.sh dev

_folder="$PWD/.venv-signatures"
if [ ! -x "$_folder/bin/python" ]; then
    .venv/bin/python -m venv "$_folder"
    "$_folder/bin/python" - "$PWD" <<'PYTHON'
import glob, pathlib, sys
[base] = glob.glob(f"{sys.argv[1]}/.venv/lib/python3.*/site-packages")
[own] = glob.glob(f"{sys.argv[1]}/.venv-signatures/lib/python3.*/site-packages")
pathlib.Path(own, "base.pth").write_text(f"{base}\n{sys.argv[1]}\n")
PYTHON
fi
# Without its dependencies: the compiled parts need CUDA. What its Python files import beside torch:
"$_folder/bin/python" -m pip install --quiet --no-deps "transformer-engine==${1:-2.11.0}" triton
"$_folder/bin/python" -m pip install --quiet pydantic onnxscript onnx nvdlfw-inspect importlib-metadata einops
echo "ready: bash tests/run.sh -m signatures"
