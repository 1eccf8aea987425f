# make demo     builds .venv and generates from the bundled model, the canvas shown while it denoises
# make test     builds .venv and runs every check: ruff, mypy, the tests, the parity tests, and where there is a Chromium
#               (on PATH, or named by CHROMIUM) those of the web page
# make interop  exchanges quantised checkpoints with mlx-vlm, in a virtual environment of its own
#
# PYTHON=python3.12 picks the interpreter, VENV=folder the virtual environment, PROMPT="..." the demo's prompt.
# Needs Python 3.11 or newer with venv, and nothing else. A second run installs nothing.

VENV   ?= .venv
PYTHON ?=
PROMPT ?= Tell me a story about a fox.
export PROMPT

CANDIDATES = python3 python3.14 python3.13 python3.12 python3.11 python
BIN        = $(VENV)/bin
PARALLEL   = -n 2 --dist loadfile
IS_NEW     = import sys; sys.exit(sys.version_info < (3, 11))
INSTALL    = $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: demo test interop clean

demo: $(VENV)/.installed
	@$(BIN)/python -m mlx_diffusiongemma.generate --model tiny --prompt "$$PROMPT" --show-denoising

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL)
	$(BIN)/python -m pytest $(PARALLEL) -m "oracle and not slow"
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not timed"
	$(BIN)/python -m pytest -m "timed or distributed"
	@if $(BIN)/python tests/server/chromium.py; then $(BIN)/python -m pytest -m browser; \
	else echo "The web page was not tested in a browser." >&2; fi

interop: $(VENV)-interop/.installed
	$(VENV)-interop/bin/python -m pytest -m interop tests/test_interop.py

clean:
	rm -rf $(VENV) $(VENV)-interop build dist .mypy_cache .pytest_cache .ruff_cache

# Stamp files: each is made only after its step has succeeded, so an interrupted run is taken up where it stopped.

$(VENV)/.created:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  for name in $(CANDIDATES); do \
	    if $$name -c '$(IS_NEW)' >/dev/null 2>&1; then python=$$name; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "error: Python 3.11 or newer is needed; none of $(CANDIDATES) is one (PYTHON=... names another)" >&2; exit 1; \
	  fi; \
	elif ! $$python -c '' >/dev/null 2>&1; then \
	  echo "error: Python 3.11 or newer is needed, but PYTHON=$$python does not run" >&2; exit 1; \
	elif ! $$python -c '$(IS_NEW)'; then \
	  echo "error: Python 3.11 or newer is needed, but PYTHON=$$python is $$($$python --version 2>&1)" >&2; exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "error: $$python lacks venv or ensurepip (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; \
	fi; \
	echo "Building $(VENV) with $$($$python --version 2>&1) ..." && \
	$$python -m venv --clear "$(VENV)" && touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing ..."
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	@echo "Installing with the tests' needs, PyTorch among them ..."
	@$(INSTALL) --editable ".[test,lint]"
	@touch $@ $(VENV)/.installed

# Its own environment: mlx-vlm asks for other versions than the parity tests.
$(VENV)-interop/.installed: pyproject.toml
	@$(MAKE) --no-print-directory VENV="$(VENV)-interop" "$(VENV)-interop/.created"
	@echo "Installing with mlx-vlm ..."
	@$(VENV)-interop/bin/python -m pip install -qq --disable-pip-version-check --editable ".[interop]"
	@touch $@
