# make demo            train a language model with torch.nn and with fused_rnn
# make test            the fast tests
# make test-reference  the fast tests as if the C++ library had not been built
# make test-all        all tests, then test-reference
# make test-asan       tests of the CPU library built with gcc's address and undefined-behaviour
#                      sanitizers, in build/asan; not part of the others
# make emulate         the CUDA kernels for the CPU, thread by thread, which the tests run
# make build-cuda      the CUDA library, with nvcc and without a GPU; some minutes
# make bench           the CPU benchmark with every peer that installs, and all that is made of its
#                      results: docs/performance.md, its plots, README.md's tables
# make bench-cpu       the measurement alone, and whether the targets are met
# make publish         docs/performance.md, plots and README.md's tables from benchmarks/results
# make gpu             all that needs a GPU, into GPU_OUT; make gpu-wheels fetches what it takes along
# make examples        the seventeen examples, each at the size of the tests
# make examples-full   each at full size, a minute or less; the docs keep the results
# make docs            the documentation, in build/site
# make lint            ruff and clang-format
# make clean           remove what was built; .venv stays (git clean -xdf removes that too)
#
# Each installs what it needs into .venv first. With FUSED_RNN_SKIP_BUILD=1 in the environment
# nothing is compiled. Variables: PYTHON, PIP_ARGS, TORCH_INDEX (one more package index, as
# https://download.pytorch.org/whl/cpu for the small build without CUDA), WORKERS, PYTEST_ARGS,
# DEMO_ARGS, BENCH_ARGS, EXAMPLES (names, as "names online"; all when empty), GPU_OUT, GPU_WHEELS,
# GPU_PYTHON (the Python of the GPU machine), GPU_ARGS.

PYTHON ?= python3
PIP_ARGS ?=
TORCH_INDEX ?=
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
EXAMPLES ?=
GPU_OUT ?= out/gpu
GPU_WHEELS ?= out/wheels
GPU_PYTHON ?= python3
GPU_ARGS ?=

BIN := .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
	$(PIP_ARGS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Either kind of installation has a stamp of its own, so that one which built nothing does not
# pass for a build later on.
SKIP_BUILD := $(filter-out 0,$(FUSED_RNN_SKIP_BUILD))
INSTALLED := .venv/.installed$(if $(SKIP_BUILD),-without-library)
EMULATED := $(if $(SKIP_BUILD),,fused_rnn/libfused_rnn_cuda_emulated.so)
BUILT_FROM := setup.py pyproject.toml $(shell find csrc -type f)

# xdist brings one process per core; a team of threads in each would only fight over the cores.
# Tests that need a team ask for one with torch.set_num_threads.
# Plugins that no test here asks for, and bytecode that is not kept, would cost every process start.
PYTEST = env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	-n $(WORKERS) --dist worksteal -p no:benchmark -p no:faker

.PHONY: demo test test-all test-reference test-asan emulate build-cuda bench bench-cpu publish gpu gpu-wheels \
	examples examples-full docs lint clean

demo: $(INSTALLED)
	$(BIN)/python examples/char_lm.py $(DEMO_ARGS)

# Without a compiler the package installs all the same, and tests of what was not built skip.
BUILT = $(if $(SKIP_BUILD),,$(BIN)/python -c 'import sys; from fused_rnn import native; \
	sys.exit(native.cpu_library_error() or native.cuda_emulated_library_error())')

test: $(INSTALLED) $(EMULATED)
	$(BUILT)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# At run time the variable makes a library that is built count as absent.
test-reference: $(INSTALLED)
	FUSED_RNN_SKIP_BUILD=1 $(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(INSTALLED) $(EMULATED) .venv/.toolbox
	$(BUILT)
	$(PYTEST) $(PYTEST_ARGS)
	$(MAKE) test-reference

# A copy of the package with a build of its own. The sanitizer's library has to be the first in
# the process, and the C++ library beside it, or it misses how exceptions are thrown. A library
# that does not load would only make the tests skip; a report written while pytest captures the
# file descriptor would be lost. A throwing new ends the process under the sanitizer, so the test of
# one that throws has no place here.
ASAN_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
ASAN_TESTS := $(patsubst %,tests/test_%.py,instruction_sets numbers threads ragged_calls \
	training_calls states_calls function_transforms direct_calls direct_training half_calls \
	half_training stepper quantised_stepper)
ASAN_ENV = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$(foreach lib,asan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))"

test-asan: BIN := $(abspath $(BIN))
test-asan: $(INSTALLED)
	rm -rf build/asan/csrc build/asan/fused_rnn build/asan/tests
	mkdir -p build/asan
	cp -rp setup.py pyproject.toml README.md csrc fused_rnn tests build/asan
	find build/asan/fused_rnn -name '*.so' -delete
	cd build/asan && CXX="$(CXX)" CXXFLAGS="$(ASAN_FLAGS) -O1 -g" LDFLAGS="$(ASAN_FLAGS)" \
		$(BIN)/python setup.py -q build_ext --inplace
	cd build/asan && $(ASAN_ENV) $(BIN)/python -c 'import sys; from fused_rnn import native; \
		sys.exit(native.cpu_library_error())'
	cd build/asan && $(ASAN_ENV) $(PYTEST) --capture=sys --max-worker-restart=0 -m "not slow" \
		--deselect tests/test_ragged_calls.py::test_lengths_of_a_sequence_that_no_memory_holds \
		$(PYTEST_ARGS) $(ASAN_TESTS)

emulate: $(EMULATED)

fused_rnn/libfused_rnn_cuda_emulated.so: $(INSTALLED)
	FUSED_RNN_EMULATE=1 $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

build-cuda: $(INSTALLED)
	FORCE_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace

# 25 minutes on two cores of a Zen 3; what a busy machine does not reach in 40 is named.
bench: $(INSTALLED) .venv/.peers
	$(BIN)/python benchmarks/cpu.py --seconds 0.3 --samples 20 --limit 2400 --save $(BENCH_ARGS)
	$(BIN)/python benchmarks/publish.py

bench-cpu: $(INSTALLED) .venv/.peers
	$(BIN)/python benchmarks/cpu.py $(BENCH_ARGS)

publish: $(INSTALLED) .venv/.peers
	$(BIN)/python benchmarks/publish.py

# Installs nothing: the machine may have no network. The tree brings its built libraries.
gpu:
	$(GPU_PYTHON) benchmarks/gpu/campaign.py $(GPU_OUT) \
		$(if $(wildcard $(GPU_WHEELS)),--wheels $(GPU_WHEELS)) $(GPU_ARGS)

gpu-wheels: .venv/.created
	$(PIP) pip
	mkdir -p $(GPU_WHEELS)
	$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps $(PIP_ARGS) \
		--only-binary=:all: --python-version 3.12 --implementation cp \
		$(foreach glibc,2_28 2_27 2_17,--platform manylinux_$(glibc)_x86_64) \
		--dest $(GPU_WHEELS) -r benchmarks/gpu/wheels.txt

# One thread each: at these sizes a team of threads mostly waits.
examples: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/run_all.py --small $(EXAMPLES)

examples-full: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/run_all.py --publish $(EXAMPLES)

docs: $(INSTALLED) .venv/.docs
	$(BIN)/python -m mkdocs build --strict

lint: .venv/.linters
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
		xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f .venv/.installed*
	find fused_rnn -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Editable, so that a change to a Python file needs no new installation. Without build isolation,
# so that the extension is built against the torch that it will run with, and torch comes once.
$(INSTALLED): .venv/.dependencies $(BUILT_FROM)
	$(PIP) --no-build-isolation -e '.[test,examples]'
	@$(BIN)/python -c 'from fused_rnn import native; \
		print("fused_rnn:", native.cpu_library_error() or "the CPU library is built")'
	@touch $@

# torch is asked for before anything that depends on it, so that nothing else decides which build
# of it is taken; it warns at every import when numpy is not there.
.venv/.dependencies: .venv/.created constraints.txt
	$(PIP) pip setuptools wheel ninja pybind11
	$(PIP) torch numpy
	@touch $@

# Every name of the extra "bench", without installing the package itself again.
.venv/.peers: .venv/.created constraints.txt
	$(PIP) jax keras matplotlib onnx onnxruntime openvino rich
	@touch $@

# Every name of the extra "toolbox", likewise.
.venv/.toolbox: .venv/.created constraints.txt
	$(PIP) accelerate lightning safetensors
	@touch $@

.venv/.docs: .venv/.created constraints.txt
	$(PIP) mkdocs-material 'mkdocstrings[python]'
	@touch $@

.venv/.linters: .venv/.created constraints.txt
	$(PIP) ruff clang-format
	@touch $@

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo 'venv is missing; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@
