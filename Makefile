# `make` lists the targets. The first call of one creates .venv and installs requirements.txt into it;
# `make PYTHON=/path/to/python …` uses that environment instead and installs nothing.

MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.NOTPARALLEL:  # -j is for the runs of a target
.PHONY: help demo test test-long test-numerics test-oldest coverage mutants lint bench precision where-from cost forgetting generations \
    reproduce reports overview clean

# Variables count on the command line, not in the environment, where the same names may mean something else.
VARIABLES := OUT DATA IMAGENET CIFAR10C SCALE DATASETS METHODS SEEDS ARGS
$(foreach v,$(VARIABLES),$(if $(findstring environment,$(origin $v)),$(eval $v :=)))

ifeq ($(origin PYTHON),command line)
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/installed
.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@
endif

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*  ## /\1	/p' Makefile | awk -F '\t' '{ printf "make %-18s  %s\n", $$1, $$2 }'
	@echo "make reproduce-table1 … reproduce-table9, reproduce-figure2 … reproduce-figure6: each by itself"

# What experiments/make.py lists, by a make of its own, so that -n, -j and -k mean what they always do.
jobs = $(or $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS))),$(if $(filter -j,$(MAKEFLAGS)),99,1))
quoted = '$(subst ','\'',$(value $1))'
plan = +@plan=$$(mktemp) && trap 'rm -f $$plan' EXIT && python3 -m experiments.make $1 --jobs $(jobs) --python $(call quoted,PYTHON) \
    --scale "$(or $2,$(SCALE),paper)" --out $(call quoted,OUT) --data $(call quoted,DATA) --imagenet $(call quoted,IMAGENET) \
    --cifar10c $(call quoted,CIFAR10C) --datasets=$(call quoted,DATASETS) --methods=$(call quoted,METHODS) \
    --seeds=$(call quoted,SEEDS) --args=$(call quoted,ARGS) > $$plan && $(MAKE) -f $$plan $3 all

demo: jobs = $(or $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS))),$(shell getconf _NPROCESSORS_ONLN))
demo: $(READY)  ## LURE, warm start, S&P and scratch on scikit-learn's digits: a table and a figure
	rm -rf demo
	$(call plan,demo,demo,$(if $(filter -j%,$(MAKEFLAGS)),,-j$$(getconf _NPROCESSORS_ONLN)))
reproduce-%: $(READY)
	$(call plan,$*)
table% figure%:
	@echo "$@: expected reproduce-$@; make without a target lists all" >&2; exit 2
where-from: $(READY)  ## where the gain comes from: the method, the schedule or the choice of the epoch
cost: $(READY)  ## accuracy and cumulative error against image passes
forgetting: $(READY)  ## accuracy before and right after forgetting, and after relearning; which layers are redrawn
generations: $(READY)  ## forget and relearn on one data set, against training as long; DATA=<folder>
where-from cost forgetting generations:
	$(call plan,$@)
precision: $(READY)  ## ResNet18 in bfloat16 and in float32; DATA=<folder with train/ and test/>
	$(call plan,precision,precision)
reproduce: $(READY)  ## all tables and figures of SCALE= (paper, small or narrow)
	$(call plan,all)
reports: $(READY)  ## all tables and figures, generations too, from the runs that are there; starts none
	$(call plan,all --incomplete)
overview: $(READY)  ## results/README.md, from all tables and figures that are there
	"$(PYTHON)" -m experiments.report overview

NUMERICS = "$(PYTHON)" -m pytest -q -n auto --dist loadfile -m numerics $(ARGS) tests
test: $(READY)  ## the test-suite
	"$(PYTHON)" -m pytest -q -n auto --dist loadfile $(ARGS) tests
test-long: $(READY)  ## the same with 2000 examples for each property, and more than 20 kills; half an hour
	"$(PYTHON)" -m pytest -q -n auto --dist loadfile --hypothesis-profile=long $(ARGS) tests
test-numerics: $(READY)  ## a part of them, as processors without AVX-512 and without AVX compute
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(NUMERICS)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(NUMERICS)
test-oldest: .venv-oldest/installed  ## the same with the oldest torch and torchvision of requirements.txt
	.venv-oldest/bin/python -m pytest -q -n auto --dist loadfile $(ARGS) tests
.venv-oldest/installed: requirements.txt
	python3 -m venv .venv-oldest
	sed -e 's/^torch>=/torch==/' -e 's/^torchvision>=/torchvision==/' requirements.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv-oldest/requirements.txt
	touch $@
coverage: $(READY)  ## the branches that the tests reach, but for bench.py
	"$(PYTHON)" -m coverage run -m pytest -q $(ARGS) tests
	"$(PYTHON)" -m coverage combine --quiet
	"$(PYTHON)" -m coverage report
mutants: $(READY)  ## mutation testing: changes of the core functions that no test notices; up to an hour
	PYTHON="$(PYTHON)" tests/mutants.sh
lint: $(READY)  ## ruff: check and format; mypy: the signatures
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m ruff format --check .
	"$(PYTHON)" -m mypy
bench: $(READY)  ## the loop beside a plain one: images/s, TFLOP/s, memory, cost of unlearning
	"$(PYTHON)" -m experiments.bench --out "$(or $(value OUT),runs/bench)" $(ARGS)
clean:  ## remove what the demo made, caches and the environment
	rm -rf demo .cache .venv .venv-oldest mutants .coverage* .*_cache .hypothesis __pycache__ */__pycache__
