# poet_nb: `make` lists the targets.
#   VENV=.venv      environment to make and use; VENV=none uses PYTHON as it is
#   PYTHON=python3  interpreter (3.10 or later)
#   PIP_ARGS=       more arguments for pip, e.g. an --extra-index-url with CPU builds of PyTorch
#   NB=             notebooks meant by execute and tidy: numbers, names or globs ("05 20_matcher 5*"); default all
#   ALL=1           execute cells flagged slow, gpu and data too
#   JOBS=2          notebooks, or files of tests, at once

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
NB ?=
ALL ?=
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

ifeq ($(VENV),none)
PY := $(PYTHON)
INSTALLED :=
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif
SCRIPTS = $(shell $(PY) -c "import sysconfig; print(sysconfig.get_path('scripts'))")

FIGURES := nbs/[56]*_*.ipynb
SYNTH := data/synth/annotations/person_keypoints_val2017.json

.PHONY: help install data figures test test-notebooks test-python test-slow check execute tidy export readme docs hooks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@sed -n '/^#  /s/^#/ /p' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make the environment and install everything into it (once)

ifneq ($(VENV),none)
$(INSTALLED): settings.ini setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: sudo apt-get install python3 python3-venv, or make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$$($(PYTHON) --version) is too old: poet_nb needs Python 3.10 or later; make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: sudo apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): PyTorch is large, so this takes some minutes the first time."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade $(PIP_ARGS) "pip>=25.1"
	@$(PY) -m pip install $(PIP_ARGS) --editable ".[dev]"
	@touch $@
endif

data: $(SYNTH) ## make the small set of synthetic people that the figures and their tests need

$(SYNTH): | $(INSTALLED)
	@$(PY) -m poet_nb.cli data synth --folder data/synth --train 0 --val 500

figures: install data ## make the environment and the data, run the figure notebooks, write figures/
	@$(PY) tools/execute.py --no-write --jobs $(JOBS) $(if $(ALL),--all) $(FIGURES)
	@ls figures

test: install ## nbdev_test and pytest; slow tests left out
	@status=0; $(MAKE) test-notebooks || status=1; $(MAKE) test-python || status=1; exit $$status

test-notebooks: install data
	@"$(SCRIPTS)/nbdev_test" --n_workers $(JOBS) --do_print --timing

test-python: install
	@$(PY) -m pytest -n $(JOBS) --dist loadfile

test-slow: install ## the tests marked slow: minutes, or data that is downloaded
	@$(PY) -m pytest -m slow

check: install ## notebooks clean, executed and small; modules and README in sync; imports, ids, names
	@$(PY) tools/check.py

execute: install ## run notebooks from a fresh kernel and write their outputs: make execute NB="05 20_matcher" [ALL=1]
	@$(PY) tools/execute.py $(if $(ALL),--all) $(NB)

tidy: install ## clean notebooks of counters, metadata and addresses; outputs stay
	@$(PY) tools/notebooks.py $(NB)

export: install ## notebooks -> poet_nb/
	@"$(SCRIPTS)/nbdev_export"

readme: install ## nbs/index.ipynb -> README.md
	@$(PY) tools/readme.py

docs: install ## the notebooks as a site with search and reference -> _docs/
	@$(PY) -c 'import material, latex2mathml' 2>/dev/null || $(PY) -m pip install --quiet $(PIP_ARGS) --editable ".[docs]"
	@$(PY) tools/docs.py

hooks: install ## teach this clone's git to merge notebooks cell by cell
	@git config --local merge.nbdev-merge.name "merge notebooks cell by cell"
	@git config --local merge.nbdev-merge.driver "'$(SCRIPTS)/nbdev_merge' %O %A %B %P"

clean: ## remove what is made: caches, builds, synthetic data; the environment, runs and downloads stay
	@rm -rf build dist *.egg-info _docs .pytest_cache .hypothesis .ruff_cache data/synth
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@find . -name .ipynb_checkpoints -not -path './.venv/*' -prune -exec rm -rf {} +
