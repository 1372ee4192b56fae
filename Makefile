# Everything a person or CI does with the project. `make` alone lists it.

VENV := .venv
BIN := $(VENV)/bin
LOCK := deploy/requirements/dev.txt
PACKAGES := shared services/proxy services/usage-worker services/limits-sync deploy/dev
CODE := $(PACKAGES) deploy/compose tests

# PYTHON=/path/to/python chooses the interpreter that .venv is made with.
PYTHONS := $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3 python)
# SECONDS and SEED are for `make chaos`; a run prints its seed, so that a failing one can be replayed.
SECONDS := 60
SEED :=
MINUTES := 10
# off: a Zion that does not honour Idempotency-Key; what it has twice is reported, and held to its bound.
IDEMPOTENCY := on
# on: Redis has a replica, which fails too, and settlements count once it has them.
REPLICA := off

# Another active environment, or a person's own pip settings, must not decide what .venv holds.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_PREFIX PIP_TARGET PIP_USER

.PHONY: help setup dev test lint format lock bench soak chaos memory profile clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.packages ## .venv with everything in it, from nothing but Python 3.11 or newer
	@:

dev: setup ## the whole system on this machine; Ctrl-C stops it
	@exec $(BIN)/sentinel-dev

test: lint ## set-up, lint and all tests that this machine can run
	$(BIN)/pytest -n auto --dist loadgroup tests

lint: setup ## ruff, mypy and the floors of who may import whom
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup ## what ruff can put right by itself
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: setup ## what a request costs, beside others; PEERS=1: beside TensorZero and LiteLLM, too
	$(BIN)/python -m tests.bench $(if $(PEERS),--peers)

profile: setup ## where the time of a request goes
	$(BIN)/python -m tests.bench.profile

soak: setup ## the property tests, for much longer
	$(BIN)/pytest -n auto -m soak -o faulthandler_timeout=0 tests

chaos: setup ## kill, stop and cut under load, then compare the books; SECONDS=60 SEED=... IDEMPOTENCY=on REPLICA=off
	$(BIN)/python -m tests.chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) --idempotency $(IDEMPOTENCY) \
		--replica $(REPLICA)

memory: setup ## what each process holds under steady load, and whether it grows; MINUTES=10
	$(BIN)/python -m tests.chaos.memory --minutes $(MINUTES)

clean: ## removes .venv and what the tools left
	rm -rf $(VENV) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# --- set-up: two stamps, each written last, so that what was interrupted is done again ---

# A .venv that was moved here, or whose Python is gone, is made anew.
ifneq ($(shell test -x $(BIN)/python && cat $(VENV)/.lock 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/.lock
endif

$(VENV)/.lock: $(LOCK)
	@python=; for candidate in $(PYTHONS); do \
		"$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
			&& python=$$candidate && break; \
	done; \
	test -n "$$python" || { echo "Sentinel needs Python 3.11 or newer with its venv module;" \
		"tried: $(subst ",,$(PYTHONS)). Name another with: make PYTHON=/path/to/python" >&2; exit 1; }; \
	echo "Making $(VENV) with $$("$$python" -V) ..."; \
	rm -rf $(VENV) && "$$python" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --no-deps --only-binary :all: --requirement $(LOCK)
	@printf '%s\n' "$(CURDIR)" > $@

$(VENV)/.packages: $(VENV)/.lock $(PACKAGES:%=%/pyproject.toml)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation $(PACKAGES:%=--editable ./%)
	@$(BIN)/python -m pip check
	@touch $@

# --- locks: no host, no path stands in them, whatever the machine's pip is told ---

COMPILE := env -u PIP_FIND_LINKS CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/pip-compile --quiet --allow-unsafe \
	--generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --strip-extras

lock: setup ## compiles deploy/requirements/*.txt from *.in
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "Locks are compiled on the oldest Python they are for: make clean lock PYTHON=python3.11" >&2; exit 1; }
	$(COMPILE) --output-file deploy/requirements/base.txt deploy/requirements/base.in
	$(COMPILE) --output-file deploy/requirements/dev.txt deploy/requirements/dev.in
	@! grep -nE '://|^-|(via|-r|-c) /' deploy/requirements/*.txt
