#!/bin/sh
# Compiles the Pallas kernel for an H100 with JAX's CUDA plugin, and checks what ptxas says and the machine code. Needs
# no GPU. `make test-pallas-compile` calls it.
#
#   scripts/test_pallas_compile.sh [PYTEST ARGUMENT...]
#
# JAX     version of JAX, 0.11.2 or newer; default: the one of .venv-MAJOR.MINOR
# PYTHON  interpreter to use, 3.12 or newer; default: what scripts/find_python.sh finds
#
# The environment, .venv-pallas-JAX, borrows from .venv-MAJOR.MINOR what it does not have itself.
set -eu

cd "$(dirname "$0")/.."
started=$(date +%s)
# Such a JAX has no wheels for Python 3.11.
[ -n "${PYTHON:-}" ] || PYTHON=$(sh scripts/find_python.sh 3.13 3.12)
export PYTHON
borrowed=$(sh scripts/venv.sh test,demo)
installed=$("$borrowed/bin/python" -c 'from importlib import metadata; print(metadata.version("jaxlib"))')
jax=${JAX:-$installed}
venv=.venv-pallas-$jax

# Of the many wheels of jax[cuda13] those that a compilation touches: the plugin's two, and ptxas and nvdisasm. These are
# pinned, for what they say and how they share out registers changes; ptxas is of the release that the CUDA library is
# compiled with, nvdisasm was not released for it and reads its files.
wheels="jax-cuda13-plugin==$jax jax-cuda13-pjrt==$jax nvidia-cuda-nvcc==13.0.88 nvidia-cuda-nvdisasm==13.2.51"
[ "$jax" = "$installed" ] || wheels="jax==$jax jaxlib==$jax $wheels"

wanted="$borrowed $wheels $(pwd)"
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing $wheels into $venv: 185 to 280 MB, the first time ..." >&2
    "$borrowed/bin/python" -m venv --clear --without-pip "$venv"
    # A list of words.
    # shellcheck disable=SC2086
    "$borrowed/bin/python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check --no-deps $wheels
    site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    # After the install, or pip would count what is borrowed as installed; at the end of the path, behind the wheels.
    site "$borrowed" >"$(site "$venv")/borrowed.pth"
    echo "$wanted" >"$venv/.installed"
    echo "installed after $(($(date +%s) - started)) s" >&2
fi

"$venv/bin/python" -m pytest -m pallas_compile tests/test_pallas_compile.py "$@"
echo "done after $(($(date +%s) - started)) s" >&2
