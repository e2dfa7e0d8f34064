#!/usr/bin/env bash
# The core of the suite under another release of Megatron-Core: hypergradients, layouts, checkpoints
# and conversion, and checkpoints that move between that release and the one in .venv.
#   bash tests/compat/run.sh [RELEASE] [pytest args]      RELEASE: default 0.19.2
#
# The release is unpacked into .venv-compat/RELEASE, an environment on top of .venv. Releases from
# 0.17 on declare Python 3.12, but their Python files run on 3.10 and 3.11; only the helper of the
# data sets is compiled, and is compiled again here (needs g++).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tools/environment.sh dev

_release="${1:-0.19.2}"
[ "$#" -eq 0 ] || shift
_folder="$PWD/.venv-compat/$_release"
if [ "$_release" = "$(python -c 'from importlib.metadata import version; print(version("megatron-core"))')" ]; then
    echo "error: $_release is the release in .venv, which bash tests/run.sh tests; name another one" >&2
    exit 2
fi

_unpack() { # _unpack SITE_PACKAGES: the release's wheel, with a helper for this Python
    local wheels="$_folder/wheels" datasets="$1/megatron/core/datasets"
    # 0.16 has wheels for 3.10 to 3.12, later releases for 3.12 and newer.
    python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --platform "manylinux_2_28_$(uname -m)" --dest "$wheels" "megatron-core==$_release"
    python -m zipfile -e "$wheels"/megatron_core-*.whl "$1"
    rm -f "$datasets"/helpers_cpp*.so
    g++ -O3 -shared -fPIC -std=c++17 "$datasets/helpers.cpp" \
        -I"$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
        -I"$(python -c 'import torch.utils; print(torch.__path__[0])')/include" \
        -o "$datasets/helpers_cpp$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
}

if [ ! -f "$_folder/.ready" ]; then
    echo "preparing $_folder (a minute or two the first time)" >&2
    rm -rf "$_folder"
    python -m venv "$_folder"
    _own="$("$_folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    _base="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    printf '%s\n' "$_base" "$PWD" >"$_own/base.pth"
    _unpack "$_own"
    # Megatron-Core imports it from 0.18 on; builds of torch for CUDA bring it along.
    python -c "import triton" 2>/dev/null ||
        "$_folder/bin/python" -m pip install --quiet --no-deps "triton>=3,<4"
    touch "$_folder/.ready"
fi
export OMP_NUM_THREADS=1 MEGATRON_DWM_COMPAT="$_release"
# The files that depend most on Megatron-Core; all of their folders have half as many tests again.
_paths=()
for _word in "$@"; do
    [ ! -e "${_word%%::*}" ] || _paths+=("$_word")
done
[ "${#_paths[@]}" -gt 0 ] || set -- "$@" tests/compat tests/model \
    tests/bilevel/test_{hypergradient,ahead,units,fused_layers,public_spec,virtual_step,fp8}.py \
    tests/checkpoint/test_resharding.py \
    tests/convert/test_{layouts,megatron_lm,from_hf,to_hf}.py \
    tests/training/test_{deferred,plain_loop}.py tests/run/test_{runs,resume}.py
exec "$_folder/bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
