# Every target sets up what it needs, on a machine with Python 3.11 or newer and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# For tests, which interpret gatdist's kernels and compile them for GPUs. torch's builds for CUDA bring their own version.
TRITON := triton==3.9.0

# Print errors only. pip would compile modules on one core; compileall uses all cores. Compiling is necessary: with
# PYTHONDONTWRITEBYTECODE set, each process would compile torch and Ray again. Modules that fail to compile are for a newer
# Python and unused.
INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --progress-bar off

.DEFAULT_GOAL := help
.PHONY: help setup setup-system train test test-fast test-cluster check audit format docs bench lock clean

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

setup: $(READY)  ## install gatdist and its tools into .venv, as pinned in requirements.lock

# Rebuilt when the lock or the project's metadata changes; the code is linked, not copied.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: gatdist needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setup: installing into $(VENV) (a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -r requirements.lock
	@$(BIN)/python -c 'import triton' 2> /dev/null || $(INSTALL) --only-binary :all: $(TRITON) || \
		echo "setup: no triton for this machine: its tests are skipped"
	@$(BIN)/python -m compileall -qq -j 0 -x '/(tests?|testing)/' $(VENV)/lib || true
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

setup-system:  ## install the tests' other dependencies: Chromium, nginx, object stores, Slurm, promtool; needs root, Debian, npm
	@tests/setup-system

train: setup  ## train the digits preset on two workers; ARGS="--set run.seed=1" goes to gatdist train
	$(BIN)/gatdist train digits --workers 2 $(ARGS)

# The longest files first, so that the many short ones fill the gaps at the end.
test: setup setup-system check  ## check, then run all tests but gpu, slow, hosts and lasting; ARGS="-k name" goes to pytest
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The longest files of tests/unit and tests/numerics; other tests cover the same with smaller cases.
LENGTHY := bench_data bench_presets bench_scaling bench_step builtin generators_at_work gpu_script graphs listening more_metrics \
	no_waiting packing precision presets published_games ring simulate simulated_runs user_code_contract

test-fast: setup  ## run the essential tests, in about two minutes; ARGS goes to pytest
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/numerics \
		$(LENGTHY:%=--ignore-glob=*/test_%.py) $(ARGS)

test-cluster: setup setup-system  ## run with failing hosts, networks and disks, long outages; needs root; ARGS goes to pytest
	$(BIN)/python -m pytest -m "(hosts or lasting) and not slow" tests/cluster/hosts tests/cluster tests/storage $(ARGS)

check: setup  ## format, lint, types, import layers, plain language; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m docs.plain_language
	$(BIN)/python -m pip check

audit:  ## check the pinned packages for known vulnerabilities, online, in a separate environment
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --no-deps --disable-pip -r requirements.lock

format: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## regenerate docs/reference and the tables of results
	$(BIN)/python -m docs.write_reference
	$(BIN)/python -m benchmarks.readme

bench: setup  ## run the benchmarks; ARGS goes to them
	@test -f benchmarks/__main__.py || { echo "bench: benchmarks/ has no cases yet"; exit 1; }
	$(BIN)/python -m benchmarks $(ARGS)

# Keep the locked version of torch: its newest release may be a build for CUDA.
lock:  ## rewrite requirements.lock with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install -qq "$$(grep '^torch==' requirements.lock)" setuptools
	.venv-lock/bin/python -m pip install -qq --no-build-isolation -e ".[dev]"
	{ sed '/^torch==/q' requirements.lock; \
		.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable \
		| grep -v -E '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)( @|==)'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock

clean:  ## remove the environment, caches and test artifacts; runs/ stays
	rm -rf $(VENV) .venv-audit .venv-lock .tools build *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -rf tests/artifacts
	find gatdist tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
