# `make demo` and `make test` need only git, make and python3 (3.11 or later); they make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed

.PHONY: env demo test test-fast lint types docs bench bench-estimate clean

env: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moejax needs Python 3.11 or later; " + sys.executable + " is " + sys.version.split()[0] + " (choose another with: make PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $@

demo: $(STAMP)
	$(BIN)/moejax sweep sweeps/quickstart.toml

# a file's tests stay in one process, which compiles what they share once
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# basedpyright's package brings its own program and Node: nothing is fetched when it runs
types: $(STAMP)
	$(BIN)/basedpyright

$(DOCS_STAMP): pyproject.toml $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group docs
	touch $@

# the site, in build/site; a warning is an error. To read it: .venv/bin/python -m http.server --directory build/site
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "written: build/site/index.html"

# throughput, planning and reading of sweeps, and the studies behind docs/evidence/accuracy.md; about half an hour on two cores
bench: $(STAMP)
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/sweep_plan.py
	$(BIN)/python benchmarks/sweep_store.py
	$(BIN)/python benchmarks/likelihood_gap.py
	$(BIN)/python benchmarks/spectral_accuracy.py rates
	$(BIN)/python benchmarks/spectral_accuracy.py mse

# the studies behind docs/evidence/efficiency.md and estimate.md; hours on two cores
bench-estimate: $(STAMP)
	$(BIN)/python benchmarks/efficiency.py
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/global_optimum.py
	$(BIN)/python benchmarks/residual_passes.py errors
	$(BIN)/python benchmarks/residual_passes.py variance
	$(BIN)/python benchmarks/baselines.py
	$(BIN)/python benchmarks/estimator_checks.py

clean:
	rm -rf $(VENV) runs build/site
