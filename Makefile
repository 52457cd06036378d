# Everything sets itself up: a fresh machine needs Python >= 3.11 with pip, nothing else.
#   make demo     the whole recipe at small size, and its report (demo-run/report.html)
#   make test     format, lint, types, import contract, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-run
# Idle OpenMP threads sleep instead of spinning: tests and demo share the machine with others.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test check format install clean lock

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null  # on all cores; pip takes one
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/qwench demo --out $(DEMO_OUT)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lock is what pip resolved in a fresh environment for all extras and the development tools.
lock:
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet torch==2.13.0
	.lock-venv/bin/python -m pip install --quiet ".[all,dev]"
	.lock-venv/bin/python -m pip freeze --all --exclude qwench --exclude pip --exclude wheel | sed 's/^torch==.*/torch==2.13.0/' > requirements.lock
	rm -rf .lock-venv

clean:
	rm -rf $(VENV) demo-run .pytest_cache .ruff_cache
