# Each target does its own set-up: a fresh Debian 12 with python3 (>= 3.11), make and git is enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := .venv-demo
SOURCE := exporter tests bench scripts deploy mixin
# Tests that run at once. They wait more than they compute.
JOBS   ?= 4

.PHONY: demo test coverage check format docs soak fuzz replicas-test bench image-test release pythons findings fresh clean

demo: $(DEMO)/.ready  ## a simulated BlueKing and the exporter watching it
	$(DEMO)/bin/python -m exporter demo $(ARGS)

test: $(READY) components  ## the whole suite; ARGS="-k name" for a part of it
	$(BIN)/python -m pytest -m 'not slow' -n $(JOBS) --dist worksteal $(ARGS)

coverage: $(READY) components  ## the suite again, with branches counted, sub-processes too
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m 'not slow' $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: $(READY)  ## format, lint, types, layers, example configuration, generated documents
	$(BIN)/ruff format --check $(SOURCE)
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/blueking-exporter check --config.file=config.example.yaml
	sh scripts/docs.sh --check

format: $(READY)
	$(BIN)/ruff format $(SOURCE)
	$(BIN)/ruff check --fix $(SOURCE)

docs: $(READY)  ## write the documents that are generated from the code
	sh scripts/docs.sh

soak: $(READY) components  ## kill -9, restarts and reloads for a long time, compared with the truth
	$(BIN)/python -m pytest -m slow -k soak $(ARGS)

fuzz: $(READY)  ## a minute for each target, with atheris where it installs; ARGS="decoders --seconds=600"
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3,<4'
	$(BIN)/python -m tests.fuzz $(ARGS)

replicas-test: $(READY) components  ## everything that can happen to three replicas and their store (10 min)
	$(BIN)/python -m pytest -m slow tests/replicas tests/state/test_redis_store.py $(ARGS)

bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

image-test: $(READY)  ## build and run the image with buildah on a base made of Debian packages
	$(BIN)/python -m pytest -m slow tests/deploy/test_image.py $(ARGS)

release: $(READY)  ## wheel, sdist, bill of materials and checksums, built twice and compared
	sh scripts/release.sh

pythons:  ## the fast half of the suite on every Python >= 3.11 of this machine
	sh scripts/pythons.sh $(ARGS)

findings:  ## run every script of findings/; each fails when what it found has changed
	for script in findings/*.sh; do sh $$script || exit 1; done

fresh:  ## both commands of the README in a fresh Debian 12; ARGS=demo or ARGS=test for one of them
	sh scripts/fresh.sh $(ARGS)

clean:
	rm -rf $(VENV) $(DEMO) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage* build dist

.PHONY: components
components:
	sh scripts/components.sh
	sh scripts/newer_components.sh

$(READY): pyproject.toml scripts/venv.sh
	sh scripts/venv.sh $(PYTHON) $(VENV) development
	touch $@

$(DEMO)/.ready: pyproject.toml scripts/venv.sh
	sh scripts/venv.sh $(PYTHON) $(DEMO) product
	touch $@
