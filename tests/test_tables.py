"""The Make targets, the runs that experiments/tables.py plans for them, and the rules for make."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from PIL import Image

import baselines
import lure
from experiments import prepare, runs, tables
from experiments.command import Parser
from experiments.make import command, rules


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project to run make in."""
    folder = tmp_path / "checkout"  # as coverage knows it
    for name in ("lure.py", "baselines.py", "evaluate.py", "Makefile", "results/paper.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    return folder


def make(folder, *words):
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    words = ["make", f"PYTHON={sys.executable}", *words]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


TARGETS = [f"reproduce-table{i}" for i in range(1, 10)] + [f"reproduce-figure{i}" for i in range(2, 7)]
TARGETS += ["where-from", "cost", "forgetting", "generations", "precision"]


def planned(folder, *words):
    """The commands of the runs that make would start, by file, in order; and all that it prints."""
    done = make(folder, "-n", *words)
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "baselines.py" in line]
    return {re.search(r"--out (\S+)", line)[1]: " ".join(line.split()) for line in lines}, text


def test_make_lists_its_targets(checkout):
    listed = {line.split()[1] for line in make(checkout).stdout.splitlines()}
    assert listed >= {"demo", "test", "lint", "bench", "reproduce", "overview", "reproduce-table1"}
    assert not (checkout / ".venv").exists()


def test_make_demo_at_a_reduced_size(checkout, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # which has no †
    done = make(checkout, "demo", "METHODS=warm-start lure", "ARGS=--epochs 1 --limit 200 --limit-test 50")
    assert done.returncode == 0, done.stderr
    assert "\\u2020" in done.stdout and "†" in (checkout / "demo" / "demo.md").read_text()
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2:] == ["Warm start", "LURE"] and "img/s" not in done.stdout
    assert (checkout / "demo" / "demo-digits.png").stat().st_size > 10_000
    assert not (checkout / ".venv").exists()


def test_what_is_finished_when_make_is_stopped_stays(checkout, tmp_path):
    python = tmp_path / "python"  # writes the record, and has not ended yet
    python.write_text(
        '#!/bin/sh\nwhile [ "$1" ]; do [ "$1" = --out ] && echo {} > "$2"; shift; done\nexec sleep 60\n'
    )
    python.chmod(0o755)
    words = ["demo", "--scale", "demo", "--methods", "lure", "--out", "out", "--python", str(python)]
    (checkout / "rules").write_text(rules(tables.arguments(words)))
    (checkout / "out" / "digits").mkdir(parents=True)
    stopped = subprocess.Popen(["make", "-f", "rules", "all"], cwd=checkout, start_new_session=True)
    record = checkout / "out" / "digits" / "lure-1.json"
    while not (record.exists() and record.read_text()) and stopped.poll() is None:
        time.sleep(0.05)
    os.killpg(stopped.pid, signal.SIGTERM)
    assert stopped.wait(timeout=30) and record.read_text() == "{}\n"


def photos(root, classes, shade=0):
    for (split, count), (i, name) in product({"train": 24, "test": 4}.items(), enumerate(classes)):
        for j in range(count):
            path = root / split / name / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 7), (9 * j, 100 * i, shade)).save(path)


SHORT = "--epochs 1 --mega-batches 2"


def test_a_record_of_other_data_or_options_is_neither_taken_nor_replaced(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    photos(checkout / "one" / "photos", "ab")
    photos(checkout / "two" / "photos", "xyz")
    photos(checkout / "three" / "photos", "ab", shade=1)
    words = ["SCALE=small", "SEEDS=1", "METHODS=warm-start", "OUT=out"]
    assert make(checkout, "reproduce-table7", *words, "DATA=one/photos", f"ARGS={SHORT}").returncode == 0
    files = checkout / "out" / "photos" / "warm-start-1.json", checkout / "out" / "table7.md"
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    narrowed = ["table7", "--scale=small", "--seeds=1", "--methods=warm-start", "--out=out"]
    for data, options, told in (
        ("two/photos", SHORT, "found train 48, not 72, test 8, not 12, sha256 "),
        ("three/photos", SHORT, "found sha256 "),
        ("one/photos", f"{SHORT} --lr 0.05", "found lr 0.1, not 0.05"),
        ("two/photos", "--epochs 3", "mega_batches 2, not 8, epochs 1, not 3"),
    ):
        for more in ([], ["--incomplete"]):  # to run it, or to render it
            asked = tables.arguments([*narrowed, f"--data={data}", f"--args={options}", *more])
            with pytest.raises(ValueError, match=f"expected no file, or one of this run; found .*{told[6:]}"):
                prepare.prepare(asked)
    done = make(checkout, "reproduce-table7", *words, "DATA=two/photos", f"ARGS={SHORT}")
    line, *rest = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and not rest and "Warm start" not in done.stdout
    assert line.startswith("table7: out/photos/warm-start-1.json: expected no file, or one of this run; ")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    again = tables.arguments([*narrowed, "--data=one/photos", f"--args={SHORT}"])
    prepare.prepare(again)
    monkeypatch.setitem(baselines.METHODS, "warm-start", lambda model, between, factor=0.5: None)
    with pytest.raises(ValueError, match=r"found settings \{\}, not \{'factor': 0.5\}"):
        prepare.prepare(again)


def test_the_records_of_a_plan_are_compared_without_data_by_their_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["reports", "table1", "--scale", "small", "--datasets", "cifar10-jpeg", "--incomplete"]
    prepare.prepare(tables.arguments(words[1:]))
    assert "compared with the call by their options, not with the data" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"warm-start-1.json: .* found epochs 10, not 11"):
        prepare.prepare(tables.arguments([*words[1:], "--args=--epochs 11", "--out=results/small"]))


def test_a_call_tells_how_long_the_committed_runs_of_it_took(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["table1", "--scale=small", "--data=x/cifar10-jpeg", "--seeds=1 9", f"--out={tmp_path}"]
    told = rules(tables.arguments(words))
    some = r"table1: 20 runs, 0 of them in .*; 20 to run, of which 10 took \d+ minutes one after the other"
    assert re.search(some, told)
    assert "of which" not in rules(tables.arguments([*words, "--args=--epochs 1"]))  # other runs


@pytest.mark.parametrize("more", ["--args=--limit 60", "--methods=lure+limit=60"])
def test_an_option_that_a_row_has_itself_is_refused_before_any_run(more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = tables.arguments(["table8", "--scale=small", "--datasets=digits", more])
    told = "METHODS, ARGS: expected no option that the row .* limit=1136 has itself .*limit"
    with pytest.raises(ValueError, match=told):
        prepare.prepare(asked)
    assert not [*tmp_path.iterdir()]


ODD = ["it's my: a#b$c=+,@ä", "a$(b)"]


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_a_shell_or_make_would_split_is_carried_or_refused_before_any_run(name, checkout):
    photos(checkout / name, "ab")
    photos(checkout / name.split("$")[0], "xy")  # what a variable would make of it
    python = checkout / "my env's" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    words = ["reproduce-table7", "SCALE=small", "SEEDS=1", "METHODS=warm-start", f"ARGS={SHORT}"]
    done = make(checkout, *words, f"DATA={name}", f"OUT=out {name}", f"PYTHON={python}")
    if "(" in name:
        told = "out a$(b)/a$(b)/warm-start-1.json: make cannot carry '(' in a name; expected letters, digits"
        line, *rest = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
        assert done.returncode == 2 and line.startswith(told) and not rest
        assert not list(checkout.glob("out*"))
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"table7: 1 run, 0 of them in out {name}; 1 to run\n")
        (record,) = checkout.glob("out*/*/*.json")
        assert record == checkout / f"out {name}" / name / "warm-start-1.json"
        assert json.loads(record.read_text())["config"]["data"] == name
        assert "| Warm start | 1 † |" in (checkout / f"out {name}" / "table7.md").read_text()
        assert [path.name.rpartition("-")[0] for path in (checkout / ".cache").iterdir()] == [f"{name}-32"]


def test_make_runs_and_measures_what_is_missing_and_nothing_else(checkout):
    words = ["-j2", "reproduce-figure4", "OUT=out", "DATASETS=digits", "METHODS=lure", "SEEDS=1"]
    words.append(f"ARGS={' '.join(SMALL[2:])}")
    assert make(checkout, *words).returncode == 0
    runs, text = planned(checkout, *words, "SEEDS=1 2")
    assert [*runs] == ["out/digits/lure-2.json"]
    assert "\nfigure4: 2 runs, 1 of them in out; 1 to run\n" in text
    record, measured = (checkout / "out" / "digits" / f"lure-1{end}" for end in (".json", ".metrics.json"))
    assert (checkout / "out" / "figure4-digits.png").exists()
    record.with_suffix(".pt").unlink()
    runs, text = planned(checkout, *words)
    assert not runs and "evaluate.py" not in text  # what was measured of it is still there
    measured.unlink()
    runs, text = planned(checkout, *words)
    assert [*runs] == ["out/digits/lure-1.json"] and text.count("evaluate.py out/digits/lure-1.pt") == 1


def test_every_planned_run_is_a_call_that_baselines_takes():
    parser = Parser(allow_abbrev=False)
    lure.add_settings(parser, runs.Config)
    methods = set()
    for scale, there in tables.SCALES.items():
        asked = tables.arguments(["all", "--scale", scale])
        for run in {run for name in there for run in tables.planned(name, asked)}:
            methods.add(run.row.split()[0])
            given = parser.parse_args(shlex.split(command(run, asked)))
            config = runs.Config(**vars(given))
            runs.method(config)
            assert (config.method, str(config.seed)) == (run.row.split()[0], run.seed)
    assert methods <= {*baselines.METHODS}


def test_make_names_the_runs_of_every_table_without_data(checkout):
    for scale in ("paper", "small"):
        for target in TARGETS:
            runs, text = planned(checkout, target, f"SCALE={scale}")
            assert runs and all("--seed" in line and "--checkpoint" in line for line in runs.values())
            where = "precision" if target == "precision" else scale
            assert f"-m experiments.report {target.removeprefix('reproduce-')} --jobs 1" in text
            assert all(f"--out runs/{where}/" in line for line in runs.values())


def test_the_runs_at_the_papers_protocol(checkout):
    runs, _ = planned(checkout, "-j2", "reproduce-table1", "IMAGENET=/imagenet")
    assert len(runs) == 3 * 9 * 3 and "runs/paper/cifar100/fire-3.json" in runs
    of_imagenet = [line for file, line in runs.items() if "restricted" in file]
    assert all("--data /imagenet --mega-batches 3 " in line for line in of_imagenet)
    everything = " ".join(runs.values())
    assert "--arch" not in everything and "--epochs" not in everything  # the defaults are the paper's

    def options(target, *words):
        lines = planned(checkout, target, *words)[0].values()
        return {" ".join(re.findall(r"--method \S+ (.*) --seed 1 ", line)).strip() for line in lines} - {""}

    assert options("reproduce-table2") == {"--replay=buffer"}
    assert options("reproduce-table3") == {"--replay=none"}
    assert options("reproduce-table4") == {f"--mega-batches={t}" for t in (25, 50, 100)}
    assert options("reproduce-table5") == {
        f"--arch=resnet50 --shots=270 --mega-batches={t}" for t in (30, 70)
    }
    archs = ("resnet50", "wide_resnet50_2", "vgg16_bn")
    four = "--mega-batches=4"
    assert options("reproduce-table6") == {four} | {f"{four} --arch={arch}" for arch in archs}
    assert options("reproduce-table7") == {f"--keep={keep}" for keep in (0.95, 0.9, 0.7, 0.6)}
    assert options("reproduce-table8") == {four}
    assert options("reproduce-table9") == {four} | {f"{four} --label-noise={p}" for p in (0.2, 0.4)}
    cells = ("", " --select=best-val", " --gamma=1", " --gamma=1 --select=best-val")
    assert options("where-from") == {four + cell for cell in cells}
    assert options("cost") == {four, *(f"{four} --epochs={n}" for n in (5, 10, 20))}
    assert f"{four} --lr=0.005 --weight-decay=0.001" in options("reproduce-figure6")
    assert len(options("reproduce-figure6")) == 12
    assert not any("++" in file for file in planned(checkout, "reproduce")[0])


def test_tables_share_the_runs_that_are_the_same(checkout):
    files = {t: set(planned(checkout, t)[0]) for t in TARGETS if t not in ("precision", "generations")}
    same = {
        f"runs/paper/cifar10/{m}+mega-batches=4-{s}.json" for m in ("warm-start", "lure") for s in (1, 2, 3)
    }
    for target in ("reproduce-table6", "reproduce-table8", "reproduce-table9", "where-from", "cost"):
        assert same <= files[target]
    assert "runs/paper/cifar10/lure-1.json" in files["reproduce-table1"] & files["reproduce-table7"]
    together, _ = planned(checkout, "reproduce")
    assert set(together) == set.union(*files.values())


def test_the_rules_are_of_what_is_missing_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "figure3",
        "--scale",
        "small",
        "--data",
        "x/cifar10-jpeg",
        "--methods=lure",
        "--seeds=1 2",
        "--jobs=9",
    ]
    folder = tmp_path / "runs" / "small" / "cifar10-jpeg"
    folder.mkdir(parents=True)
    for name in ("lure-1.json", "lure-1.attack.json", "lure-2.json"):
        (folder / name).touch()
    text = rules(tables.arguments(words)).replace("$(equals)", "=")
    rule = {line.split(":")[0]: line for line in text.splitlines() if ": | " in line}
    noisy = [
        f"lure+mega-batches=4+limit=1136{noise}" for noise in ("", "+label-noise=0.2", "+label-noise=0.4")
    ]
    missing = {f"{row}-{seed}.json" for row in noisy for seed in (1, 2)} | {"lure-2.attack.json"}
    assert rule["all"].split()[2] == "prepare"
    assert {Path(path).name for path in rule["all"].split()[3:]} == missing
    assert {Path(path).name for path in rule if path.endswith(".json")} == missing
    assert rule[f"{folder.relative_to(tmp_path)}/lure-2.attack.json"].endswith("/lure-2.pt")
    assert "OMP_NUM_THREADS=1 " in text and "evaluate.py --attack runs/small" in text
    asked = tables.arguments([*words, "--incomplete", "--out=runs/small"])
    assert "\nall: | prepare\n" in rules(asked)  # to render what is there, nothing is run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["table1", "--scale", "large"], "SCALE: expected"),
        (["table10"], "table10: SCALE=paper does not have it"),
        (
            ["all", "--incomplete", "--seeds", "1"],
            "SEEDS: expected OUT=<folder> too, or the tables in results/",
        ),
        (
            ["all", "--incomplete", "--scale=narrow", "--datasets=cifar10-jpeg"],
            "DATASETS: expected OUT=<folder>",
        ),
    ],
)
def test_what_is_not_planned_is_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as refusal:
        tables.arguments(words)
    error = capsys.readouterr().err
    assert refusal.value.code == 2 and error.startswith(told) and error.count("\n") == 1


def test_the_small_scale_and_what_narrows_a_table(checkout, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs, _ = planned(checkout, "reproduce-table1", "SCALE=small", "DATA=photos/cifar10-jpeg")
    assert len(runs) == 10 * 3 and "runs/small/cifar10-jpeg/warm-start+gamma=1-2.json" in runs
    assert all("--dataset folder --data photos/cifar10-jpeg --arch small" in line for line in runs.values())
    beside, _ = planned(checkout, "precision", "DATA=photos/cifar10-jpeg")
    assert len(beside) == 6 and sum("--precision=float32" in line for line in beside.values()) == 3
    narrow = ["reproduce-table2", "DATASETS=cifar100", "METHODS=lure dash", "SEEDS=7", "OUT=x", "ARGS=--lr 1"]
    runs, _ = planned(checkout, *narrow)
    assert [*runs] == [f"x/cifar100/{m}+replay=buffer-7.json" for m in ("lure", "dash")]
    assert all("--seed 7 --lr 1 --out" in line for line in runs.values())
    own, _ = planned(checkout, "reproduce-table3", "SCALE=small", "DATA=photos/cifar10")
    assert all("--dataset folder --data photos/cifar10 " in line for line in own.values())
    seven, _ = planned(checkout, "reproduce-table7", "METHODS=lure", "SEEDS=1")
    assert len(seven) == 5 and not any("warm-start" in file for file in seven)
    assert '--out "runs/bench"' in make(checkout, "-n", "bench").stdout
    cores = os.cpu_count()
    for jobs in (1, cores):  # the threads are divided
        text = planned(checkout, f"-j{jobs}", "reproduce-table3", "SEEDS=1")[1]
        assert f"OMP_NUM_THREADS={cores // jobs} " in text


def test_the_narrow_scale_runs_the_papers_protocol_with_a_narrow_network(checkout):
    def rows(target, *words):
        """Data set → row → seeds, in the order of the runs."""
        runs, _ = planned(checkout, target, "SCALE=narrow", "DATA=photos", *words)
        found = {}
        for file, line in runs.items():
            dataset, row, seed = re.fullmatch(r"runs/narrow/(.*)/(.*)-(\d).json", file).groups()
            protocol = f"--dataset folder --data photos/{dataset} --arch small --precision float32 --method "
            assert protocol in line and not {"--limit", "--epochs", "--mega-batches"} & {*line.split()}
            of = found.setdefault(dataset, {})
            row = row.replace("+replay=none", "")
            of[row] = of.get(row, "") + seed
        return found

    how = "+select=best-val+keep-momentum"
    released = ["warm-start+gamma=1" + how, "warm-start" + how, f"released{how}+pi=next+pi-fraction=0.0178"]
    six = ["warm-start", "warm-start+gamma=1", "lure", "llf", "sp", "scratch"]
    jpeg = dict.fromkeys([*six, "lure+gamma=1", *released], "123")
    jpeg |= {"warm-start": "1234567", "lure": "1234567", "llf": "12345", "sp": "12345"}
    cifar100 = dict.fromkeys(["warm-start", "warm-start+gamma=1", "lure"], "123")
    full = dict.fromkeys(["warm-start", "lure", "scratch"], "123")
    assert rows("reproduce-table3") == {"cifar10-jpeg": jpeg, "cifar100-lossless": cifar100}
    assert rows("reproduce-table1") == {"cifar10-lossless": full}
    four = ["warm-start", "warm-start+gamma=1", "lure", "lure+gamma=1"]
    assert rows("where-from") == {"cifar10-jpeg": dict.fromkeys([*four, *released], "123")}
    assert rows("forgetting") == {"cifar10-jpeg": jpeg, "cifar10-lossless": full}
    for figure, seeds in (("2", "123"), ("3", "123"), ("4", "1234567"), ("5", "1234567")):
        measured = {"warm-start": "123", "warm-start+gamma=1": "123", "lure": seeds}
        expected = {"cifar10-jpeg": measured, "cifar10-lossless": full}
        assert rows(f"reproduce-figure{figure}", "CIFAR10C=c") == expected
    assert len(planned(checkout, "reproduce", "SCALE=narrow", "DATA=x")[0]) == 42 + 9 + 9


def test_the_narrow_scale_is_narrowed_by_data_set_method_and_seed(checkout):
    def files(*words):
        return [*planned(checkout, words[0], "SCALE=narrow", *words[1:])[0]]

    first = files("reproduce-table3", "DATASETS=cifar10-jpeg", "METHODS=warm-start+gamma=1", "SEEDS=2")
    assert first == ["runs/narrow/cifar10-jpeg/warm-start+gamma=1+replay=none-2.json"]
    other = files("reproduce-table1", "METHODS=warm-start+gamma=1", "SEEDS=1")  # a row that is not planned
    assert other == ["runs/narrow/cifar10-lossless/warm-start+gamma=1-1.json"]
    unseen = files("reproduce-table3", "METHODS=lure", "DATASETS=cifar10-jpeg")
    assert [file[-6] for file in unseen] == [*"1234567"]
    runs, _ = planned(checkout, "reproduce-table3", "SCALE=narrow", "DATASETS=cifar100")
    assert len(runs) == 9 and all("--dataset cifar100 --data data " in line for line in runs.values())
    own, _ = planned(checkout, "reproduce-table1", "SCALE=narrow", "DATASETS=photos", "DATA=x", "SEEDS=1")
    assert len(own) == 3 and all("--dataset folder --data x/photos " in line for line in own.values())


def test_generations_train_on_one_data_set_as_long_in_one_schedule_as_in_many(checkout):
    for scale, generations, epochs in (("paper", 11, 200), ("small", 10, 40)):
        runs, text = planned(checkout, "generations", f"SCALE={scale}", "DATA=photos/flowers", "SEEDS=1")
        names = [re.fullmatch(rf"runs/{scale}/flowers/(.*)-1.json", file)[1] for file in runs]
        *methods, whole = [name.replace("+generations", "") for name in names]
        forgetting = ["ke", "rifle", "llf", "sp", "lure", "random", "dash", "fire", "scratch"]
        assert methods == ["warm-start", *forgetting]
        assert whole == f"warm-start+mega-batches=1+epochs={generations * epochs}"
        base = f"--replay none .*--mega-batches {generations} --epochs {epochs} .*--generations "
        assert all(re.search(base, line) for line in runs.values())
        assert len(planned(checkout, "generations", f"SCALE={scale}", "DATA=x")[0]) == 33
        assert text.count(" 64") == (11 if scale == "paper" else 0)  # pixels


def test_make_reports_shows_what_is_there_and_starts_nothing(checkout):
    runs = checkout / "out" / "cifar10-jpeg"
    runs.mkdir(parents=True)
    there = ["ke+generations-1.json", "lure+replay=none-1.json"]
    for name in there:
        shutil.copy(ROOT / "results" / "small" / "cifar10-jpeg" / name, runs)
    words = ["reports", "SCALE=small", "OUT=out", "DATASETS=cifar10-jpeg"]
    done = make(checkout, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No run is started. Records were compared")
    assert "Not measured: `warm-start+replay=none-1`, " in (checkout / "out" / "table3.md").read_text()
    assert "nothing has been measured yet for table4" in done.stdout
    assert sorted(path.name for path in (checkout / "out").glob("*.md")) == ["generations.md", "table3.md"]
    assert sorted(path.name for path in runs.iterdir()) == there


@pytest.mark.parametrize(
    "words, message",
    [
        (["table2", "--scale=small"], "DATA: expected DATA=<folder with train/<class>/ and"),
        (["table5"], "IMAGENET: expected IMAGENET=<folder with train/ and val/>"),
        (["figure2", "--datasets=digits"], "CIFAR10C: expected CIFAR10C=<folder of CIFAR-10-C>"),
    ],
)
def test_what_is_not_given_is_told_before_anything_is_run(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare.prepare(tables.arguments(words))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "words, message",
    [
        (["reproduce-table2", "SCALE=small", "DATA=none"], "; expected none/train/<class>/<image>"),
        (
            ["reproduce-table4", "SCALE=narrow"],
            "table4: SCALE=narrow does not have it, only table1, table3, where-from",
        ),
        (
            ["reproduce-table1", "SCALE=large"],
            "SCALE: expected paper, small, narrow, demo, precision, not large",
        ),
    ],
)
def test_make_without_what_it_needs_says_so(checkout, words, message):
    done = make(checkout, *words)
    assert done.returncode == 2 and message in done.stderr and not (checkout / "results" / "small").exists()
