# The two commands of a newcomer are `make demo` and `make test`. Everything lives in $(VENV); a second call re-does nothing.
PYTHON ?= python3
VENV   ?= .venv
# Extra overrides for the demo's sweep, e.g. make demo DEMO="optim.epochs=1"
DEMO   ?=
# Extra arguments for pytest, e.g. make test TEST="-k weights"
TEST   ?=

REQUIREMENTS := requirements.txt requirements-dev.txt
PY           := $(VENV)/bin/python
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup install demo test test-full test-gpu test-lowest lint tables report clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter of the first call, VENV=DIR where its packages go"

setup: ## Create the virtual environment and install the requirements (once)
	@cat $(REQUIREMENTS) | cmp -s - $(VENV)/.installed || $(MAKE) --no-print-directory install

# $(VENV)/.made says that the environment is ours, $(VENV)/.installed (a copy of the requirements) that it is complete. An environment
# of ours whose installation was interrupted is built anew, since pip cannot tell a half-copied package; a user's own is never removed.
install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed; PYTHON=$(PYTHON) gives: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	  echo "Choose another one, for example: make setup PYTHON=python3.12" >&2; exit 1; }
	@if [ -e $(VENV)/.made ] && [ ! -e $(VENV)/.installed ]; then \
	  echo "An earlier installation was interrupted: starting afresh."; rm -rf $(VENV); fi
	@if [ ! -e $(VENV) ]; then \
	  echo "Creating $(VENV) with $$($(PYTHON) --version 2>&1)"; \
	  mkdir -p $(VENV) && touch $(VENV)/.made && $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "No virtual environment could be made, see above; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; fi
	@echo "Installing the requirements into $(VENV) (PyTorch is large: the first call takes minutes)"; rm -f $(VENV)/.installed
	@# pip 23, which comes with Python 3.10, searches for hours where a newer one needs seconds.
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip || true
	@$(PY) -m pip install --disable-pip-version-check $(addprefix -r ,$(REQUIREMENTS)) || { \
	  echo incomplete > $(VENV)/.installed; echo "pip failed, see above; remove the cause and call make again." >&2; exit 1; }
	@cat $(REQUIREMENTS) > $(VENV)/.installed

demo: setup ## Fetch the embedded backbone, train on two small tasks, show table and plot (DEMO="key=value" to change)
	@$(PY) -m scripts.fetch_weights dinov2_s14
	@$(PY) sweep.py sweep=demo action=run $(DEMO)

test: lint ## Lint, then the quick tests (a few minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto $(TEST)

test-full: lint ## Lint, then every test, torch.compile included
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto -m "full or not full" $(TEST)

test-gpu: setup ## The tests that need a CUDA GPU; the others hide it and train on the CPU
	@CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(PY) -m pytest -m full tests/test_cuda.py $(TEST)

test-lowest: ## Lint and the quick tests with the lowest versions that the requirements allow, in $(VENV)-lowest
	@sed -E 's/^([A-Za-z0-9-]+)>=([0-9.]+)(,<[0-9.]+)?/\1==\2.*/' $(REQUIREMENTS) > .lowest.txt
	@$(MAKE) --no-print-directory test VENV=$(VENV)-lowest REQUIREMENTS=.lowest.txt

lint: setup ## Check the sources with ruff
	@$(PY) -m ruff check .

tables: setup ## Rebuild results/tables from results/records and results/published
	@$(PY) -m scripts.tabulate all

report: setup ## Rebuild results/tables/report.html: every table, plot and source in one page, from the same
	@$(PY) -m scripts.report

clean: ## Remove the virtual environment and caches; results stay
	rm -rf $(VENV) $(VENV)-lowest .lowest.txt .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
