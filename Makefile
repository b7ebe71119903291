# Two commands matter: `make demo` and `make test`. Both set up .venv first, once; the first run takes minutes.

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet -c requirements.lock
CHECK_PYTHON := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c '$(CHECK_PYTHON)' 2>/dev/null && echo $$name && break; done)
HAS_CHROMIUM := for name in chromium chromium-browser google-chrome; do command -v $$name; done | grep -q .
APT := $(shell test "$$(id -u)" = 0 || echo sudo -n) env DEBIAN_FRONTEND=noninteractive apt-get -qq

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@echo "make demo    one image and camera paths become ranked, refined clips (CPU, no downloads but Python packages)"
	@echo "make test    linters, type checker and tests"
	@echo "make lint    linters and type checker alone"
	@echo "make format  format and sort imports"
	@echo "make clean   remove .venv, caches and builds; runs/ stays"

demo: $(VENV)/.demo
	$(BIN)/longtake search-refine --preset tiny-streaming

test: lint
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Longtake needs Python 3.11 or newer with its venv module (Debian and Ubuntu:" \
		"apt install python3-venv). To name one: make demo PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes in alone and first: other packages ask for some torch, and would bring a build of their own choice.
$(VENV)/.demo: requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing PyTorch into $(VENV) (1 of 2)"
	@$(PIP_INSTALL) $(shell grep '^torch==' requirements.lock)
	@echo "Installing Longtake and what it runs on (2 of 2)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need"
	@$(PIP_INSTALL) -e '.[dev,kernels-cpu,render]'
	@$(BIN)/python -c "import ctypes.util, sys; sys.exit(ctypes.util.find_library('EGL') is None)" || \
		echo "libEGL is missing: MuJoCo cannot draw without a display until it is there (apt install libegl1)" >&2
	@$(HAS_CHROMIUM) || { echo "Installing Chromium for the tests of the web page"; { timeout 120 $(APT) update && \
		timeout 300 $(APT) install -y --no-install-recommends chromium; } >/dev/null 2>&1; $(HAS_CHROMIUM) || \
		echo "Chromium is missing: the web page is not tested until it is there (apt install chromium)" >&2; }
	@touch $@
