# Everything a developer or CI runs. `make demo` and `make test` need only Python and git: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# One source of truth for what is checked: the same folders everywhere.
CODE := __init__.py kernels engine export runtime training benchmarks tests examples docs
export PYTHONSAFEPATH = 1

.PHONY: setup setup-dev demo train-nano test test-all test-gpu lint fmt type docs clean

setup: .venv/core
setup-dev: .venv/dev

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy
	$(PIP) -e .
	touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	touch $@

demo: setup
	mkdir -p build
	$(BIN)/swifti2v generate examples/photo.jpg -o build/demo.mp4 --profile nano \
	  --prompt "slow zoom in" --contact-sheet build/demo.png

# PHOTOS names the folder of the pictures of Debian's budgie-backgrounds 3.0; the others come with Python packages.
# Each phase goes on where it stopped. On a GPU pass TRAIN_FLAGS="--device cuda --workers 14"; on a CPU it takes days.
PHOTOS ?= build/photos
TRAIN_FLAGS ?= --threads 1
train-nano: setup-dev
	for phase in 'vae1 --linear' 'vae2 --linear' stage1 stage2; do \
	  $(BIN)/swifti2v-train nano $$phase -o build/nano --photos-dir $(PHOTOS) $(TRAIN_FLAGS) || exit 1; \
	done
	for part in vae1 vae2 stage1 stage2 text; do cp -r build/nano/models/$$part weights/nano/; done

test: setup-dev lint type
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not serial"
	$(BIN)/python -m pytest -m "serial and not slow and not gpu"

test-all: setup-dev lint type
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not serial"
	$(BIN)/python -m pytest -m "serial and not gpu"

test-gpu: setup-dev
	$(BIN)/python -m pytest -m gpu

lint: setup-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

fmt: setup-dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

type: setup-dev
	$(BIN)/pyright --warnings

docs: setup-dev
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
