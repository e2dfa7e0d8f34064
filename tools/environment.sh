# Sourced, not run: makes .venv beside this repository if it is missing, installs what the extras
# given as arguments need, and puts it on PATH.   . tools/environment.sh "eval,report"
#
# PYTHON names the interpreter (3.10 to 3.13) for a new .venv. tools/constraints.txt says which
# releases are taken where pyproject.toml allows several. Installing is skipped while neither file nor the
# extras have changed. Of several commands that are started at once, one installs and the others wait.

if [ -z "${BASH_SOURCE:-}" ]; then
    echo "error: tools/environment.sh is for bash; start bash, and source it there" >&2
    return 1
fi
_repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_venv="$_repository/.venv"

_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; }

_find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        _supported "$PYTHON" && echo "$PYTHON" && return 0
        echo "error: PYTHON=$PYTHON: no Python 3.10 to 3.13; name another, or leave it out" >&2
        return 1
    fi
    for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
        if _supported "$candidate"; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.10 to 3.13 found; install one or name it with PYTHON=/path/to/python" >&2
    return 1
}

# A stamp for every set of extras: the tests and the quickstart take turns.
_stamp_of() { echo "$_venv/.installed-${1//,/-}"; }

_stamp_text() { cat "$_repository/pyproject.toml" "$_repository/tools/constraints.txt" | cksum; }

_stamped() { # _stamped EXTRAS: these files were installed with them
    [ "$(cat "$(_stamp_of "$1")" 2>/dev/null)" = "$(_stamp_text)" ]
}

_ready() { # _ready EXTRAS: dev has all extras but gpu
    [ -x "$_venv/bin/python" ] && { _stamped "$1" || { [[ ",$1," != *,gpu,* ]] && _stamped dev; }; }
}

_make() { # _make EXTRAS
    local python
    # Without pip it was left half made, by an interrupt or where Debian's python3-venv was missing.
    if ! "$_venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(_find_python)" || return 2
        "$python" -m venv "$_venv" || return 1
    fi
    echo "installing megatron-dwm${1:+[$1]} into $_venv (a few minutes the first time)" >&2
    "$_venv/bin/python" -m pip install --quiet --constraint "$_repository/tools/constraints.txt" \
        --editable "$_repository${1:+[$1]}" || return 1
    _stamp_text >"$(_stamp_of "$1")"
}

_make_alone() {
    # macOS has no flock, and some network file systems lock no folder: then nobody waits.
    flock 9 2>/dev/null || true
    _ready "$1" || _make "$1"
} 9<"$_repository"

_ready "${1:-}" || _make_alone "${1:-}" || return $?
export PATH="$_venv/bin:$PATH"
