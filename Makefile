# Two commands for everyone, `make demo` and `make test`; the rest is for developers.
PYTHON ?= python3
INSTALL = -m pip install --quiet --disable-pip-version-check --constraint deploy/constraints.txt
# A file's tests share what they have started, so they stay together; four at once fit in memory.
PYTEST = -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile
# The page lets every other program go first, so its browser needs a machine with time to spare.
BROWSER = tests/server/page/test_browser.py
INPUTS = pyproject.toml deploy/constraints.txt

.PHONY: demo test test-client test-gpu check lint types contracts clean

demo: .venv/.server
	.venv/bin/prenet4d demo

test: test-client .venv/.dev
	.venv/bin/python $(PYTEST) --ignore $(BROWSER)
	.venv/bin/python -m pytest $(BROWSER)

# The client's tests, in an environment that holds the base dependencies alone: no torch, no server.
test-client: .venv-client/.done
	.venv-client/bin/python $(PYTEST) tests/client

test-gpu: .venv/.dev
	.venv/bin/python -m pytest -m gpu

check: lint types contracts test

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.dev
	.venv/bin/mypy

contracts: .venv/.dev
	.venv/bin/lint-imports

.venv/.server: $(INPUTS)
	$(call venv,.venv)
	.venv/bin/python $(INSTALL) --editable ".[server]"
	@touch $@

.venv/.dev: .venv/.server
	.venv/bin/python $(INSTALL) --editable ".[server,bench,dev]"
	@touch $@

.venv-client/.done: $(INPUTS)
	$(call venv,.venv-client)
	.venv-client/bin/python $(INSTALL) --editable . pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

define venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prenet4d needs Python 3.11 or newer; set PYTHON=python3.x")'
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { rm -rf $(1); exit 1; }
endef

clean:
	rm -rf .venv .venv-client demo-out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
