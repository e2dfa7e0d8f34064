# Sourced, not run: makes .venv beside this repository if it is missing, installs what the extras
# given as arguments need, and puts it on PATH.   . tools/environment.sh "eval,report"
#
# PYTHON names the interpreter (3.10 to 3.13) for a new .venv. tools/constraints.txt says which
# releases are taken where pyproject.toml allows several. Installing is skipped while neither file nor the
# extras have changed.

_repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_venv="$_repository/.venv"

_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; }

_find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3.10 python3; do
        if _supported "$candidate"; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.10 to 3.13 found; install one or name it with PYTHON=/path/to/python" >&2
    return 1
}

_install() {
    # A stamp for every set of extras: the tests and the quickstart take turns.
    local stamp_text stamp="$_venv/.installed-${1//,/-}"
    stamp_text="$(cat "$_repository/pyproject.toml" "$_repository/tools/constraints.txt" | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$stamp_text" ]; then
        return 0
    fi
    echo "installing megatron-dwm[$1] into $_venv (a few minutes the first time)" >&2
    "$_venv/bin/python" -m pip install --quiet --constraint "$_repository/tools/constraints.txt" \
        --editable "${_repository}[$1]" || return 1
    echo "$stamp_text" >"$stamp"
}

if [ ! -x "$_venv/bin/python" ]; then
    _python="$(_find_python)" || exit 2
    "$_python" -m venv "$_venv" || exit 1
fi
_install "$1" || exit 1
export PATH="$_venv/bin:$PATH"
