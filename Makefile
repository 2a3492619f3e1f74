# `make train` and `make test` need Python 3.11 or newer and pip, nothing else: each makes its own
# virtual environment on the first call. More words for the program go into ARGS:
#   make train ARGS="--epochs=3 --cost=cross_entropy"
#   make test ARGS="-k sampling"
# PYTHON chooses the interpreter, VENV the folder of the environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
venv_python = $(VENV)/bin/python
# The pip of $(PYTHON) fills the environment, so that ensurepip, which Debian leaves out, is not
# needed.
install = $(PYTHON) -m pip --python $(venv_python) install --quiet --disable-pip-version-check \
  --constraint constraints.txt pip

.PHONY: help train test test-all check clean
help:
	@echo 'make train     trains the textbook network on the digits'
	@echo 'make test      runs the fast tests and doctests: 94 % of the lines of sgd_jax'
	@echo 'make test-all  runs them all'
	@echo 'make check     runs the format, lint and type checks, builds the site and does make test'
	@echo 'make clean     removes $(VENV)'
	@echo 'each takes ARGS="...", PYTHON=... and VENV=...'

train: $(VENV)/experiments.stamp
	$(venv_python) -m experiments.train $(ARGS)

test: $(VENV)/dev.stamp
	PYTHON=$(venv_python) scripts/check tests $(ARGS)

test-all: $(VENV)/dev.stamp
	PYTHON=$(venv_python) scripts/check tests --all $(ARGS)

check: $(VENV)/dev.stamp
	PYTHON=$(venv_python) scripts/check

clean:
	rm -rf $(VENV)

$(venv_python):
	$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/experiments.stamp: pyproject.toml constraints.txt | $(venv_python)
	@echo 'Installing into $(VENV); this takes a minute or two, once.'
	$(install) --editable '.[experiments]'
	@touch $@

# What the tests need holds all that the experiments need.
$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(venv_python)
	@echo 'Installing into $(VENV); this takes a minute or two, once.'
	$(install) --editable '.[dev]'
	@touch $(VENV)/experiments.stamp $@
