# Everything runs in .venv, made on first use. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test check bench bench-convert bench-decode scale families soak soak-crash soak-fuzz clean
help:
	@echo "make demo    the main job on real trained weights, and the puzzle"
	@echo "make test    the test suite"
	@echo "make check   format, lint, types, doctests, import layers"
	@echo "make bench   speed, as ratios against named peers; make bench-convert: 2.8 GB against cp and others;"
	@echo "             make bench-decode: a decode step over a cache; make scale: a terabyte, docs/scale.md"
	@echo "make detect-report  how far verdicts from weights can be trusted; writes docs/detection.md"
	@echo "make families  every family record against the model's own code; writes docs/families.md"
	@echo "make soak    long campaigns; make soak-crash kills conversions; make soak-fuzz fuzzes every parser"

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.ready
	@$(BIN)/python examples/demo.py

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --doctest-modules src/triptych
	$(BIN)/python -m pytest tests/test_layers.py

bench: .venv/.ready
	$(BIN)/python bench/tensors.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/inspect_terabyte.py
	$(BIN)/python bench/verify.py

bench-decode: .venv/.ready
	$(BIN)/python bench/decode.py

scale: .venv/.ready
	$(BIN)/python bench/scale.py --write

detect-report: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.detect_report --write

# LLAMA_CPP=PATH: a checkout of llama.cpp, whose converter is then measured too
CONVERT = $(BIN)/python bench/convert.py --layers 24
bench-convert: .venv/.ready
	$(CONVERT) --no-sync --peers $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP))
	$(CONVERT)
	$(CONVERT) --no-sync --to "h d (q|k|v)"
	$(CONVERT) --no-sync --format bin
	$(CONVERT) --no-sync --format gguf
	$(CONVERT) --no-sync --ranks 4
	$(CONVERT) --no-sync --turned
	$(CONVERT) --no-sync --rope

families: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families_report

soak: .venv/.ready
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -n 2 tests
	$(BIN)/python -m tests.real_weights

soak-crash: .venv/.ready
	$(BIN)/python bench/soak_crash.py --write
	$(BIN)/python bench/power_loss.py --write
	$(BIN)/python -m bench.soak_remote --write

soak-fuzz: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python bench/fuzz.py all --write

clean:
	rm -rf .venv .demo .bench build dist src/*.egg-info
