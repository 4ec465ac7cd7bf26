# `make demo` and `make test` work on a clean clone: they need Python 3.11 or later with pip and venv, and PyPI.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL: # two goals may want the same environment
.DEFAULT_GOAL := help

# The first of these that runs and is new enough; `make PYTHON=/path/to/python3.12 test` overrules.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# torch comes only through the constraints: without them pip takes the newest, with several GB of CUDA.
INSTALL := install --progress-bar off -c constraints.txt
# Whole files to a process, so that the bundles its tests share are built once.
PARALLEL := -n 2 --dist loadfile

BUNDLE := build/stickers
PICTURE := build/stickers.png

.PHONY: help
help: ## Lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environments: one stamp file for each set of extras ---------------------------------------------------------------

.PHONY: setup
setup: $(VENV)/.dev ## Creates .venv with everything that developing takes

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'no Python 3.11 or later found; name one: make PYTHON=/path/to/python ...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.all: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip $(INSTALL) -e '.[all]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip $(INSTALL) -e '.[all,dev]'
	touch $(VENV)/.all $@

# A local version such as torch's +cpu is left out: any build of that version will do.
FREEZE = $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$$//'

.PHONY: constraints
constraints: $(VENV)/.dev ## Freezes .venv into constraints.txt (its header says when)
	{ sed -n '/^#/p' constraints.txt; $(FREEZE); } > constraints.new
	mv constraints.new constraints.txt

# --- use ---------------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: bundle ## Builds the built-in generator for ONNX Runtime and draws a grid of pictures with it
	$(BIN)/fewstep generate $(BUNDLE) --grid -o $(PICTURE)
	@printf '\npictures  %s\nreport    %s\n' '$(CURDIR)/$(PICTURE)' '$(CURDIR)/$(BUNDLE)/report/index.html'

.PHONY: bundle
bundle: $(VENV)/.all ## Builds build/stickers, the bundle of the built-in generator
	$(BIN)/fewstep build stickers --target onnxruntime --recipe fp32 -o $(BUNDLE)

.PHONY: bundle-step
bundle-step: $(VENV)/.all ## Builds build/stickers-step, whose networks are what other tools know: time as an input
	$(BIN)/fewstep build stickers --target onnxruntime --recipe fp32 --form step -o $(BUNDLE)-step

# --- checks ------------------------------------------------------------------------------------------------------------

.PHONY: lint
lint: $(VENV)/.dev ## Style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

.PHONY: test
test: lint ## Lint, then every test that takes seconds
	$(BIN)/pytest $(PARALLEL) -m 'not slow'

.PHONY: test-all
test-all: lint ## Lint, then every test
	$(BIN)/pytest $(PARALLEL)

POINTS ?= 50
.PHONY: test-kill
test-kill: $(VENV)/.dev ## Kills builds of the built-in generator at POINTS random points and damages their caches (an hour or more)
	for recipe in fp32 w8a8; do \
		OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.support.killing --points $(POINTS) -- stickers --recipe $$recipe; \
	done
HOSTILE ?= 10000
HOSTILE_SOURCES ?= 1000
.PHONY: test-hostile
test-hostile: $(VENV)/.dev ## Reads 10,000 hostile bundles, recipes, plans and tokenizers and 1,000 sources (an hour); HOSTILE=500 for fewer
	$(BIN)/python -W ignore -m tests.hostile.make build/hostile
	$(BIN)/python -W ignore -m tests.hostile --count $$(( $(HOSTILE) * 8 / 10 )) --bundles build/hostile/lcm build/hostile/plain
	$(BIN)/python -W ignore -m tests.hostile --count $$(( $(HOSTILE) * 2 / 10 )) --bundles build/hostile/lcm --kinds plan reference
	$(BIN)/python -W ignore -m tests.hostile --count $(HOSTILE_SOURCES) --sources build/hostile/source --kinds source
.PHONY: test-faults
test-faults: $(VENV)/.dev ## Seeds faults into verified bundles and writes what notices them into docs/parity.md (goes on where it was interrupted)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.faults

.PHONY: families
families: $(VENV)/.dev ## Builds every family of tests/support/zoo and writes docs/families.md
	$(BIN)/python -W ignore -m tests.support.families > docs/families.new
	mv docs/families.new docs/families.md

.PHONY: coreml-operators
coreml-operators: $(VENV)/.dev ## Runs coremltools' own tests on our evaluator and writes docs/coreml-operators.md (minutes; goes on where it was interrupted)
	$(BIN)/python -W ignore -m tests.unit.runtimes.coreml.mil.operators > docs/coreml-operators.new
	mv docs/coreml-operators.new docs/coreml-operators.md

.PHONY: coreml-families
coreml-families: $(VENV)/.dev ## Compiles every network of tests/support/zoo for Core ML and writes docs/coreml-families.md (goes on where it was interrupted)
	$(BIN)/python -W ignore -m tests.backends.families coreml > docs/coreml-families.new
	mv docs/coreml-families.new docs/coreml-families.md

# The other world of versions: Optimum and transformers 4, in an environment of its own.
INTEROP := .venv-interop

.PHONY: interop
interop: bundle-step $(INTEROP)/.installed ## Opens a bundle in step form with Optimum's ONNX Runtime pipeline; compares merged LoRAs with PEFT's
	FEWSTEP_BUNDLE=$(BUNDLE)-step $(INTEROP)/bin/pytest tests/interop -W default

$(INTEROP)/bin/python:
	$(PYTHON) -m venv $(INTEROP)

$(INTEROP)/.installed: pyproject.toml constraints-interop.txt | $(INTEROP)/bin/python
	$(INTEROP)/bin/python -m pip install --progress-bar off -c constraints-interop.txt \
		-e '.[onnxruntime]' diffusers hypothesis optimum-onnx peft pytest torch
	touch $@

# Backends whose packages do not go with constraints.txt, each in an environment of its own.
.PHONY: test-backends
test-backends: test-litert test-executorch ## Tests LiteRT and ExecuTorch, each in an environment of its own (2 GB each)

.PHONY: test-litert test-executorch
test-litert test-executorch: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -p no:anyio tests/backends/test_$*.py # an older plugin, whose warnings are errors

.PHONY: litert-families executorch-families
litert-families executorch-families: %-families: .venv-%/.installed # builds every family of tests/support/zoo for one of them
	OMP_NUM_THREADS=1 .venv-$*/bin/python -W ignore -m tests.backends.families $* > docs/$*-families.new
	mv docs/$*-families.new docs/$*-families.md

.venv-litert/.installed .venv-executorch/.installed: .venv-%/.installed: pyproject.toml constraints-%.txt
	@test -n '$(PYTHON)' || { echo 'no Python 3.11 or later found; name one: make PYTHON=/path/to/python ...' >&2; exit 2; }
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --progress-bar off -c constraints-$*.txt -e '.[$*,onnxruntime,test]'
	touch $@

# --- the web app -------------------------------------------------------------------------------------------------------

WEB := apps/web
# The bundles that the app is tested with in a browser, the first also in all that can go wrong; those that are not there
# are built. `make test-app BUNDLES=build/stickers` takes the least time.
BUNDLES ?= $(BUNDLE)-w8a8,$(BUNDLE)-w8,$(BUNDLE)
comma := ,
TESTED := $(subst $(comma), ,$(BUNDLES))

.PHONY: app
app: app-build bundle ## Builds the web app, serves it with build/stickers and opens it (needs Node 18 or later)
	$(BIN)/fewstep app $(BUNDLE) --serve --open

.PHONY: app-build
app-build: $(WEB)/node_modules/.installed ## Builds the web app into src/fewstep/app/static, which ships in the wheel
	cd $(WEB) && npx --no-install tsc --noEmit && npx --no-install vite build

.PHONY: test-app
test-app: $(VENV)/.dev app-build $(TESTED:=/manifest.json) ## Tests the web app in Chromium (installs Debian's Chromium and npm packages where it may)
	$(WEB)/build/need.sh chromium
	@changed=$$(git status --porcelain -- src/fewstep/app/static); test -z "$$changed" || { \
		echo 'error: src/fewstep/app/static is not what apps/web builds' >&2; \
		echo 'hint: commit it, as make app-build has just written it' >&2; exit 1; }
	cd $(WEB) && FEWSTEP_BUNDLES=$(BUNDLES) npx --no-install vitest run
	cd $(WEB) && FEWSTEP_BUNDLES=$(BUNDLES) npx --no-install vitest run -c vitest.browser.config.ts

$(BUNDLE)/manifest.json: | $(VENV)/.all
	$(BIN)/fewstep build stickers --target onnxruntime --recipe fp32 -o $(@D)

$(BUNDLE)-%/manifest.json: | $(VENV)/.all
	$(BIN)/fewstep build stickers --target onnxruntime --recipe $* -o $(@D)

# Not `npm ci`, which refuses a lock file without the binaries of other platforms that a mirror may lack.
$(WEB)/node_modules/.installed: $(WEB)/package-lock.json
	$(WEB)/build/need.sh node
	cd $(WEB) && npm install --no-save --no-audit --no-fund
	touch $@

# --- the built-in generator --------------------------------------------------------------------------------------------

AUTOENCODER_STEPS ?= 1800
TEACHER_STEPS ?= 20000
TRAIN := $(BIN)/python -m fewstep.stickers

# Training frees and takes hundreds of MB a step: kept by malloc instead of given back, a quarter of the time is saved.
stickers-train: export MALLOC_MMAP_THRESHOLD_ = 8589934592
stickers-train: export MALLOC_TRIM_THRESHOLD_ = 8589934592
.PHONY: stickers-sets
stickers-sets: $(VENV)/.dev ## Fetches emoji in other styles from npm, for STICKERS_VARIANT=styles or large
	$(TRAIN).sets

.PHONY: stickers-train
stickers-train: $(VENV)/.dev ## Trains the built-in generator again (a day on two cores; goes on where it was interrupted)
	$(TRAIN).autoencoder --iterations $(AUTOENCODER_STEPS)
	$(TRAIN).text
	$(TRAIN).teacher --iterations $(TEACHER_STEPS)
	$(TRAIN).distill
	$(TRAIN).autoencoder --decoder-only
	$(TRAIN).package
	$(TRAIN).evaluate

# --- benchmarks --------------------------------------------------------------------------------------------------------

CASES ?= small middle sd15
.PHONY: bench-scale
bench-scale: $(VENV)/.dev $(INTEROP)/.installed ## Measures compiling networks of full size (goes on where it was interrupted), beside optimum-onnx; CASES=sdxl needs 15 GB of disk
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale $(CASES)
	$(BIN)/python -m benchmarks.scale --shapes --tiles
	$(BIN)/python -m benchmarks.scale.bundle sd15
	$(BIN)/python -m benchmarks.scale.plan
	$(BIN)/python -m benchmarks.scale.versus --peer $(INTEROP)/bin/python

ROWS ?=
.PHONY: bench-quant
bench-quant: $(VENV)/.dev bundle-step ## Compares recipes with other tools' int8 (goes on where it was interrupted); ROWS=... for some
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quant $(ROWS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quant.operators
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quant.orderings

.PHONY: bench-backends
bench-backends: $(VENV)/.dev .venv-litert/.installed .venv-executorch/.installed ## Builds and measures the built-in generator for every runtime, on every executor (goes on where it was interrupted)
	for environment in $(VENV) .venv-litert .venv-executorch; do OMP_NUM_THREADS=1 $$environment/bin/python -m benchmarks.backends; done

.PHONY: bench-static
bench-static: $(VENV)/.dev ## Counts what known steps take out of networks of full size, and times the built-in generator
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.static --stickers --memory --step-grids

.PHONY: bench-coreml
bench-coreml: $(VENV)/.dev ## Compares recipes for Core ML by size and quality (goes on where it was interrupted); ROWS=... for some
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coreml $(ROWS)

# --- distribution ------------------------------------------------------------------------------------------------------

.PHONY: wheel
wheel: $(VENV)/.dev ## Builds dist/*.tar.gz, and dist/*.whl from it
	$(BIN)/python -m build --outdir dist .

.PHONY: clean
clean: ## Removes environments, caches and distributions; keeps build/, where training states and bundles are
	rm -rf $(VENV) $(INTEROP) .venv-litert .venv-executorch $(WEB)/node_modules $(WEB)/lib dist src/*.egg-info build/lib build/bdist.*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path ./build -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
