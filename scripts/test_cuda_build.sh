#!/bin/sh
# Builds the wheel with the CUDA library as a user's pip would, installs it into an environment of its own, and checks
# library, compile log and machine code there. Needs no GPU. `make test-cuda-build` calls it.
#
#   scripts/test_cuda_build.sh [PYTEST ARGUMENT...]
#
# The wheel stays in build/cuda_wheel. The environment, .venv-cuda, borrows its packages from .venv-MAJOR.MINOR.
set -eu

cd "$(dirname "$0")/.."
started=$(date +%s)
borrowed=$(sh scripts/venv.sh test,demo)
wheels=build/cuda_wheel
venv=.venv-cuda

rm -rf "$wheels"
echo "Building the wheel: about 240 MB of build requirements, the first time ..." >&2
FGATTN_BUILD_CUDA=1 "$borrowed/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps -w "$wheels" .
wheel=$(ls "$wheels"/*.whl)
echo "$wheel: $(wc -c <"$wheel") bytes after $(($(date +%s) - started)) s" >&2

"$borrowed/bin/python" -m venv --clear --without-pip "$venv"
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
# As a path and not as an install: `.pth` files of the borrowed folder, its editable fgattn_jax among them, stay out.
site "$borrowed" >"$(site "$venv")/borrowed.pth"
# cuobjdump calls nvdisasm. Neither was released for 13.0; these read its files.
"$borrowed/bin/python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check --no-deps \
    "$wheel" nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51

# -P: the tests see what is installed, not the checkout.
FGATTN_CUDA_WHEEL=$wheel "$venv/bin/python" -P -m pytest -m cuda_build tests/test_cuda_build.py "$@"
echo "done after $(($(date +%s) - started)) s" >&2
