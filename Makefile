# `make` alone says what there is. Everything sets itself up first; `ARGS="..."` is handed on:
#
#     make demo ARGS=--keep
#     make test-fast ARGS="-k placement"

BIN   := .venv/bin
SETUP := tools/setup-machine
CODE  := $(wildcard mcp tests bench)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint types format bench schemas lab engine-stop clean

help: ## say what there is
	@awk -F ': ## ' '/^[a-z-]+: ## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## get this machine what demo and test need (as root, from Debian)
	@$(SETUP) python engine live

demo: ## show a fleet of four at work on this machine
	@$(SETUP) python engine
	@$(BIN)/mcp demo $(ARGS)

test: ## test everything but the rig, on the real server and the real engine; skips nothing
	@$(SETUP) python engine live
	@MCP_REQUIRE_LIVE=1 $(BIN)/pytest -n 2 --dist loadfile -m 'not lab' $(ARGS)

test-fast: ## test what needs no engine, in less than a minute
	@$(SETUP) python
	@MCP_HYPOTHESIS=fast $(BIN)/pytest -n 2 --dist worksteal -m 'not (live or engine or lab or slow)' $(ARGS)

lint: ## check style and format
	@$(SETUP) python
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)

types: ## check types, strictly
	@$(SETUP) python
	@$(BIN)/mypy $(CODE)

format: ## mend what `make lint` can mend by itself
	@$(SETUP) python
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

bench: ## measure the figures that README and CHANGELOG quote
	@$(SETUP) python engine
	@status=0; for each in startup memory deploys; do $(BIN)/python -m bench.$$each || status=1; done; exit $$status

schemas: ## write what follows from messages and lanes: schemas/, nats/
	@$(SETUP) python
	@$(BIN)/python -m mcp.bus.schemas
	@$(BIN)/python -m mcp.bus.permissions

lab: ## test on the four-node rig (docs/lab.md); minutes, as root
	@$(SETUP) python lab
	@MCP_REQUIRE_LIVE=1 $(BIN)/pytest -m lab --timeout 900 $(ARGS)

engine-stop: ## end the dockerd that setup started; one that was there before stays
	@$(SETUP) stop

clean: ## end that dockerd, remove .venv and everything else that was made
	@$(SETUP) stop
	@rm -rf .venv build dist *.egg-info .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find $(CODE) -name __pycache__ -prune -exec rm -rf {} +
