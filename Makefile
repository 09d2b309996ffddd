# `make` lists the targets. The first call of one creates .venv and installs requirements.txt into it;
# `make PYTHON=/path/to/python …` uses that environment instead and installs nothing.

MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench precision table1-small reproduce-table1 prepare runs clean

# Variables count on the command line, not in the environment, where the same names may mean something else.
$(foreach v,OUT DATA IMAGENET DATASETS METHODS VARIANTS SEEDS BASE ARGS,$(if $(findstring environment,$(origin $v)),$(eval $v :=)))

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
	@sed -n 's/^\([a-z0-9-]*\):.*  ## /\1	/p' Makefile | awk -F '\t' '{ printf "make %-16s  %s\n", $$1, $$2 }'

demo: $(READY)  ## all methods on scikit-learn's digits: a table and a figure, in a minute and a half
	rm -rf demo
	$(MAKE) $(if $(filter -j%,$(MAKEFLAGS)),,-j$$(getconf _NPROCESSORS_ONLN)) runs OUT=demo DATASETS=digits SEEDS="$(or $(SEEDS),1)" \
	    BASE="--image-size 16 --arch small --mega-batches 4 --epochs 10"

test: $(READY)  ## the test-suite
	$(PYTHON) -m pytest -q $(ARGS) tests

lint: $(READY)  ## ruff: check and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

reproduce-table1: $(READY)  ## Table 1 at the paper's protocol; IMAGENET=<folder> for its third data set
	$(MAKE) runs OUT="$(or $(OUT),results/table1)" SEEDS="$(or $(SEEDS),1 2 3)" \
	    DATASETS="$(or $(DATASETS),cifar10 cifar100 $(if $(IMAGENET),restricted-imagenet))"

needs_data = $(if $(DATA),,$(error $@: expected DATA=<folder with train/<class>/ and test/<class>/ of images>))

bench: $(READY)  ## the loop beside a plain one: images/s, TFLOP/s, memory, cost of unlearning
	$(PYTHON) bench.py --out "$(or $(OUT),results/bench)" $(ARGS)

# 2272 images are 8 × (28 for validation + 4 full batches of 64): a last batch of a few spoils BatchNorm's statistics.
table1-small: $(READY)  ## Table 1 at the scale of two CPU cores; DATA=<folder with train/ and test/>
	$(needs_data)
	$(MAKE) runs OUT="$(or $(OUT),results/table1-small)" SEEDS="$(or $(SEEDS),1 2 3)" \
	    DATASETS="$(or $(DATASETS),$(notdir $(abspath $(DATA))))" VARIANTS="$(if $(filter command,$(origin VARIANTS)),$(VARIANTS),warm-start-gamma1 warm-start-float32)" \
	    BASE="--arch small --limit 2272 --limit-test 2000 --epochs 10"

precision: $(READY)  ## ResNet18 in bfloat16 and in float32, three seeds; DATA=<folder with train/ and test/>
	$(needs_data)
	$(MAKE) runs OUT="$(or $(OUT),results/precision)" SEEDS="$(or $(SEEDS),1 2 3)" \
	    DATASETS="$(notdir $(abspath $(DATA)))" \
	    METHODS=warm-start VARIANTS=warm-start-float32 \
	    BASE="--precision bfloat16 --mega-batches 4 --limit 1136 --limit-test 1000 --epochs 10"

# One mechanism behind all of them: a file per run, $(OUT)/<dataset>/<method>-<seed>.json, then the table; the first seed
# of all methods comes first. A file that is there is not made again, so an interrupted call goes on where it stopped.
# A variant is a method with other settings, <method>-<variant>-<seed>.json. A data set that lure.py does not know by
# name is the image folder $(DATA).
METHODS := $(filter-out fisher magnitude random,$(shell sed -n '/^METHODS = {/,/^}/s/^    "\([a-z-]*\)".*/\1/p' baselines.py))
VARIANTS :=
RUNS = $(foreach s,$(SEEDS),$(foreach d,$(DATASETS),$(foreach m,$(METHODS) $(VARIANTS),$(OUT)/$d/$m-$s.json)))
dataset_digits = --dataset digits
dataset_cifar10 = --dataset cifar10 --data $(or $(DATA),data)
dataset_cifar100 = --dataset cifar100 --data $(or $(DATA),data)
dataset_restricted-imagenet = --dataset restricted-imagenet --mega-batches 3 --data \
    $(or $(IMAGENET),$(error restricted-imagenet: expected IMAGENET=<folder with train/ and val/>))
method_warm-start-gamma1 = --method warm-start --gamma 1
method_warm-start-float32 = --method warm-start --precision float32
dataset = $(notdir $(patsubst %/,%,$(dir $@)))
seed = $(lastword $(subst -, ,$(basename $(notdir $@))))
name = $(patsubst %-$(seed).json,%,$(notdir $@))
# How many runs at once; a bare -j means as many as there are, so one thread each.
jobs = $(or $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS))),$(if $(filter -j,$(MAKEFLAGS)),99,1))

# The data sets of the runs to come are downloaded, or decoded, once and before them, not by each of them at once.
prepare: $(READY)
	$(foreach d,$(filter-out digits restricted-imagenet,$(DATASETS)),$(PYTHON) -c 'import sys, lure; \
	    sys.exit(lure.guarded("$d", lambda: lure.load_dataset(*sys.argv[1:])))' \
	    $(if $(dataset_$d),$d,folder) $(or $(DATA),data) &&) true

runs: $(RUNS)
	$(PYTHON) evaluate.py report $(addprefix $(OUT)/,$(DATASETS))

$(RUNS): | $(READY) $(if $(filter-out $(wildcard $(RUNS)),$(RUNS)),prepare)
	OMP_NUM_THREADS=$$(n=$$(( $$(getconf _NPROCESSORS_ONLN) / $(jobs) )); echo $$(( n > 0 ? n : 1 ))) \
	    $(PYTHON) baselines.py $(or $(dataset_$(dataset)),--dataset folder --data $(DATA)) $(BASE) \
	    $(or $(method_$(name)),--method $(name)) --seed $(seed) $(ARGS) \
	    --out $@ --checkpoint $(basename $@).pt

clean:  ## remove what the demo made, caches and the environment
	rm -rf demo .cache .venv .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__
