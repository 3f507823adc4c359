# make quickstart: set up .venv, then train a small network plain, active, and active rounded to dilations, and compare them.
# make test:       the same set-up, then the tests, a process of one thread on each core (4 at most).
# make test-fast:  without the slow ones.
# make docs:       the documentation site, in build/site, with every link checked; make docs-serve shows it on port 8000.
# make notebooks:  run the notebooks in examples/notebooks in a Jupyter kernel; they are left as they are.
# make clients:    the same set-up, then other libraries' models (docs/compatibility.md), which it installs into .venv.
# make wheel:      the source distribution and a wheel in dist/, checked, and used in a clean environment (a minute).
# Use another interpreter with `make PYTHON=python3.12 ...`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast clients docs docs-serve notebooks wheel lint setup clean

QUICKSTART := quickstart_baseline quickstart search_dilation
RUNS ?= runs

quickstart: setup
	for name in $(QUICKSTART); do $(BIN)/lightning-acu fit --config configs/$$name.yaml --trainer.logger.init_args.save_dir $(RUNS) $(ARGS) || exit 1; done
	$(BIN)/lightning-acu compare $(addprefix $(RUNS)/,$(QUICKSTART))

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

test-fast:
	@$(MAKE) test ARGS='-m "not slow" $(ARGS)'

# Not `pip install -e ".[clients-ci]"`, which would compile again; and not another torch than the one that is tested.
EXTRA := import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])

clients: setup
	$(BIN)/python -m pip freeze | grep -E '^(torch|torchvision|numpy|timm)==' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt $$($(BIN)/python -c '$(EXTRA)' clients-ci)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_clients.py tests/test_torch_tools.py tests/surgery/test_adapters.py \
	    tests/test_examples.py tests/saving/test_saved_clients.py tests/integrations/test_huggingface.py \
	    -k "not torchvision and not fsdp2 and not compiles" --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

wheel: setup
	$(BIN)/python -m pip install --quiet --group release
	PYTHON=$(BIN)/python scripts/build_wheel.sh

docs: setup
	$(BIN)/python -m pip install --quiet $$($(BIN)/python -c '$(EXTRA)' docs)
	rm -rf build/site
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees -c docs . build/site
	$(BIN)/python scripts/check_links.py build/site

docs-serve: docs
	$(BIN)/python -m http.server --directory build/site 8000

notebooks: setup
	$(BIN)/python -m pip install --quiet $$($(BIN)/python -c '$(EXTRA)' notebooks)
	$(BIN)/jupyter execute examples/notebooks/*.ipynb

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.installed

KERNELS := $(wildcard lightning_acu/ops/cpu/*.pyx lightning_acu/ops/cpu/*.pxd lightning_acu/ops/cpu/*.h)

# torch and torchvision in one command, so that pip finds builds that fit each other. Changed kernels are compiled again.
$(VENV)/.installed: pyproject.toml setup.py $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision -e ".[dev,demo]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
