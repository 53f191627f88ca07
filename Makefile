# make demo and make test set everything up; nothing else is needed beforehand but Python 3.10+, make and a network.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test test-all check bench clean

venv: .venv/ready

# torch goes first and by its exact pin: a looser wish may bring in gigabytes of another build
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[models,report,dev]"
	touch $@

demo: venv
	$(BIN)/streammerge demo

test: venv
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: venv
	$(BIN)/python -m pytest -n auto

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python benchmarks/merge.py --small --repeat 2

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
