#!/bin/sh
# Makes (once) the virtual environment of this checkout, installs fgattn_jax with extras, prints the environment's path.
#
#   scripts/venv.sh EXTRAS          e.g. scripts/venv.sh test,demo
#
# PYTHON  interpreter to use; default: what scripts/find_python.sh finds
# PINS    further pip requirements, e.g. "jax==0.10.2 jaxlib==0.10.2"
# FGATTN_BUILD_CUDA  1 compiles the CUDA library, 0 does not; default: 0 but where a Hopper GPU is. Elsewhere nothing
#         could run it, and nvcc with what it needs is a download of 240 MB.
#
# The environment is .venv-MAJOR.MINOR inside the checkout. A stamp with checksums makes the second call return at once.
# The install is editable: a change of Python sources needs no new install, one of CUDA sources makes one.
set -eu

extras=$1
cd "$(dirname "$0")/.."
python=${PYTHON:-}
[ -n "$python" ] || python=$(sh scripts/find_python.sh)

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "PYTHON=$python does not run; name a Python 3.11 or newer, or leave PYTHON out." >&2
    exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "PYTHON=$python is version $version; fgattn_jax needs 3.11 or newer." >&2
    exit 1
}

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    extras="$extras,cuda13"
fi
# The library holds code for compute capability 9.0 only. Where that is, the build decides (it needs a g++).
if [ -z "${FGATTN_BUILD_CUDA:-}" ] &&
    ! nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -q '^9\.0'; then
    FGATTN_BUILD_CUDA=0
fi
export FGATTN_BUILD_CUDA=${FGATTN_BUILD_CUDA:-}

venv=.venv-$version
stamp="$venv/.installed-$(echo "$extras" | tr ',' '-')"
wanted="$(cksum <pyproject.toml) $(pwd) ${PINS:-}"
# One for all extras: whichever install was last has brought the library or taken it away.
cuda_stamp="$venv/.installed-cuda"
cuda_wanted="FGATTN_BUILD_CUDA=$FGATTN_BUILD_CUDA"
if [ "$FGATTN_BUILD_CUDA" != 0 ]; then
    cuda_wanted="$cuda_wanted $(cat CMakeLists.txt xla_ffi/csrc/* | cksum)"
fi
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] &&
    [ "$(cat "$cuda_stamp" 2>/dev/null)" = "$cuda_wanted" ]; then
    echo "$venv"
    exit 0
fi

if [ ! -x "$venv/bin/python" ]; then
    echo "Making $venv with $python ..." >&2
    "$python" -m venv "$venv" >&2
fi
echo "Installing fgattn_jax[$extras] ${PINS:+with $PINS }into $venv (a minute or two the first time) ..." >&2
# PINS is a list of words.
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]" ${PINS:-} >&2
echo "$wanted" >"$stamp"
echo "$cuda_wanted" >"$cuda_stamp"
echo "$venv"
