PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow speed

# Installs into .venv; runs again only when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/.installed  ## train and compare IML and VAE on scikit-learn's digits; needs no download
	$(BIN)/imlbench run --models iml,vae --datasets digits

test: $(VENV)/.installed  ## the whole default test suite
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

slow: $(VENV)/.installed  ## the tests that take minutes
	$(BIN)/pytest -m slow

$(VENV)/.speed-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[speed]'
	touch $@

speed: $(VENV)/.speed-installed  ## speed beside other libraries; about 25 minutes
	$(BIN)/python -m speed
