# make demo | test | check | lint | map | bench | clean   (one environment, .venv, made on first use)
#   test: every test; check: the tests not marked slow; map: the rooms of the package
# make gpu | tune                                (with PYTHON as it is: no network, no environment)
PYTHON ?= python3
BIN := .venv/bin
DATA ?=
OUT ?= report
SOURCES := $(shell find csrc tests/support/cudasim tests/support/simulated.cpp -type f)

.PHONY: demo test check map lint format bench gpu tune clean
.DEFAULT_GOAL := test

SAY := @printf '\n==> %s\n'
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# The demo needs the package and the command line; all else adds the tools of tests and lint.
# Both are made again when the native sources or the dependencies change.
.venv/.demo: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(SAY) 'environment: .venv'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(SAY) 'packages: torch and what the command line needs; then the C++ kernels (1 to 5 minutes)'
	$(PIP) --progress-bar on -e '.[cli]'
	$(SAY) 'which kernels serve here'
	$(BIN)/fasthessian doctor
	@touch $@

.venv/.ready: .venv/.demo
	$(SAY) 'packages: the tools of tests and lint'
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(PIP) --quiet --group test --group lint
	@touch $@

demo: .venv/.demo
	$(SAY) 'demo: ResNet-20 on images of digits'
	$(BIN)/fasthessian analyze resnet20 --out $(OUT) --overwrite $(if $(DATA),--data $(DATA))

TESTS := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder --benchmark-disable

test: .venv/.ready
	$(TESTS)

check: .venv/.ready
	$(TESTS) -m 'not slow'

map: .venv/.ready
	@$(BIN)/python tests/support/house.py

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# Without their dependencies: those ask for torchvision, and it for a torch of its own.
PEERS := pyhessian hessian-eigenthings curvlinops-for-pytorch backpack-for-pytorch linear_operator \
	einconv
PEERS_NEED := tqdm einops opt-einsum jaxtyping mpmath scikit-learn

bench: .venv/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(PEERS)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PEERS_NEED)
	$(BIN)/python -m pytest -q -s bench
	$(BIN)/python -m bench.harness.table

gpu:
	$(PYTHON) -m bench.gpu.run

tune:
	$(PYTHON) -m bench.gpu.tune

clean:
	rm -rf .venv build *.egg-info fasthessian/_native*.so
