#!/usr/bin/env bash
# An environment of its own, .venv-signatures, for `bash tests/run.sh -m signatures`: the real
# transformer-engine package, pure Python, on top of .venv. Nothing of it is installed in .venv,
# where an importable Transformer Engine would change what Megatron-Core does.
#   bash tests/signatures/prepare.sh [VERSION [MEGATRON_CORE]]
# VERSION: 2.9.0 to 2.20.2, default 2.11.0. MEGATRON_CORE: a release that tests/compat/run.sh has
# prepared; default: that of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tools/environment.sh dev

_folder="$PWD/.venv-signatures"
[ -x "$_folder/bin/python" ] || .venv/bin/python -m venv "$_folder"
"$_folder/bin/python" - "$PWD" "${2:-}" <<'PYTHON'
import glob, pathlib, sys
root, release = sys.argv[1:]
bases = [".venv"] if not release else [f".venv-compat/{release}", ".venv"]
paths = [glob.glob(f"{root}/{base}/lib/python3.*/site-packages") for base in bases]
if not all(paths):
    sys.exit(f"error: .venv-compat/{release} is missing; bash tests/compat/run.sh {release} makes it")
[own] = glob.glob(f"{root}/.venv-signatures/lib/python3.*/site-packages")
pathlib.Path(own, "base.pth").write_text("\n".join([*(path for [path] in paths), root, ""]))
PYTHON
# Without its dependencies: the compiled parts need CUDA. What its Python files import beside torch:
"$_folder/bin/python" -m pip install --quiet --no-deps "transformer-engine==${1:-2.11.0}" triton
"$_folder/bin/python" -m pip install --quiet pydantic onnxscript onnx nvdlfw-inspect importlib-metadata einops
echo "ready: bash tests/run.sh -m signatures"
