# Every target creates a virtual environment if there is none, and installs into it what the target needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SERVING ?= .venv-serving
WORKERS ?= 2

.PHONY: demo test check lint docs kernels gpu test-serving clean

demo: $(VENV)/installed-demo
	$(BIN)/gluprune demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS)

# The tests that are not marked slow.
check: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

lint: $(VENV)/installed-dev $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, in site/. Needs no network, and the pages load nothing from elsewhere.
docs: $(VENV)/installed-docs
	$(BIN)/python docs/figures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Compile every shipped kernel for every supported GPU generation, without a GPU, with the Triton versions supported.
kernels: $(VENV)/installed-demo
	$(BIN)/python -m csrc_triton.tools.aot --triton 3.6.0 3.7.1 3.9.0 --record benchmarks/results/kernels_aot.jsonl

# Tests, ceilings, tuner and benchmarks on a GPU, in parts and resumable: `make gpu ARGS="--minutes 28"` (docs/gpu.md).
# With the Python at hand if there is no virtual environment: a machine with a GPU may have no network.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

# Pruned models in vLLM and llama.cpp, and quantized (docs/deploying.md), in an environment of its own: vLLM pins versions.
# Where llama.cpp cannot be compiled, its tests are skipped.
test-serving: $(SERVING)/installed
	$(MAKE) $(SERVING)/llama-cpp || echo 'llama.cpp is missing: its tests are skipped' >&2
	$(SERVING)/bin/python -m pytest serving $(ARGS)

# vLLM's requirements bring builds for CUDA of three packages that serving text does not need.
$(SERVING)/installed: serving/requirements.txt setup.py pyproject.toml
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --requirement serving/requirements.txt --editable .
	$(SERVING)/bin/python -m pip uninstall --yes torchaudio torchcodec torchvision
	touch $@

# The source of llama-cpp-python contains llama.cpp with its converter. Compiled for no processor in particular, and
# without llama.cpp's programs.
$(SERVING)/llama-cpp: serving/llama-cpp.txt | $(SERVING)/installed
	rm -rf $@ $@.part && mkdir $@.part
	$(SERVING)/bin/python -m pip download --no-deps --no-binary :all: --dest $@.part --requirement serving/llama-cpp.txt
	tar -xzf $@.part/*.tar.gz -C $@.part --strip-components 1 && rm $@.part/*.tar.gz
	CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF' $(SERVING)/bin/python -m pip install $@.part
	mv $@.part $@ && touch $@

$(VENV)/installed-%: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(SERVING) build site *.egg-info
