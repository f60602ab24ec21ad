# The whole developer's interface. `make demo` and `make test` set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLUSTERS ?= tests/clusters
WITH_RAY := tests/end_to_end tests/jobs
WITHOUT_RAY := tests/test_*.py tests/model tests/pipeline

.PHONY: setup demo test test-with-ray test-without-ray test-clusters check fix sanitize bench clean lock sbom

setup: $(STAMP)  ## .venv from requirements.lock, and the project in it

# torch first and by its exact pin (it selects the CPU or CUDA build of the machine); DeepSpeed and the operator in csrc/
# are built against it. See setup.py for what is compiled where.
$(STAMP): requirements.lock pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep -E '^(torch|setuptools|wheel|packaging)==' requirements.lock)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation -r requirements.lock
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: setup  ## the main job on drawn images: no network service, no GPU
	$(BIN)/raydetr run -c jobs/configs/demo.yaml

test: setup  ## two halves at once: what starts Ray, and the rest
	$(MAKE) --no-print-directory --jobs=2 test-with-ray test-without-ray

test-with-ray:
	$(BIN)/python -m pytest $(WITH_RAY)

test-without-ray:
	$(BIN)/python -m pytest $(WITHOUT_RAY)

test-clusters: setup  ## what takes minutes: runs that are ended, cut and lost; for all of it Debian's slurm-wlm, munge, postgresql and iproute2, kubectl, and root
	$(BIN)/python -m pytest $(CLUSTERS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/check_cuda.py

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize: setup  ## the CPU operator under AddressSanitizer and UBSan: minutes, after a change in csrc/
	$(BIN)/python tests/sanitize.py

bench: setup  ## the figures of the README: two hours and more; fails if one misses its least, after all have run
	status=0; for script in $(filter-out %/__init__.py %/common.py,$(wildcard tests/benchmarks/*.py)); do $(BIN)/python $$script || status=1; done; exit $$status

lock:  ## write the versions that .venv holds
	$(BIN)/pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//; s/+cu[0-9]*$$//' > requirements.lock

sbom: setup  ## build/sbom.json, the packages of .venv as CycloneDX lists them; the tool has an environment of its own
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/pip install --quiet cyclonedx-bom==7.5.0
	build/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate --output-file build/sbom.json $(BIN)/python

clean:  ## everything that can be made again, but not the runs
	rm -rf $(VENV) build *.egg-info *.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
