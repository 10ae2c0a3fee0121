# make demo      train a masked diffusion transformer on real digits and draw samples
# make test      lint, types and tests, as CI runs them; make lint and make tests do a part of it
# make kernels   compile every Triton kernel for three generations of GPUs, with none of them here, and count bytes
# make bench     measure here; make report writes the README's table, docs/measured.md and the plots from committed rows
# make sanitize  build the native kernels with checks of addresses and undefined behaviour, and run their tests
# make numerics  run the numeric tests with the instruction sets of other processors, on two threads, with 20 seeds
# make abi TORCH=2.11.0  load the native kernels, as built for CI's torch, in another one, and run their tests there
# make test-dali the tests of data by DALI's CPU operators, with every optional package, in an environment of their own
# make venv      only the environment both of them use

PYTHON ?= python3
BIN := .venv/bin
# Python compiles what it imports; compiling all that is installed would take longer than the tests of some folders.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
PIP := $(BIN)/python $(INSTALL)
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal -p no:benchmark
DEMO := runs/digits-demo
# The trainer is tested with the native kernels; all else with Triton's, interpreted, and the ops and the network with both.
TRAINER_TESTS := $(addprefix tests/test_,train.py start.py crash.py) \
	$(addprefix tests/training/test_,run.py resume.py step.py parallel.py muon.py)
NATIVE_TESTS := $(addprefix tests/kernels/test_,gelu_linear.py silu_linear.py modulate_norm.py add_gated_norm.py norms.py \
	norm_linear.py native.py impl.py position_table.py hostile.py adamw_ema.py sample_mask.py masked_loss.py \
	embed_kept_patches.py embed_natively.py restore_tokens.py asked_gradients.py transforms.py) \
	$(addprefix tests/,models/test_maskdit.py test_golden.py test_packed.py training/test_adamw.py \
	training/test_optim.py) $(TRAINER_TESTS)

.PHONY: demo test tests test-dali venv venv-dali lint bench report kernels sanitize numerics abi clean
.DELETE_ON_ERROR:

venv: .venv/.done

# Torch first: the native kernels are built against the one that is there.
.venv/.done: pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard kernels/*/*)
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[demo,data,dev]'
	touch $@

demo: venv
	$(BIN)/python -m fastmask.train --preset digits --run-dir $(DEMO)
	$(BIN)/python -m fastmask.evaluate $(DEMO)

test: lint tests

tests: venv
	$(PYTEST) $(addprefix --ignore=,$(TRAINER_TESTS))
	TRITON_INTERPRET=0 $(PYTEST) -m 'not once' $(NATIVE_TESTS)

# DALI lies over the environment of the other tests: torch is there once.
.venv-dali/.done: .venv/.done
	$(PYTHON) -m venv .venv-dali
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(.venv-dali/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	.venv-dali/bin/python $(INSTALL) \
		nvidia-dali-cuda130 diffusers pyarrow lmdb webdataset
	touch $@

venv-dali: .venv-dali/.done

NO_IMAGES := tests/data/test_order.py $(addprefix tests/data/foreign/test_,npy.py pickled.py) \
	$(addprefix tests/data/store/test_,remote.py remote_hostile.py stalls.py writer.py manifest.py schema.py)
test-dali: .venv-dali/.done
	.venv-dali/bin/python -m pytest -n 2 --dist worksteal -p no:benchmark -m 'not once' \
		$(addprefix --ignore=,$(NO_IMAGES)) tests/data tests/test_prepare.py tests/test_sample_latents.py \
		tests/diffusion/test_solvers.py tests/test_bench_stores.py tests/exchange tests/test_convert_formats.py \
		tests/models/foreign

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard kernels/*/*.cpp kernels/*/*.h)

bench: venv
	$(BIN)/python -m pytest bench/ --benchmark-only

report: venv
	$(BIN)/python -m bench.report --out docs/measured.md --readme README.md

kernels: venv
	$(BIN)/python -m bench.instruments.compile --out bench/results/compiled.md
	$(BIN)/python -m bench.instruments.traffic --out bench/results/traffic.md

# Python itself is not checked, so the checks must be loaded before it; it leaks by design.
sanitize: venv
	cmake -S . -B build/sanitize -DTORCH_ROOT=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') \
		-DFASTMASK_SANITIZE=ON -DFASTMASK_OUT=$(CURDIR)/build/sanitize
	cmake --build build/sanitize
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		FASTMASK_NATIVE=$(CURDIR)/build/sanitize/_native.so TRITON_INTERPRET=0 \
		$(BIN)/python -m pytest -q -p no:benchmark $(filter tests/kernels/%,$(NATIVE_TESTS))

# Compiled for one level of x86 at a time, so that each runs here; an hour on two cores.
LEVELS := x86-64 x86-64-v3 x86-64-v4
numerics: venv
	for level in $(LEVELS); do \
		cmake -S . -B build/$$level -DTORCH_ROOT=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') \
			-DFASTMASK_LEVEL=$$level -DFASTMASK_OUT=$(CURDIR)/build/$$level && cmake --build build/$$level || exit 1; \
	done
	$(BIN)/python tests/numerics.py build

# Another torch than CI's is a CUDA build of some gigabytes.
abi: venv
	$(PYTHON) -m venv build/torch-$(TORCH)
	build/torch-$(TORCH)/bin/python -m pip install --quiet torch==$(TORCH) numpy safetensors tyro rich scipy pytest pytest-xdist
	FASTMASK_NATIVE=$(CURDIR)/fastmask/kernels/_native.so TRITON_INTERPRET=0 \
		build/torch-$(TORCH)/bin/python -m pytest -q -n 2 $(filter tests/kernels/%,$(NATIVE_TESTS))

clean:
	rm -rf .venv .venv-dali build *.egg-info .pytest_cache .mypy_cache .ruff_cache
