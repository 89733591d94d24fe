# `make quickstart` and `make test` are all that a fresh machine needs; `make check` is what has to pass before a change lands.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Tests run in so many processes, a file in one of them: `make test PROCESSES=4`.
PROCESSES ?= 2

.PHONY: quickstart test coverage check format lint types slow soak gpu package-tree pins clean

quickstart: $(INSTALLED)
	@exec $(BIN)/uni-instruct quickstart --out runs/quickstart

# Bytecode is kept, whatever the environment says: a hundred processes would compile every module anew.
test: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

# The same with the share of lines that they reach; it takes a sixth longer.
coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov --cov-report=term:skip-covered

check: test format lint types slow

format: $(INSTALLED)
	$(BIN)/ruff format --check .

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED) package-tree
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p uni_instruct

# Parity of every engine on the GPU, their speed, a short training: figures as JSON in gpu.json. DEVICE=cuda:1 for another.
gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py --device $(or $(DEVICE),cuda) --out gpu.json

# Half an hour at twice the capacity, with broken clients beside it: `make soak MINUTES=10`. Not part of `check`.
soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),30)

slow: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(PROCESSES) --dist loadfile -o timeout=900

# The stages lie beside the core on disk; a type checker wants them where they are imported from.
package-tree:
	rm -rf build/types && mkdir -p build/types/uni_instruct
	ln -s $(CURDIR)/uni_instruct/* build/types/uni_instruct/
	ln -s $(CURDIR)/train $(CURDIR)/export $(CURDIR)/serve build/types/uni_instruct/

$(INSTALLED): requirements/all.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; install a newer Python or set PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "error: $(PYTHON) cannot make virtual environments; apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements/all.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Rewrites the pinned set from what is installed in .venv.
pins:
	$(BIN)/python requirements/pin.py > requirements/all.txt.new && mv requirements/all.txt.new requirements/all.txt

clean:
	rm -rf .venv build dist *.egg-info
