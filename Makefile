# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first: the demo with what
# it uses, the tests with all the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_INSTALLED := $(VENV)/.installed-demo
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
DEMO_CONFIG ?= examples/configs/digits.yaml
DEMO_DIR ?= runs/digits
DEMO_FLAGS ?=
DEMO_DATA ?= --dataset digits

BROWSER_FLAGS ?=

.PHONY: setup demo test space-test style quality docs bench

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	touch $@ $(DEMO_INSTALLED)

$(DEMO_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[eval]'
	touch $@

demo: $(DEMO_INSTALLED)
	$(BIN)/accelerate launch examples/train.py --config $(DEMO_CONFIG) --output_dir $(DEMO_DIR) $(DEMO_FLAGS)
	$(BIN)/python examples/sample.py $(DEMO_DIR) $(DEMO_DIR)/samples-reloaded.png
	$(BIN)/ddpm-hf evaluate --model $(DEMO_DIR) $(DEMO_DATA) --metrics rate_distortion,fid,kid,prc,nn --features pixels \
		--num_images 16 --num_samples 256 --sampler ddim --num_inference_steps 20 --output $(DEMO_DIR)/evaluation

# Two processes, each with whole files, in the order of `tests/conftest.py`; `python -m pytest` runs them in one.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# In a real browser, which has to be there; says how to get it where it is not.
space-test: setup
	$(INSTALL) '.[browser]'
	$(BIN)/python tests/space_browser.py $(BROWSER_FLAGS)

style: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "open runs/site/index.html; to search, too: python3 -m http.server --directory runs/site"

bench: setup
	$(BIN)/python benchmarks/speed.py --output runs/speed
