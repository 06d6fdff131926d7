# `make` alone explains. Set-up happens by itself, once, in .venv-<version> inside this folder (scripts/venv.sh).
# A GPU is used where there is one.

ARGS ?=
WORKERS ?= 2
# Tests of a file stay with one worker as long as the other has tests of its own: both compile less.
PARALLEL = -n $(WORKERS) --dist worksteal
export PYTHON PINS JAX

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-torch test-cuda-build test-pallas-compile lint format study bench clean

help:
	@echo "fgattn_jax: fine-grained sparse attention for JAX"
	@echo
	@echo "  make demo     denoise a clip twice, dense and with cached slice masks; pictures and a table of figures"
	@echo "  make test     the whole suite, but for tests that take long;    ARGS='-k masks -x'"
	@echo "  make test-slow  the tests that take long"
	@echo "  make test-torch  the tests against diffusers; installs torch;    PINS='torch==2.13.0'"
	@echo "  make test-cuda-build  compile the CUDA library as pip does, and check what came out; no GPU needed"
	@echo "  make test-pallas-compile  compile the Pallas kernel for an H100, and check what came out; no GPU needed;"
	@echo "                                                                  JAX=0.11.2"
	@echo "  make lint     formatting, lint, types, import rules;            make format repairs what can be repaired"
	@echo "  make study    make docs/study.md anew from data rows;           ARGS='--help'"
	@echo "  make bench    measure attention on this machine;                ARGS='--help'"
	@echo "  make clean    remove environments, caches and outputs of these commands"
	@echo
	@echo "The first command makes a virtual environment with the newest Python found (3.13, 3.12 or 3.11); later ones"
	@echo "start at once. Choose another:  make demo PYTHON=/path/to/python3.12"
	@echo "ARGS go to the command:         make demo ARGS='--steps 20 --output demo_output'"

demo:
	@venv=$$(sh scripts/venv.sh demo) && "$$venv/bin/fgattn" demo $(ARGS)

# LLVM at -O1: most of the time is compilation, and these programs run for milliseconds. `make test-slow` has all of it.
test: export XLA_FLAGS ?= --xla_backend_optimization_level=1
test:
	@venv=$$(sh scripts/venv.sh test,demo) && "$$venv/bin/python" -m pytest $(PARALLEL) $(ARGS)

test-slow:
	@venv=$$(sh scripts/venv.sh test,demo) && "$$venv/bin/python" -m pytest $(PARALLEL) -m "slow and not gpu" $(ARGS)

# Models, samplers and whole runs against the installed diffusers. The count is that of today, for the same reason as below.
test-torch:
	@venv=$$(sh scripts/venv.sh test,demo,torch,video) && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$$venv/bin/python" -m pytest \
		$(PARALLEL) -m "torch and not gpu" --require-torch --min-passed 35 $(ARGS)

# The count keeps a run that collected nothing from passing.
test-cuda-build:
	@sh scripts/test_cuda_build.sh --min-passed 16 $(ARGS)

# 13 forms x 5 tests, and one form that must fail.
test-pallas-compile:
	@sh scripts/test_pallas_compile.sh --min-passed 66 $(ARGS)

# All four run, whatever the first ones find.
lint:
	@venv=$$(sh scripts/venv.sh test,demo,train,dev) || exit 1; status=0; set -x; \
	"$$venv/bin/ruff" format --check || status=1; \
	"$$venv/bin/ruff" check || status=1; \
	"$$venv/bin/lint-imports" || status=1; \
	"$$venv/bin/pyright" --pythonpath "$$venv/bin/python" || status=1; \
	exit $$status

format:
	@venv=$$(sh scripts/venv.sh test,demo,train,dev) && "$$venv/bin/ruff" format && "$$venv/bin/ruff" check --fix

study:
	@venv=$$(sh scripts/venv.sh demo) && "$$venv/bin/fgattn" study $(ARGS)

bench:
	@venv=$$(sh scripts/venv.sh demo) && "$$venv/bin/fgattn" bench $(ARGS)

clean:
	rm -rf .venv-3.* .venv-cuda .venv-pallas-* build dist demo_output .pytest_cache .ruff_cache
	find fgattn_jax pallas_kernels xla_ffi models tests -name __pycache__ -type d -prune -exec rm -rf {} +
