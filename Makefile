# Everything runs in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN = .venv/bin
RUN ?= runs/demo
# Threads that wait for work spin by default, which on shared cores costs more than it brings.
export OMP_WAIT_POLICY = PASSIVE
# Material for MkDocs advertises its successor on every build.
export NO_MKDOCS_2_WARNING = 1
# The tests are small: one thread is fastest, two processes side by side. Nothing is timed in them.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --benchmark-disable

.PHONY: demo sweep test test-circuit-tracer test-triton-versions check docs tutorial bench gpu clean

demo: .venv/demo  ## train on the embedded model and text, evaluate, print the table
	$(BIN)/sparseclt train --out $(RUN)
	@echo "See its latents and connections: $(BIN)/sparseclt atlas $(RUN)"

sweep: .venv/demo  ## FVU against the number of connections, with the pruned baseline
	$(BIN)/sparseclt sweep --out runs/sweep

test: .venv/test  ## the test suite
	$(TEST) $(ARGS)

# Its requirements do not go together with ours: an environment of its own. The package on PyPI is a fork; the original:
# CIRCUIT_TRACER=git+https://github.com/decoderesearch/circuit-tracer
CIRCUIT_TRACER ?= circuit-tracer==0.5.0 nnsight==0.8.1
test-circuit-tracer: .venv/test .venv-circuit-tracer/ready  ## circuit-tracer runs an export as it is (ARGS='--run RUN')
	rm -rf build/circuit-tracer
	OMP_NUM_THREADS=1 $(BIN)/python tests/circuit_tracer/prepare.py build/circuit-tracer $(ARGS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-circuit-tracer/bin/python tests/circuit_tracer/compare.py build/circuit-tracer

# Each is laid over the environment, whose torch stays. The interpreter of triton 3.6 needs numpy below 2.4.
TRITONS ?= 3.6.0 3.7.1 newest
test-triton-versions: $(TRITONS:%=test-triton-%)  ## kernels and ops, interpreted and compiled, with other versions of triton

test-triton-%: .venv/test
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/triton-$* \
	  triton$(if $(filter newest,$*),,==$*) $(if $(filter 3.6.%,$*),'numpy<2.4')
	PYTHONPATH=$(CURDIR)/build/triton-$* $(BIN)/python -c \
	  'import numpy, triton; print("triton", triton.__version__, "numpy", numpy.__version__, triton.__file__)'
	PYTHONPATH=$(CURDIR)/build/triton-$* $(TEST) tests/kernels tests/ops $(ARGS)

check: .venv/check docs  ## lint, types, import floors, the documentation and the test suite
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	$(TEST) $(ARGS)

docs: .venv/check  ## the documentation site, in site/; a warning is an error
	$(BIN)/mkdocs build --quiet --strict

tutorial: .venv/check  ## run the tutorial and write its output into the page
	$(BIN)/python tools/tutorial.py

bench: .venv/test  ## measure (the quick set; ARGS=--full: all of it) and refresh docs/benchmarks.md
	mkdir -p build
	$(BIN)/python -m pytest benchmarks/ $(ARGS) --benchmark-json build/benchmarks.json; status=$$?; \
	  $(BIN)/python benchmarks/report.py build/benchmarks.json && exit $$status

gpu:  ## on a GPU, in ten minutes: are the kernels right there, and how fast are they? Uses $(PYTHON)'s own torch and triton
	$(PYTHON) benchmarks/gpu.py $(ARGS)

# torch first and exactly: an open range would pull a CUDA build of several GB.
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparseclt needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

.venv/check: .venv/test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv-circuit-tracer/ready: tests/circuit_tracer/constraints.txt
	$(PYTHON) -m venv .venv-circuit-tracer
	.venv-circuit-tracer/bin/python -m pip install -q "$$(grep '^torch==' $<)"
	.venv-circuit-tracer/bin/python -m pip install -q -c $< $(CIRCUIT_TRACER)
	touch $@

clean:
	rm -rf .venv .venv-circuit-tracer build site *.egg-info
