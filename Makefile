# `make demo` and `make test` do all the set-up themselves: a .venv with requirements.txt in it.
# The Python is the first of these that runs and is 3.11, 3.12 or 3.13; or say make PYTHON=...
CANDIDATES := python3 python3.13 python3.12 python3.11 python
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in $(CANDIDATES); do \
	if $$python -c '$(IN_RANGE)' 2>/dev/null; then echo $$python; break; fi; done)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist=worksteal
# What most changes break first, and no TPU compiler is needed for; without what compiles longest.
CORE := tests/test_rooms.py tests/test_config.py tests/test_config_files.py \
	tests/test_command_line.py tests/test_loop.py tests/schedule tests/update \
	tests/models/test_normalization.py tests/storage/test_lease.py
LONGEST := test_a_wide_resnet_is_the_same_on_eight_devices_and_in_single_ghost_batches \
	test_a_step_of_sgd_is_the_rate_times_the_mean_gradient

.PHONY: demo demo-language check test test-slow test-long test-adapters lint soak slices clean

demo: .venv/installed
	$(BIN)/python -m experiments.demo --output=runs/demo

# A small language model on the text of Python's standard library, about 4 minutes on 2 cores.
demo-language: .venv/installed
	$(BIN)/python -m experiments.reproduce --figure=demo_language --scale=bytes --seeds=2 \
		--workdir=runs/demo-language

# After each change: within 90 seconds on 2 cores.
check: lint
	$(PYTEST) $(LONGEST:%=--deselect=tests/update/test_update.py::%) $(CORE)

# All but the slow ones: about 12 minutes on 2 cores.
test: .venv/installed .tpu/installed
	$(PYTEST) -m "not slow and not long" tests

# Each has a shorter form among the others.
test-slow: .venv/installed
	$(PYTEST) -m slow tests

test-long: .venv/installed
	$(PYTEST) -m long tests

# A schedule in the loops of PyTorch, Trainer, Lightning, and this package's transformer beside those
# of `transformers`: under 3 minutes on 2 cores, once they are there (gigabytes). `make test` has
# Optax's loop. A PyTorch without CUDA is enough, where pip knows of one.
test-adapters: .adapters/installed .venv/installed
	.adapters/bin/python -m pytest --confcutdir=tests/adapters tests/adapters
	$(BIN)/python -m pytest tests/models/test_transformer_reference.py

# Kills runs at random moments, about 6 minutes on 2 cores; the short form is in the tests.
soak: .venv/installed
	$(BIN)/python -m tests.soak --kills=30 --corruptions=100

# Compiles updates and every ImageNet preset for slices of TPU: hours the first time on 2 cores,
# then minutes. Fails where an update has become slower or larger than the records say.
slices: .venv/installed .tpu/installed
	$(BIN)/python -m experiments.speed.by_compiler
	$(BIN)/python -m experiments.slices --output=experiments/records/slices.json
	$(BIN)/python -m experiments.slices --family=language \
		--output=experiments/records/slices_language.json

lint: .venv/installed
	$(BIN)/ruff check .

.adapters/installed: requirements-adapters.txt
	$(PYTHON) -m venv .adapters
	.adapters/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

.venv/installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "needs Python 3.11, 3.12 or 3.13 as one of: $(CANDIDATES);" \
		"or say make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The TPU compiler, for bigbatch.plan --topology. Not in the .venv, where JAX would look for a TPU
# at each start and say at length that there is none.
.tpu/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .tpu libtpu || echo "no libtpu for this machine: what needs it will be skipped"
	mkdir -p .tpu && touch $@

# The compiler for NVIDIA GPUs, for bigbatch.plan --topology=h100-8; 400 MB, and no GPU is needed.
.cuda/installed: .venv/installed
	version=$$($(BIN)/python -c "import jax; print(jax.__version__)") && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .cuda jax-cuda13-pjrt==$$version \
		|| echo "no compiler for CUDA for this machine: what needs it will be skipped"
	mkdir -p .cuda && touch $@

clean:
	rm -rf .venv .tpu .cuda .adapters .jax_cache runs build *.egg-info
