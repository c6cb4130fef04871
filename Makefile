# `make report` and `make test` set up everything they need in .venv, once, and then do their job.
PYTHON ?= python3
PRESET ?= mini
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help install report site keep test lab lint clean distclean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(READY)  ## set up .venv with the pinned packages (the other targets do it by themselves)

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v=sys.version_info[:2]; sys.exit(0 if v >= (3,11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,d4rl,gguf]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps d4rl
	@touch $@

report: $(READY)  ## collect data, run the experiments, execute the pages, render _site/ (PRESET=smoke|mini, JOBS=2, SEEDS=n)
	$(BIN)/dt-pretrain report --preset $(PRESET) --jobs $(JOBS) $(if $(SEEDS),--seeds $(SEEDS))

site: $(READY)  ## render the site from what is there, without running an experiment
	$(BIN)/dt-pretrain site

keep: $(READY)  ## after `make report`: keep the executed pages in nbs/ and make README.md from index.ipynb
	$(BIN)/dt-pretrain keep

test: $(READY)  ## all tests: notebooks, experiments, packaging, and the site in a browser where chromium is installed
	$(BIN)/python -m pytest

lab: $(READY)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs/index.ipynb

lint: $(READY)  ## ruff on notebooks, tests and benchmarks
	$(BIN)/ruff check nbs tests benchmarks setup.py
	$(BIN)/ruff check --isolated --select F821,F401,F811 dt_pretrain  # a notebook's tests may import what its exported cells lack

clean:  ## delete what was built (the site, processed notebooks, caches of tools); keeps data, runs and .venv
	rm -rf _site _proc _report/nbs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## also delete .venv, collected data and runs
	rm -rf $(VENV) .cache _report runs
