# make demo   set everything up, train a codec on real speech, hear it   (DATA=folder for your own recordings)
# make test   set everything up, run the tests
PYTHON ?= python3
BIN := .venv/bin
DATA ?=

.PHONY: demo test lint clean

# The stamp is written last: a set-up that was interrupted is done again.
.venv/.ready: requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: .venv/.ready
	BIN=$(BIN) DATA="$(DATA)" bash demo/run.sh

test: .venv/.ready
	$(BIN)/python -m pytest -q tests

lint: .venv/.ready
	$(BIN)/ruff check .

clean:
	rm -rf .venv data/demo runs/demo runs/demo-own *.egg-info .pytest_cache .ruff_cache
