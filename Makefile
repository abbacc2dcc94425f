# make demo | test | lint | bench | gpu-check | gpu-rehearse, each from a fresh clone.
#   PYTHON=python3.12   the interpreter that .venv is made with
#   VENV=               no .venv: use $(PYTHON) with what it has installed
#   OUT=DIR             where bench and gpu-check leave their results

PYTHON ?= python3
VENV ?= .venv
OUT ?= bench/results/local

PY = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY = $(if $(VENV),$(VENV)/.ready)

.PHONY: help demo test lint bench bench-smoke gate quality picture clean eval-check sglang-check diffusers-check \
	release-check history gpu-check gpu-run gpu-rehearse gpu-smoke gpu-test gpu-stress gpu-memcheck gpu-racecheck gpu-bench

# Run in parallel, the tests would slow what the benchmarks time.
.NOTPARALLEL:

help:
	@echo "make demo       decode held-out problems with the embedded model, rule by rule"
	@echo "make test       the tests, with the coverage of fdpp/ (at least 90%)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      selection and decodes on this machine: tables, plot, JSON under $(OUT)"
	@echo "make gate       fails if fdpp has become slower than this device's baseline in bench/baselines allows"
	@echo "make quality    every rule and cache on the embedded models, and why decodes fail: tables, plots, JSON"
	@echo "make picture    the README's picture, from a decode of the embedded model"
	@echo "make eval-check, make sglang-check, make diffusers-check"
	@echo "                the tests beside lm-evaluation-harness, beside SGLang, and beside diffusers"
	@echo "make history    adds this version's headline figures to bench/history.md"
	@echo "make release-check  builds the archives of a release, and checks and tries them"
	@echo "make gpu-check  all checks on a CUDA device in nine minutes: smoke, figures, tests, stress, gate, memcheck,"
	@echo "                racecheck. The most telling come first, and a summary is there at any moment. Its parts:"
	@echo "                gpu-smoke, gpu-bench, gpu-test, gpu-stress, gpu-memcheck, gpu-racecheck"
	@echo "make gpu-rehearse  the same stages without a GPU, on small shapes"
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

# One process per core, so one thread each.
test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(PY) -m pytest -m "not gpu" -n auto --maxprocesses 4 --dist worksteal --cov --cov-fail-under=90

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# fdpp need not be installed.
bench bench-smoke gate: export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))

bench: $(READY)
	$(PY) bench/bench_select.py --out $(OUT)
	$(PY) bench/bench_kernels.py --out $(OUT)
	$(PY) bench/bench_canvas.py --out $(OUT)
	$(PY) bench/bench_decode.py --out $(OUT)
	$(PY) bench/report.py $(OUT) --plot

bench-smoke: $(READY)
	$(PY) bench/bench_select.py --smoke --out $(OUT)
	$(PY) bench/bench_kernels.py --smoke --out $(OUT)
	$(PY) bench/bench_canvas.py --smoke --out $(OUT)
	$(PY) bench/bench_decode.py --smoke --out $(OUT)
	$(PY) bench/report.py $(OUT)

gate: $(READY)
	$(PY) bench/gate.py --out $(OUT)

quality: $(READY)
	$(PY) bench/quality.py

picture: $(READY)
	$(PY) bench/picture.py

history:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) bench/history.py

build/release/.ready: constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -c constraints.txt setuptools wheel twine
	@touch $@

# What the wheel requires comes from the environment of the tests; TAG= and PACKAGES= are the release workflow's.
release-check: PACKAGES = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
release-check: $(READY) build/release/.ready
	build/release/bin/python tests/helpers/release_check.py --out dist $(if $(TAG),--tag '$(TAG)') $(if $(PACKAGES),--packages $(PACKAGES))

# Environments of their own: they bring what others need not. SGLang comes without its requirements, which are CUDA's.
build/with-eval/.ready build/with-sglang/.ready build/with-diffusers/.ready: setup.py pyproject.toml constraints.txt tests/with_sglang/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -c constraints.txt setuptools wheel
	$(@D)/bin/python -m pip install -c constraints.txt --no-build-isolation -e '.[test$(EXTRA)]' $(REQUIREMENTS)
	$(if $(APART),$(@D)/bin/python -m pip install --no-deps $(APART))
	@touch $@

build/with-eval/.ready: EXTRA = ,eval
build/with-diffusers/.ready: EXTRA = ,diffusers
build/with-sglang/.ready: REQUIREMENTS = -r tests/with_sglang/requirements.txt
build/with-sglang/.ready: APART = sglang==0.5.23

eval-check: build/with-eval/.ready
	build/with-eval/bin/python -m pytest tests/with_lm_eval

sglang-check: build/with-sglang/.ready
	build/with-sglang/bin/python -m pytest tests/with_sglang

# Its tensors are small: threads would wait for each other.
diffusers-check: export OMP_NUM_THREADS := 1
diffusers-check: build/with-diffusers/.ready
	build/with-diffusers/bin/python -m pytest tests/with_diffusers

# A $(PYTHON) whose torch sees the GPU is used as it is: its CUDA build was chosen for this machine's driver.
SEES_GPU = $(shell timeout 60 $(PYTHON) -c 'import torch; print("yes" if torch.cuda.is_available() else "")' 2>/dev/null)

gpu-check: STAGES =
gpu-smoke: STAGES = smoke
gpu-bench: STAGES = decode select kernels report
gpu-test: STAGES = tests
gpu-stress: STAGES = stress
gpu-memcheck: STAGES = memcheck
gpu-racecheck: STAGES = racecheck

gpu-check gpu-smoke gpu-bench gpu-test gpu-stress gpu-memcheck gpu-racecheck:
	$(MAKE) gpu-run STAGES="$(STAGES)" $(if $(SEES_GPU),VENV=)

gpu-run: $(READY)
	$(PY) bench/gpu_check.py --out $(OUT) $(if $(STAGES),--only $(STAGES))

gpu-rehearse: $(READY)
	$(PY) bench/gpu_check.py --out $(OUT) --rehearse

clean:
	rm -rf .venv build dist fdpp.egg-info .coverage .coverage.* .hypothesis \
	.mypy_cache .pytest_cache .ruff_cache bench/results/local
	find fdpp kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
