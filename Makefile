# make demo   set everything up, train a codec on real speech, hear it   (DATA=folder for your own recordings)
# make test   set everything up, run the tests
# make eval   set up every metric and classical codec that evaluate_codec.py knows
PYTHON ?= python3
BIN := .venv/bin
DATA ?=

.PHONY: demo test eval tools lint clean

# The stamp is written last: a set-up that was interrupted is done again.
.venv/.ready: requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.venv/.eval: .venv/.ready requirements-eval.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-eval.txt
	touch $@

# Without apt the tests that need these programs are skipped, and the report says what is not there.
tools:
	@$(PYTHON) demo/fetch_programs.py .tools opus-tools codec2 speex chromium-headless-shell || true

eval: .venv/.eval tools

# Compares with Opus where it can be had.
demo: .venv/.ready
	@$(PYTHON) demo/fetch_programs.py .tools opus-tools || true
	BIN=$(BIN) DATA="$(DATA)" bash demo/run.sh

# Tests of what could not be set up are skipped. Two at a time; the tests of a file stay together, as they share runs.
test: .venv/.ready
	-@$(MAKE) --no-print-directory eval
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lint: .venv/.ready
	$(BIN)/ruff check .

clean:
	rm -rf .venv .tools data/demo runs/demo runs/demo-own *.egg-info .pytest_cache .ruff_cache
