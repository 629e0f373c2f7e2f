# Two commands on a fresh machine: `make demo` and `make test`. Both build .venv if need be.
PYTHON ?= python3
DATABASE ?= milvus
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
DOCS_READY := $(VENV)/.installed-docs

.PHONY: demo test lint types unit integration docs nightly lock clean

demo: $(READY)
	$(BIN)/amips demo --database $(DATABASE)

test: lint types unit integration docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

integration: $(READY)
	$(BIN)/python -m pytest integration_tests -n 2 --dist loadfile

# The site, in build/docs: every warning is an error, and every link leads somewhere. It takes
# Python 3.11; the older one has nothing to build it with.
docs: $(READY) $(DOCS_READY)
	$(BIN)/python docs/make_figures.py --check
	rm -rf build/docs
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || echo 'The site is not built: that takes Python 3.11 or later.'
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))' || { \
	  $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs \
	  && $(BIN)/python docs/check_site.py build/docs; }

# What takes longer than a developer waits for: over a hundred kills of servers and clients, both
# demos, and the benchmarks on part of the data.
nightly: test
	AMIPS_NIGHTLY=1 AMIPS_KILLS=10 $(BIN)/python -m pytest integration_tests/test_milvus_crashes.py \
	  integration_tests/test_milvus_server.py -n 2 --dist loadfile --timeout 900
	$(BIN)/amips demo --database milvus
	$(BIN)/amips demo --database qdrant
	AMIPS_FUZZ=100000 $(BIN)/python -m pytest tests/faults/test_bundle_fuzz.py
	$(BIN)/python benchmarks/routing.py pydocs --quick --limit 5000
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/serving.py pydocs --quick --limit 5000 --keys 20000

# Exact versions for every supported Python; ranges for users stand in pyproject.toml.
lock:
	echo 'torch==2.13.0' > requirements/torch.txt
	uv pip compile --universal --python-version 3.10 --extra dev --constraint requirements/torch.txt \
	  --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements/constraints.txt
	rm requirements/torch.txt
	uv pip compile --universal --python-version 3.10 --extra docs --no-emit-index-url --no-annotate \
	  --no-header --constraint requirements/constraints.txt pyproject.toml -o requirements/docs.txt

clean:
	rm -rf $(VENV) .demo build *.egg-info

$(READY): pyproject.toml requirements/constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or later is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[dev]'
	touch $@

$(DOCS_READY): $(READY) requirements/docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/docs.txt --editable '.[docs]'
	touch $@
