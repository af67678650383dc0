# make book       run the notebooks that changed and build the pages      make test   the same, then every test
# make notebooks  only run them       make html   only build the pages    make check  run all again, compare the records
# make core       the tests of the core alone, in an environment without the companion's packages
# make bench      time a merge        make lock   resolve the pins anew   make clean  drop chapters, records and pages
# make oracles    hold the methods to other people's implementations of them, in a second environment
# make peers      time them and their memory beside fusion_bench's, in the same one: half an hour
# make peers-merge  the same of merges of folders, beside mergekit's: half an hour, 6 GB of disk, 10 GB of memory
# make pdf        the whole book as book/_build/book.pdf; needs Chromium or Chrome
# make browser    make book, then look at every page in Chromium or Chrome, as a reader would
#
# Options of the two benchmarks: make bench BENCH="--plot time.png --repeats 5"; make peers BENCH="--experts 3 --repeats 1"
# Versions of make core: those of the locks, or with OLDEST=1 the oldest that pyproject.toml allows.
#
# A notebook that has not changed is not executed again, by make test neither; after make clean, every one is.
# make clean keeps the environment and the trained experts (.cache); .ci/run starts without either.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
TIER ?= smoke
# extra words for pip when it installs torch, for example an index of CPU builds
TORCH_ARGS ?=
# options of make bench and make peers
BENCH ?=

BIN := $(VENV)/bin
UNEXECUTED = $(filter-out $(notdir $(wildcard book/chapters/*.ipynb)),$(notdir $(wildcard notebooks/*.ipynb)))
STAMP := $(VENV)/.installed
# transformers, whose architectures and checkpoints are merged: chapters and tests ask for it
HUB := $(VENV)/.installed-hub
NEEDED := $(STAMP) $(HUB)
# what drives the browser of `make browser`
BROWSER := $(VENV)/.installed-browser
QPMERGE := $(BIN)/qpmerge
EXACTLY := --quiet --no-deps --no-compile --require-hashes
CORE := $(VENV)-core
# constraints for pip: what was locked, and what the core claims to work with at least
LOCKED = sed -nE 's/^([a-z0-9_.-]+==[^\]*[^\ ]) *\\?$$/\1/p' requirements.lock requirements-torch.txt
LOWER_BOUNDS = sed -nE '/^dependencies = /{s/[^"]*"([^"]*)>=([^"]*)"[^"]*/\1==\2\n/g;p;}' pyproject.toml
OLDEST ?=
export QPMERGE_TIER := $(TIER)

.PHONY: book test notebooks html pdf browser check core bench oracles peers peers-merge lock clean
.DELETE_ON_ERROR:

book: notebooks
	$(MAKE) html

# a file of tests per process: what its tests share is made once
test: book $(HUB)
	QPMERGE_BUILT=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

notebooks: $(NEEDED)
	$(QPMERGE) book run --tier $(TIER)

html: $(STAMP)
	@test -z "$(UNEXECUTED)" || { echo "chapters that were not executed: $(UNEXECUTED); run: make book" >&2; exit 1; }
	$(BIN)/jupyter-book build -W -n --keep-going book

pdf: notebooks
	$(BIN)/jupyter-book build -W -n --keep-going --builder singlehtml book
	$(BIN)/python -m qpmerge_lite.companion.book.pdf

browser: book $(BROWSER)
	QPMERGE_BROWSER=1 QPMERGE_BUILT=1 $(BIN)/python -m pytest tests/test_browser.py

check: $(NEEDED)
	$(QPMERGE) book check --tier $(TIER)

core:
	$(PYTHON) -m venv $(CORE)
	$(if $(OLDEST),$(LOWER_BOUNDS),$(LOCKED)) > $(CORE)/constraints.txt
	$(CORE)/bin/pip install --quiet -c $(CORE)/constraints.txt $(TORCH_ARGS) torch
	$(CORE)/bin/pip install --quiet -c $(CORE)/constraints.txt -e '.[qp,test]'
	$(CORE)/bin/python -m pytest --core --ignore=tests/test_style.py  # of the locked formatter only

bench: $(STAMP)
	$(BIN)/python -m qpmerge_lite.companion.experiments.timing $(BENCH)

oracles: $(VENV)-oracles/.installed
	$(VENV)-oracles/bin/python tests/oracles.py
	$(VENV)-oracles/bin/python tests/oracles_adapters.py

peers: $(VENV)-oracles/.installed
	$(VENV)-oracles/bin/python tests/peers.py $(BENCH)

peers-merge: $(VENV)-oracles/.installed
	$(VENV)-oracles/bin/python tests/peers_merge.py $(BENCH)

# our pins hold there too
$(VENV)-oracles/.installed: requirements.lock requirements-torch.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-oracles
	sed -nE 's/^([a-z0-9_.-]+==[^\]*[^\ ]) *\\?$$/\1/p' requirements.lock > $(VENV)-oracles/constraints.txt
	$(VENV)-oracles/bin/pip install --quiet $(TORCH_ARGS) -r requirements-torch.txt
	$(VENV)-oracles/bin/pip install --quiet -c $(VENV)-oracles/constraints.txt -e '.[suites,qp,oracles]'
	touch $@

# locks name every package, so nothing is left to resolve, and modules are compiled when they are used; torch comes
# second and without hashes: CPU and CUDA builds of one version differ
$(STAMP): requirements.lock requirements-torch.txt pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'qpmerge-lite needs Python 3.11 or newer, found: $(or $(PYTHON),none)' \
	    '(name one: make book PYTHON=/path/to/python3.11)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(EXACTLY) -r requirements.lock
	$(BIN)/pip install --quiet --no-compile $(TORCH_ARGS) -r requirements-torch.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(HUB): requirements-hub.lock $(STAMP)
	$(BIN)/pip install $(EXACTLY) -r requirements-hub.lock
	touch $@

$(BROWSER): requirements-browser.lock $(STAMP)
	$(BIN)/pip install $(EXACTLY) -r requirements-browser.lock
	touch $@

# needs uv; keeps the pins of the present lock where it can, and writes the same ones into environment.yml
RESOLVE := uv pip compile --quiet --universal --python-version 3.11.5 --generate-hashes --no-annotate --no-header --no-emit-index-url
lock:
	$(RESOLVE) requirements.in -o requirements.lock
	$(RESOLVE) requirements-hub.in -c requirements.lock -o requirements-hub.lock
	$(RESOLVE) requirements-browser.in -c requirements.lock -o requirements-browser.lock
	{ sed '/- pip:$$/q' environment.yml; \
	  sed -nE 's/^([a-z0-9_.-]+==[^\]*[^\ ]) *\\?$$/      - "\1"/p' requirements.lock requirements-torch.txt; \
	  echo '      - -e .'; } > environment.yml.new
	mv environment.yml.new environment.yml

clean:
	rm -rf book/_build book/_records book/chapters book/_scripts
