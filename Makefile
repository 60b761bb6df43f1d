# Setting up, running and checking Shoal. Everything lands in .venv; `make help` lists the targets.

PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,$(shell $(python) -c \
	'import sys; sys.version_info >= (3, 11) and print("$(python)")' 2>/dev/null)) python3)
MODEL = smollm2
ROWS =
ROUNDS = 5
TRIALS = 2
PROMPT = Explain in two sentences how a lighthouse works.

BIN := .venv/bin
SHOAL := $(BIN)/shoal
SOURCES := pyproject.toml constraints-dev.txt $(wildcard setup.py kernels/native/* comm/group/native/*)
# Quietly: a spinner of pip would stand in the lines that the build of the kernels shows.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q

# Some containers forbid Python to keep what it compiles: then every worker and every daemon of the tests would compile
# all anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup run test test-peer test-cluster test-cards test-aarch64 sanitize check bench bench-offload \
	bench-cluster bench-gpu clean distclean

help: ## show this
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-13s %s\n' "$$name" "$$text"; done

setup: .venv/.installed ## install Shoal into .venv

# Temperature 0: a model this small strays when it may choose.
run: .venv/.installed ## answer PROMPT="…" with the default model, fetching what is missing
	@$(SHOAL) ls 2>/dev/null | grep -q '^$(MODEL) ' || $(SHOAL) pull $(MODEL)
	@$(SHOAL) ps >/dev/null 2>&1 || $(SHOAL) serve --detach --model $(MODEL)
	@echo
	@$(SHOAL) run $(MODEL) --temperature 0 '$(subst ','\'',$(value PROMPT))' </dev/null
	@echo
	@echo 'Go on with    $(SHOAL) chat'
	@echo 'See also      $(SHOAL) --help'
	@echo 'Stop with     $(SHOAL) stop'

# In order of their names: those of files with few tests would come last otherwise, and one of them takes 40 s alone.
test: .venv/.installed-dev ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not peer and not cluster' </dev/null

test-peer: .venv/.installed-dev bench/.venv/.installed ## run the tests that need llama.cpp or the default model
	@$(SHOAL) ls 2>/dev/null | grep -q '^$(MODEL) ' || $(SHOAL) pull $(MODEL)
	@SHOAL_PEER_PYTHON='$(CURDIR)/bench/.venv/bin/python' $(BIN)/python -m pytest -m peer </dev/null

test-cluster: .venv/.installed-dev ## run clusters that are killed, frozen, unplugged (root: more of them); TRIALS=5
	@TRIALS='$(TRIALS)' $(BIN)/python -m pytest -m cluster </dev/null

test-cards: .venv/.installed-dev ## compile Triton's kernels of all types for graphics cards that are not there (Linux, x86-64)
	@$(BIN)/python bench/cards/compiled.py

test-aarch64: .venv/.installed-dev ## run the kernel tests on an emulated ARM machine (Debian, qemu-user)
	@tests/aarch64.sh

sanitize: .venv/.installed-dev ## run the kernel tests under ASan, UBSan and TSan
	@tests/sanitize.sh

check: .venv/.tools ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: .venv/.installed-dev bench/.venv/.installed ## Shoal and its peers in turn; ROWS=speed,long ROUNDS=5
	@$(SHOAL) ls 2>/dev/null | grep -q '^$(MODEL) ' || $(SHOAL) pull $(MODEL)
	@$(BIN)/python bench/compare.py --rows '$(ROWS)' --rounds '$(ROUNDS)'

bench-offload: ROUNDS = 3
bench-offload: .venv/.installed-dev bench/.venv/.installed ## models larger than memory, in cgroups (root); ROWS=dense,gguf
	@$(SHOAL) ls 2>/dev/null | grep -q '^$(MODEL) ' || $(SHOAL) pull $(MODEL)
	@$(BIN)/python bench/offload.py --rows '$(ROWS)' --rounds '$(ROUNDS)'

bench-cluster: ROUNDS = 3
bench-cluster: .venv/.installed-dev ## a cluster of network namespaces (root): losses, gains, costs; ROWS=losses,grid
	@$(SHOAL) ls 2>/dev/null | grep -q '^$(MODEL) ' || $(SHOAL) pull $(MODEL)
	@$(BIN)/python bench/many_hosts.py --rows '$(ROWS)' --rounds '$(ROUNDS)'

bench-gpu: .venv/.installed-dev ## on a graphics card, a quarter of an hour: tests, then measurements; ROWS=tests,dense
	@PYTHON='$(CURDIR)/$(BIN)/python' bench/gpu.sh $(if $(ROWS),--parts '$(ROWS)')

clean: ## remove what building and testing left; .venv stays
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## remove .venv and the built kernels too
	@rm -rf .venv bench/.venv .aarch64 kernels/*.so

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo 'Shoal needs Python 3.11 or later: none was found.'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Shoal needs Python 3.11 or later, this is $$($(PYTHON) -V): make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'This Python cannot make virtual environments: install its venv package (on Debian: python3-venv).'; exit 1; }
	@echo 'Making .venv with '"$$($(PYTHON) -V)"
	@$(PYTHON) -m venv --clear .venv

# What pyproject.toml asks for is installed apart from Shoal itself: `make -j2` compiles its kernels meanwhile.
REQUIREMENTS = $(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*$(1), sep="\n")'

.venv/.packages: pyproject.toml constraints-dev.txt | .venv/bin/python
	@echo 'Installing what Shoal needs into .venv (once; a minute)'
	@$(call REQUIREMENTS,project["dependencies"]) >.venv/packages.txt
	@$(INSTALL) -r .venv/packages.txt -c constraints-dev.txt
	@touch $@

# Their modules are compiled when they are imported: most of transformers never is.
.venv/.tools: pyproject.toml constraints-dev.txt | .venv/.packages
	@echo 'Installing the tools for the tests into .venv'
	@$(call REQUIREMENTS,project["optional-dependencies"]["dev"]) >.venv/tools.txt
	@$(INSTALL) --no-compile -r .venv/tools.txt -c constraints-dev.txt
	@touch $@

.venv/.shoal: $(SOURCES) | .venv/bin/python
	@echo 'Installing Shoal into .venv (once; a few minutes)'
	@: >.venv/build.log; tail -f .venv/build.log & trap "kill $$!" EXIT; \
		SHOAL_BUILD_LOG='$(CURDIR)/.venv/build.log' $(INSTALL) --no-deps -e .
	@touch $@

.venv/.installed: .venv/.packages .venv/.shoal
	@touch $@

.venv/.installed-dev: .venv/.installed .venv/.tools
	@touch $@

bench/.venv/.installed: bench/requirements.txt
	@echo 'Building the peers into bench/.venv (once; some minutes)'
	@$(PYTHON) -m venv --clear bench/.venv
	@bench/.venv/bin/python -m pip --disable-pip-version-check install -q -r bench/requirements.txt
	@touch $@
