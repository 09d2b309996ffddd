# `make` lists the targets. The first call of one creates .venv and installs requirements.txt into it;
# `make PYTHON=/path/to/python …` uses that environment instead and installs nothing.

MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-oldest coverage mutants lint bench precision reproduce overview prepare runs
.PHONY: reports clean

# Variables count on the command line, not in the environment, where the same names may mean something else.
VARIABLES := OUT DATA IMAGENET CIFAR10C SCALE TABLES DATASETS METHODS SEEDS ARGS
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

demo: $(READY)  ## all methods on scikit-learn's digits: a table and a figure, in a minute and a half
	rm -rf demo
	$(MAKE) $(if $(filter -j%,$(MAKEFLAGS)),,-j$$(getconf _NPROCESSORS_ONLN)) runs TABLES=demo SCALE=demo

test: $(READY)  ## the test-suite
	$(PYTHON) -m pytest -q $(ARGS) tests

test-long: $(READY)  ## the same with 2000 examples for each property, and more than 20 kills; half an hour
	$(PYTHON) -m pytest -q --hypothesis-profile=long $(ARGS) tests

test-oldest: .venv-oldest/installed  ## the same with the oldest torch and torchvision of requirements.txt
	.venv-oldest/bin/python -m pytest -q $(ARGS) tests

.venv-oldest/installed: requirements.txt
	python3 -m venv .venv-oldest
	sed -e 's/^torch>=/torch==/' -e 's/^torchvision>=/torchvision==/' requirements.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv-oldest/requirements.txt
	touch $@

coverage: $(READY)  ## the branches of lure.py, baselines.py and evaluate.py that the tests reach
	$(PYTHON) -m coverage run -m pytest -q $(ARGS) tests
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

# Of lure.py from the stream to the loop, the methods and the metrics. `mutmut show NAME` shows one.
CORE := $(addprefix lure.x_,mega_batches connection_sensitivity top_k_mask reinitialize_ average_ unlearn_ cumulative_error_rate \
    generalization_gap expected_calibration_error corrupt_labels stratified to_input augmented train_epoch_ learn_ evaluate lure_ totals)
CORE += $(addprefix baselines.x_,warm_start scratch_ shrink_and_perturb_ dash_ fire_ later_layer_forgetting_ reset_classifier_ \
    redraw_layers_ fisher_ magnitude_ random_ connections keep_top_ loss_gradient)
CORE += $(addprefix evaluate.x_,reliability_bins pgd_attack predict accuracy corruption_accuracy load_array weight_noise_accuracy)
mutants: $(READY)  ## mutation testing: of these functions, the changes that no test notices; up to an hour
	OMP_NUM_THREADS=1 $(PYTHON) -m mutmut run $(addsuffix __mutmut_*,$(CORE))
	$(PYTHON) -m mutmut results --all true | awk '/: not checked$$/ { next } { n++ } / (killed|timeout)$$/ { k++; next } { print } \
	    END { printf "%d of %d mutants killed, %.1f %%\n", k, n, 100 * k / (n + !n); exit !n || k < 0.9 * n }'

lint: $(READY)  ## ruff: check and format; mypy: the signatures
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(READY)  ## the loop beside a plain one: images/s, TFLOP/s, memory, cost of unlearning
	$(PYTHON) bench.py --out "$(if $(filter command,$(origin OUT)),$(OUT),results/bench)" $(ARGS)

precision: $(READY)  ## ResNet18 in bfloat16 and in float32; DATA=<folder with train/ and test/>
	$(MAKE) runs TABLES=precision SCALE=precision

# ------------------------------------------------------------ Tables and figures
# At the paper's protocol, on CIFAR-10 unless it says otherwise. With DATA=<folder with train/<class>/ and test/<class>/
# of images>, SCALE=small is what two CPU cores do in hours, SCALE=narrow the paper's protocol but for a ResNet18 of width
# 16, an hour or two for each run.
reproduce-table1:  ## full replay; CIFAR-10, CIFAR-100 and, with IMAGENET=<folder>, restricted ImageNet
reproduce-table2:  ## buffered replay, on the same
reproduce-table3:  ## no replay, on the same
reproduce-table4:  ## long sequences of mega-batches
reproduce-table5:  ## few-shot: restricted ImageNet, IMAGENET=<folder>
reproduce-table6:  ## architectures
reproduce-table7:  ## share of the weights that is redrawn
reproduce-table8:  ## criterion of importance
reproduce-table9:  ## noisy labels
reproduce-figure2:  ## corruptions; CIFAR10C=<folder of CIFAR-10-C>
reproduce-figure3:  ## attack by PGD-10, noisy labels
reproduce-figure4:  ## reliability and calibration error
reproduce-figure5:  ## noise on the weights
reproduce-figure6:  ## learning rate and weight decay
where-from:  ## where the gain comes from: the method, the schedule or the choice of the epoch
cost:  ## accuracy and cumulative error against image passes
forgetting:  ## accuracy before and right after forgetting, and after relearning; which layers are redrawn
reproduce: $(READY)  ## all of these
	$(MAKE) runs TABLES="$(HERE)"

# The rows of a table are names, METHOD+OPTION=VALUE+…, the options as those of baselines.py, on top of base.SCALE. A run
# is a file, $(OUT)/<data set>/<row>-<seed>.json; where two tables have the same row, they share it.
SCALE := paper
$(if $(filter-out paper small narrow precision demo,$(SCALE)),$(error SCALE: expected paper, small or narrow, not $(SCALE)))
OUT = $(if $(filter demo,$(SCALE)),demo,results/$(SCALE))
ifeq ($(SCALE)$(DATASETS),demo)
DATASETS := digits
endif
ALL := $(addprefix table,1 2 3 4 5 6 7 8 9) $(addprefix figure,2 3 4 5 6) where-from cost forgetting
at.narrow := $(addprefix table,3 1 2) where-from forgetting $(addprefix figure,2 3 4 5)
at.demo := demo forgetting
HERE := $(or $(at.$(SCALE)),$(ALL))
methods := $(shell sed -n '/^METHODS/,/^}/s/^    "\([a-z-]*\)".*/\1/p' baselines.py)
methods := $(filter-out fisher magnitude random,$(methods))
paper := warm-start llf sp lure
compared := $(if $(filter small,$(SCALE)),warm-start lure,$(paper))
# Each of the methods $1, or those asked for, with each of the options $2; + stands for none.
with = $(patsubst %+,%,$(foreach o,$2,$(addsuffix $o,$(or $(METHODS),$1))))

# Small sizes are such that no epoch ends with a batch of a few, which spoils BatchNorm's statistics: of 284 images, 28
# are for validation and 256 are four full batches; 275 less 28, and 8 from the buffer, are four but for one.
base.demo := --image-size 16 --arch small --mega-batches 4 --epochs 10
base.precision := --precision bfloat16 --mega-batches 4 --limit 1136 --limit-test 1000 --epochs 10
base.small := --arch small --precision bfloat16 --limit 2272 --limit-test 2000 --epochs 10
base.narrow := --arch small --precision float32
besides.paper := warm-start+gamma=1
besides.small := warm-start+gamma=1 warm-start+precision=float32
four.paper := +mega-batches=4
four.small := +mega-batches=4+limit=1136
four = $(four.$(SCALE))
buffer.small := +replay=buffer+buffer-size=8+limit=2200
long.paper := $(addprefix +mega-batches=,25 50 100)
long.small := $(addprefix +limit=1420+mega-batches=,10 20)
shots.paper := $(addprefix +arch=resnet50+shots=270+mega-batches=,30 70)
shots.small := $(addprefix +shots=27+epochs=20+mega-batches=,5 10)
archs.paper := $(four.paper) $(addprefix $(four.paper)+arch=,resnet50 wide_resnet50_2 vgg16_bn)
archs.small := $(addprefix +mega-batches=4+limit=568+image-size=16+arch=,resnet18 resnet50 wide_resnet50_2 vgg16_bn)
# The paper's grid is not printed, but for the rate 0.005 with the decay 0.001.
decays := + +weight-decay=0.0005 +weight-decay=0.001
rates.paper := $(subst ++,+,$(foreach w,$(decays),$(addsuffix $(w:+=),+ +lr=0.05 +lr=0.01 +lr=0.005)))
rates.small := + +weight-decay=0.001 +lr=0.005 +lr=0.005+weight-decay=0.001
shares := lure+keep=0.95 lure+keep=0.9 lure lure+keep=0.7 lure+keep=0.6
recipes := + +select=best-val +gamma=1 +gamma=1+select=best-val
epochs.paper := +epochs=5 +epochs=10 +epochs=20 +
epochs.small := +epochs=5 + +epochs=20

# Where a run takes an hour, those that decide come first.
decisive := warm-start warm-start+gamma=1 lure
six := $(decisive) llf sp scratch
table1.narrow := warm-start lure warm-start+gamma=1 scratch
table2.narrow := $(six)
table3.narrow := $(six) lure+gamma=1 random rifle dash fire
of = $(call with,$(or $($1.$(SCALE)),$(methods)),$2)

demo = $(call with,$(methods),+)
table1 = $(call of,table1,+) $(if $(METHODS),,$(besides.$(SCALE)))
table2 = $(call of,table2,$(or $(buffer.$(SCALE)),+replay=buffer))
table3 = $(call of,table3,+replay=none)
table4 = $(call with,$(paper),$(long.$(SCALE)))
table5 = $(call with,$(paper),$(shots.$(SCALE)))
table6 = $(call with,$(compared),$(archs.$(SCALE)))
table7 = $(filter $(or $(addsuffix %,$(METHODS)),%),warm-start $(shares))
table8 = $(call with,warm-start fisher magnitude lure random,$(four))
table9 = $(call with,$(paper),$(addprefix $(four),+ +label-noise=0.2 +label-noise=0.4))
metrics = $(if $(filter narrow,$(SCALE)),$(table3),$(call with,$(methods),+))
figure2 = $(metrics)
figure3 = $(metrics) $(if $(filter narrow,$(SCALE)),,$(table9))
figure4 = $(metrics)
figure5 = $(metrics)
figure6 = $(call with,$(compared),$(addprefix $(four),$(rates.$(SCALE))))
where-from.narrow = $(call with,warm-start warm-start+gamma=1 lure lure+gamma=1,+replay=none)
where-from = $(or $(where-from.$(SCALE)),$(call with,warm-start lure random scratch,$(addprefix $(four),$(recipes))))
forgetting = $(metrics) $(if $(METHODS)$(filter narrow,$(SCALE)),,fisher magnitude random)
cost = $(call with,warm-start lure sp scratch,$(addprefix $(four),$(epochs.$(SCALE))))
precision = warm-start warm-start+precision=float32

# One seed where three would take too long: as it is, the small scale takes two to three hours on two cores.
seeds.small.table4 := 1
seeds.small.table6 := 1
seeds.small.figure6 := 1
seeds.small.cost := 1
seeds.demo := 1
seeds = $(or $(SEEDS),$(seeds.$(SCALE).$1),$(seeds.$(SCALE)),1 2 3)
datasets.table1 := cifar10 cifar100 $(if $(IMAGENET),restricted-imagenet)
datasets.table2 := $(datasets.table1)
datasets.table3 := $(datasets.table1)
datasets.table5 := restricted-imagenet
# A data set that is not known by its name, or is the one that DATA= names at another scale than the paper's, is a folder.
datasets = $(or $(DATASETS),$(if $(filter paper,$(SCALE)),$(or $(datasets.$1),cifar10),$(notdir $(abspath $(folder)))))
known = $(if $(DATASETS)$(filter paper,$(SCALE)),$(filter digits cifar10 cifar100 restricted-imagenet,$1))
folder = $(or $(DATA),DATA)
imagenet = $(or $(IMAGENET),IMAGENET)
place = $(if $(filter restricted-imagenet,$(call known,$1)),$(imagenet),$(if $(call known,$1),$(or $(DATA),data),$(folder)))

# One mechanism behind all of them: the runs, seed by seed, then the table. A file that is there is not made again, so an
# interrupted call goes on where it stopped.
TARGETS := $(patsubst figure%,reproduce-figure%,$(patsubst table%,reproduce-table%,$(ALL)))
.PHONY: $(TARGETS)
$(TARGETS): $(READY)
	$(if $(filter $(@:reproduce-%=%),$(HERE)),,@echo "$@: SCALE=$(SCALE) does not have it, only $(HERE)" >&2; exit 2)
	$(MAKE) runs TABLES=$(@:reproduce-%=%)

files = $(foreach s,$(call seeds,$1),$(foreach d,$(call datasets,$1),$(foreach r,$($1),$(OUT)/$d/$r-$s.json)))
RUNS = $(foreach t,$(TABLES),$(call files,$t))
METRICS = $(patsubst %.json,%.metrics.json,$(if $(filter figure3 figure4 figure5,$(TABLES)),$(call files,figure4)) \
    $(if $(filter forgetting,$(TABLES)),$(foreach s,$(call seeds,forgetting),$(filter %/lure-$s.json %/lure+replay=none-$s.json,$(call files,forgetting)))))
CORRUPTIONS = $(if $(filter figure2,$(TABLES)),$(patsubst %.json,%.corruptions.json,$(call files,figure2)))
MISSING = $(filter-out $(wildcard $(RUNS) $(METRICS) $(CORRUPTIONS)),$(RUNS) $(METRICS) $(CORRUPTIONS))
dataset = $(notdir $(patsubst %/,%,$(dir $@)))
name = $(basename $(notdir $@))
seed = $(lastword $(subst -, ,$(name)))
row = $(subst +, ,$(patsubst %-$(seed),%,$(name)))
# How many runs at once; a bare -j means as many as there are, so one thread each.
jobs = $(or $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS))),$(if $(filter -j,$(MAKEFLAGS)),99,1))
threads = OMP_NUM_THREADS=$$(n=$$(( $$(getconf _NPROCESSORS_ONLN) / $(jobs) )); echo $$(( n > 0 ? n : 1 )))

runs: $(RUNS) $(METRICS) $(CORRUPTIONS)
	$(foreach t,$(TABLES),$(call report,$t))

reports: $(READY)  ## the tables and figures of SCALE= from the runs that are there; starts none
	$(foreach t,$(HERE),$(call report,$t,--incomplete))

define report
$(PYTHON) evaluate.py report --out $(OUT)/$1.md $2 $(call files,$1)

endef

define run
$(threads) $(PYTHON) baselines.py --dataset $(or $(call known,$(dataset)),folder) --data $(call place,$(dataset)) \
    $(if $(filter restricted-imagenet,$(dataset)),--mega-batches 3) $(base.$(SCALE)) \
    --method $(firstword $(row)) $(addprefix --,$(wordlist 2,99,$(row))) --seed $(seed) $(ARGS) \
    --out $(dir $@)$(name).json --checkpoint $(dir $@)$(name).pt
endef
$(sort $(RUNS)): | $(READY) $(if $(MISSING),prepare)
	$(run)

# A record may be there without its checkpoint, which is not kept in git: then the run is made again.
$(patsubst %.json,%.pt,$(sort $(RUNS))): %.pt: | %.json
	[ -e $@ ] || $(run)

$(filter $(METRICS),$(MISSING)): %.metrics.json: | %.pt
	$(threads) $(PYTHON) evaluate.py metrics $*.pt

$(filter $(CORRUPTIONS),$(MISSING)): %.corruptions.json: | %.pt
	$(threads) $(PYTHON) evaluate.py metrics --corruptions $(or $(CIFAR10C),CIFAR10C) $*.pt

# What the runs to come need: data sets are downloaded, or decoded, once and before them, not by each of them at once.
COMING = $(sort $(foreach t,$(TABLES),$(call datasets,$t)))
SIZES = $(sort 0 $(patsubst image-size=%,%,$(filter image-size=%,$(subst +, ,$(foreach t,$(TABLES),$($t))))))
needed = $(if $($1),,echo "$1: expected $1=<folder$2>" >&2; exit 2;)
prepare: $(READY)
	@$(if $(strip $(foreach d,$(COMING),$(if $(call known,$d),,folder))),$(call needed,DATA, with train/<class>/ and test/<class>/ of images)) \
	$(if $(filter restricted-imagenet,$(COMING)),$(call needed,IMAGENET, with train/ and val/)) \
	$(if $(filter $(CORRUPTIONS),$(MISSING)),$(call needed,CIFAR10C, of CIFAR-10-C)) true
	$(foreach d,$(filter-out digits,$(COMING)),$(foreach n,$(SIZES),$(PYTHON) -c 'import sys, lure; \
	    sys.exit(lure.guarded("$d", lambda: lure.load_dataset(*sys.argv[1:], ".cache", $n)))' \
	    $(or $(call known,$d),folder) $(call place,$d) &&)) true

overview: $(READY)  ## results/README.md, from all tables and figures that are there
	$(PYTHON) evaluate.py overview results

clean:  ## remove what the demo made, caches and the environment
	rm -rf demo .cache .venv .venv-oldest mutants .coverage* .*_cache .hypothesis __pycache__ tests/__pycache__
