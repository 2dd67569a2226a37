# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# OpenMP threads that spin while they wait cost more than they gain on small models and shared machines.
export OMP_WAIT_POLICY ?= PASSIVE
# Nothing is fetched from a hub by the tests or the quickstart.
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline

.PHONY: quickstart test soak readers check docs clean

quickstart: .venv/ready
	$(OFFLINE) $(BIN)/python -m rlhf_lit quickstart

test: .venv/ready check
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not soak"

# Tests whose environment could not be made are skipped, and say which.
soak: .venv/ready
	-$(MAKE) --keep-going readers
	$(OFFLINE) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m soak

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documents and the API reference as one site: site/index.html. A broken link is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	# torch first and by its exact version, so that nothing else picks another build of it
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

# Other readers of the models that are saved, each in an environment of its own.
readers: .envs/transformers-4.57/ready .envs/smollm2/complete

# On top of our packages: only what is pinned here differs.
.envs/transformers-4.57/ready: .venv/ready
	$(BIN)/python -m venv --clear $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
	$(@D)/bin/pip install -q --no-deps transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
	touch $@

# A real instruction-tuned model, for them to read.
.envs/smollm2/complete: .venv/ready
	$(BIN)/python ../shared/real_model/build.py $(@D)

clean:
	rm -rf .venv .envs runs site .pytest_cache .mypy_cache .ruff_cache *.egg-info
