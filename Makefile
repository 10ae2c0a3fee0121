# make demo      train a masked diffusion transformer on real digits and draw samples
# make test      lint, types and tests, as CI runs them
# make kernels   compile every Triton kernel for three generations of GPUs, with none of them here, and count bytes
# make venv      only the environment both of them use

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/digits-demo

.PHONY: demo test venv lint bench kernels clean
.DELETE_ON_ERROR:

venv: .venv/.done

.venv/.done: pyproject.toml setup.py constraints.txt CMakeLists.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,data,eval,dev]'
	touch $@

demo: venv
	$(BIN)/python -m fastmask.train --preset digits --run-dir $(DEMO)
	$(BIN)/python -m fastmask.evaluate $(DEMO)

test: venv lint
	$(BIN)/python -m pytest -n 2 -p no:benchmark

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m pytest bench/ --benchmark-only

kernels: venv
	$(BIN)/python -m bench.compile --out bench/results/compiled.md
	$(BIN)/python -m bench.traffic --out bench/results/traffic.md

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
