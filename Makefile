PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow speed gpu campaign

# Each installs into .venv what its commands need; again only when pyproject.toml changes.
$(VENV)/.installed $(VENV)/.test-installed $(VENV)/.speed-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.$(EXTRA)'
	touch $@

$(VENV)/.test-installed: EXTRA = [test]
$(VENV)/.speed-installed: EXTRA = [speed]

demo: $(VENV)/.installed  ## train and compare IML and VAE on scikit-learn's digits; needs no download
	$(BIN)/imlbench run --models iml,vae --datasets digits

test: $(VENV)/.test-installed  ## the whole default test suite
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

slow: $(VENV)/.test-installed  ## the tests that take minutes
	$(BIN)/pytest -m slow

speed: $(VENV)/.speed-installed  ## speed beside other libraries, and of the runner
	$(BIN)/python -m speed

gpu: $(VENV)/.test-installed  ## on a CUDA device: its tests, its speed, the paper's tables; docs/gpu.md
	$(BIN)/python -m speed.gpu

campaign: $(VENV)/.test-installed  ## a thousand faults, and docs/reliability.md; hours
	$(BIN)/python -m tests.campaign --report docs/reliability.md
