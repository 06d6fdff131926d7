#!/bin/sh
# Prints the path of a Python that can make a virtual environment for fgattn_jax.
#
#   scripts/find_python.sh [VERSION...]     versions in order of preference; default: 3.13 3.12 3.11
#
# Looks on PATH, then among the interpreters of pyenv and uv, then in the usual folders. An interpreter counts only if
# it is a final 64-bit CPython of that version that can import venv, ensurepip and ssl: a pyenv shim may be there and
# fail, and Debian's python3 lacks ensurepip until python3-venv is installed.
set -u

[ $# -gt 0 ] || set -- 3.13 3.12 3.11

works() { # works PATH VERSION
    "$1" -I - "$2" >/dev/null 2>&1 <<'CHECK'
import sys, sysconfig
import ensurepip, ssl, venv
wanted = tuple(int(part) for part in sys.argv[1].split("."))
ok = sys.version_info[: len(wanted)] == wanted and sys.version_info >= (3, 11)
ok = ok and sys.version_info.releaselevel == "final" and sys.implementation.name == "cpython"
ok = ok and sys.maxsize > 2**32 and not sysconfig.get_config_var("Py_GIL_DISABLED")
sys.exit(not ok)
CHECK
}

candidates() { # candidates VERSION: one path a line, newest patch release first within a folder
    command -v "python$1"
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv" "$(pyenv root 2>/dev/null)"; do
        [ -n "$root" ] && ls -d "$root/versions/$1"*/bin/"python$1" 2>/dev/null | sort -r
    done
    for root in "${UV_PYTHON_INSTALL_DIR:-}" "${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python"; do
        [ -n "$root" ] && ls -d "$root/cpython-$1"*/bin/"python$1" 2>/dev/null | sort -r
    done
    for folder in /usr/local/bin /usr/bin /opt/homebrew/bin "${HOME:-}/.local/bin"; do
        [ -x "$folder/python$1" ] && echo "$folder/python$1"
    done
    command -v python3
    command -v python
}

seen=""
for version in "$@"; do
    old_ifs=$IFS
    IFS='
'
    for python in $(candidates "$version"); do
        if works "$python" "$version"; then
            "$python" -I -c 'import sys; print(sys.executable)' # a pyenv shim answers with the interpreter itself
            exit 0
        fi
        case "$seen" in
        *"|$python|"*) ;;
        *) seen="$seen|$python|" ;;
        esac
    done
    IFS=$old_ifs
done

{
    echo "No Python fits. fgattn_jax needs CPython $(echo "$*" | sed 's/ / or /g') (64 bit) with venv, ensurepip and ssl."
    echo "Looked on PATH, in pyenv, in uv's folder and in the usual folders; these were found and do not fit:"
    echo "$seen" | sed 's/||/|/g' | tr '|' '\n' | sed '/^$/d; s/^/    /'
    echo "What helps, one of:"
    echo "    apt-get install python3 python3-venv        (Debian 12 and newer)"
    echo "    uv python install 3.12"
    echo "    pyenv install 3.12"
    echo "or name one yourself:  make demo PYTHON=/path/to/python3.12"
} >&2
exit 1
