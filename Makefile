# make demo | test | lint | bench | gpu-check, each from a fresh clone.
#   PYTHON=python3.12   the interpreter that .venv is made with
#   VENV=               no .venv: use $(PYTHON) and what it has installed, as it is
#   OUT=DIR             where bench and gpu-check leave their results

PYTHON ?= python3
VENV ?= .venv
OUT ?= bench/results/local

PY = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY = $(if $(VENV),$(VENV)/.ready)

.PHONY: help demo test lint bench quality picture gpu-check gpu-found gpu-test gpu-memcheck gpu-bench clean

# Side by side the benchmarks would time the tests.
.NOTPARALLEL:

help:
	@echo "make demo       decode held-out problems with the embedded model, rule by rule"
	@echo "make test       the tests, with the coverage of fdpp/ (at least 90%)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      benchmarks on this machine, results under $(OUT)"
	@echo "make quality    every rule, cache and draft depth on 500 held-out problems: table, plot, JSON"
	@echo "make picture    the README's picture, from a decode of the embedded model"
	@echo "make gpu-check  on a CUDA device: GPU tests, memcheck, benchmarks"
	@echo "make clean      remove .venv and everything generated"

ifneq ($(VENV),)
$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	@echo "setting up $(VENV), once"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt setuptools wheel
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[test,lint,bench]'
	@touch $@
endif

demo: $(READY)
	$(PY) -m fdpp demo

test: $(READY)
	$(PY) -m pytest -m "not gpu" --cov --cov-fail-under=90

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

define RUN_BENCH
$(PY) -m pytest bench/bench_*.py --benchmark-only --benchmark-json=$(OUT)/bench.json
$(PY) bench/report.py $(OUT)/bench.json --out $(OUT)
endef

bench: $(READY) | $(OUT)
	$(RUN_BENCH)

quality: $(READY)
	$(PY) bench/quality.py

picture: $(READY)
	$(PY) bench/picture.py

# A $(PYTHON) whose torch sees the GPU is used as it is: its CUDA build was chosen for this machine's driver.
SEES_GPU = $(shell $(PYTHON) -c 'import torch; print("yes" if torch.cuda.is_available() else "")' 2>/dev/null)

gpu-check:
	$(MAKE) gpu-found gpu-test gpu-memcheck gpu-bench $(if $(SEES_GPU),VENV=)

gpu-found: $(READY)
	@$(PY) -c 'import torch; assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device"'

gpu-test gpu-memcheck gpu-bench: export TRITON_INTERPRET = 0

gpu-test: gpu-found | $(OUT)
	$(PY) -m pytest -m gpu --junitxml=$(OUT)/gpu-tests.xml

# Without PyTorch's caching allocator every tensor is an allocation of its own, so that reading past one is seen.
gpu-memcheck: gpu-found | $(OUT)
	@if ! command -v compute-sanitizer >/dev/null; then echo "no compute-sanitizer here: memcheck left out"; else \
	set -x; PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	--log-file $(OUT)/memcheck.txt $(PY) -m pytest -m "gpu and not slow"; fi

gpu-bench: gpu-found | $(OUT)
	$(RUN_BENCH)

$(OUT):
	mkdir -p $@

clean:
	rm -rf .venv build dist fdpp.egg-info .coverage .coverage.* .benchmarks .hypothesis \
	.mypy_cache .pytest_cache .ruff_cache bench/results/local
	find fdpp kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
