# Everything runs from nothing: each target sets up .venv first (tools/misc/setup_env.py), once.
# PYTHON chooses the interpreter, ARGS goes to the command of the target: make test ARGS='-m "not slow"'
# WORKERS is how many processes the tests run in.

PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=
WORKERS ?= 2

.PHONY: help setup demo test lint bench wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

setup: ## make .venv with everything in it (the other targets do this themselves)
	@$(PYTHON) tools/misc/setup_env.py

demo: setup ## make a dataset, train a small BoxeR on it through mim, evaluate, draw pictures: work_dirs/demo
	@bash tools/demo.sh $(ARGS)

test: setup ## run the whole test suite
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(WORKERS) --dist worksteal --durations 10 $(ARGS)

lint: setup ## ruff, its formatter as a check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup ## time the operators and the models against their baselines
	$(PY) tools/benchmark/ops.py $(ARGS)
	$(PY) tools/benchmark/models.py $(ARGS)

wheel: setup ## build the wheel into dist/
	@$(PY) -m pip --isolated --no-input --disable-pip-version-check wheel --no-index --no-deps --no-build-isolation \
		--wheel-dir dist .
	@rm -rf build

clean: ## remove .venv and everything built or cached in the checkout (wheels cached outside, data and work_dirs stay)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .dist_test htmlcov .coverage
	find boltz_mm tools tests configs -name __pycache__ -type d -prune -exec rm -rf {} +
	find boltz_mm -name '*.so' -delete
