# Developer commands; `make` lists them. Needs GNU Make 3.81 or later and a POSIX shell.

# Which Python the virtual environment is made with; found below where none is given.
PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
# More options for the command behind a target: make demo ARGS=--quick, make test ARGS="-m slow".
ARGS ?=

# Two processes with one thread each: more threads than cores are slower than one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: help demo test truth docs package parts papers speed check format clean FORCE
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

demo: $(VENV)/.stamp-demo ## install, then fit, sample and compare on the built-in data: runs/demo/report.html
	@$(BIN)/calibrant run --out runs/demo --overwrite $(ARGS)

test: $(VENV)/.stamp-test ## run the default tests
	$(PYTEST) $(ARGS)

truth: $(VENV)/.stamp-test ## run the tests of statistical truth, which take longer than the default ones
	$(PYTEST) -m truth $(ARGS)

docs: $(VENV)/.stamp-docs ## build the documentation site: docs/_build/html/index.html
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html $(ARGS)
	$(BIN)/python docs/check_site.py docs/_build/html

package: $(VENV)/.stamp-test ## build wheel and source distribution into dist/, and check what they hold
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python .ci/packages.py

parts: $(VENV)/.stamp-test ## write the page of models, likelihoods and data sets from their cards
	$(BIN)/python docs/make_parts.py

papers: $(VENV)/.stamp-test ## write the tables of docs/papers from stored results of `calibrant reproduce`
	$(BIN)/python docs/make_papers.py

speed: $(VENV)/.stamp-test ## write the tables of docs/speed.md and docs/densities.md from stored results of benchmarks
	$(BIN)/python docs/make_speed.py

check: $(VENV)/.stamp-test ## run all that a change must pass: ruff, mypy, the default tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) $(ARGS)

format: $(VENV)/.stamp-test ## let ruff format, and correct what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove the virtual environments and caches; runs/ stays
	rm -rf .venv .venv-wheel .local/data build dist docs/_build docs/reference *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An installed environment is as new as its stamp, so that pip runs only where pyproject.toml changed. pip tells errors
# alone; a line before it says that it takes minutes, and one after it what was installed.
define install
@echo "Installing calibrant$(2) into $(VENV): PyTorch is large, the first time takes minutes."
@begun=$$(date +%s) && $(BIN)/python -m pip install -qq --disable-pip-version-check $(1) && \
	echo "Installed $$($(BIN)/calibrant --version):" \
	"$$($(BIN)/python -c 'from importlib.metadata import distributions; print(len(list(distributions())))') packages," \
	"$$(du -sh $(VENV) | cut -f1) in $(VENV), after $$(($$(date +%s) - begun)) seconds."
endef

$(VENV)/.stamp-demo: pyproject.toml $(VENV)/.stamp-venv
	$(call install,--editable .)
	@touch $@

$(VENV)/.stamp-test: pyproject.toml $(VENV)/.stamp-venv
	$(call install,--editable '.[test$(comma)features]', and its test tools)
	@touch $(VENV)/.stamp-demo $@

# The wheel of `make package`, as users install it. A wheel of the same version would not replace the installed one.
$(VENV)/.stamp-wheel: $(wildcard dist/*.whl) $(VENV)/.stamp-venv
	@$(BIN)/python -m pip uninstall -qq --yes calibrant
	$(call install,"$(firstword $(wildcard dist/*.whl))[test$(comma)features]", from its wheel$(comma))
	@touch $@

$(VENV)/.stamp-docs: pyproject.toml $(VENV)/.stamp-venv
	$(call install,--editable '.[docs]', and what builds its documentation)
	@touch $(VENV)/.stamp-demo $@

comma := ,

$(VENV)/.stamp-venv:
	$(eval python := $(find_python))
	$(if $(filter calibrant,$(firstword $(python))),$(error $(python)))
	@"$(python)" -m venv --clear $(VENV)
	@echo '*' > $(VENV)/.gitignore
	@touch $@

# An environment of another Python than the one asked for is made anew.
identity = $(shell "$(1)" -c 'import sys; print(sys.version + sys.base_prefix)' 2>/dev/null)
ifneq ($(PYTHON),)
ifneq ($(call identity,$(PYTHON)),$(call identity,$(BIN)/python))
$(VENV)/.stamp-venv: FORCE
endif
endif
FORCE:

# The first Python that is new enough and can make environments; else one line, beginning with the project's name,
# that says what to do.
find_python = $(shell found=; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
		version=`"$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null`; \
		if [ -z "$$version" ]; then \
			found="$$found$(if $(PYTHON), $$python cannot be run;)"; \
		elif ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
			found="$$found $$python is $$version;"; \
		elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
			found="$$found $$python lacks venv (Debian, Ubuntu: apt install python$$version-venv);"; \
		else \
			echo "$$python"; exit; \
		fi; \
	done; \
	echo "calibrant needs Python 3.11 or later with the module venv, but$${found:- no Python was found;}" \
		"install it, or name one that has it: make TARGET PYTHON=/path/to/python3")
