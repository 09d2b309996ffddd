"""The command lines, the Make targets, the README and the files of the project."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import baselines
import bench
import lure
from experiments import report, tables

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "digits", "--arch", "small", "--limit", "120", "--limit-test", "60"]
TINY += ["--mega-batches", "2", "--epochs", "1"]


def refused(capsys, status, *words, call=lure.main, argv=()):
    """The call ends with the status and one line that has all the words."""
    try:
        assert call([*TINY, *argv]) == status
    except SystemExit as exit:
        assert exit.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--keep", "0"], ["--keep", "(0, 1]"]),
        (["--keep", "1.5"], ["--keep", "(0, 1]"]),
        (["--keep", "nan"], ["--keep", "(0, 1]"]),
        (["--keep", "much"], ["--keep", "much"]),
        (["--mega-batches", "0"], ["--mega-batches", "at least 1"]),
        (["--mega-batches", "121"], ["120 samples", "121 mega-batches"]),
        (["--lr", "inf"], ["--lr"]),
        (["--seed", "-1"], ["--seed"]),
        (["--dataset", "mnist"], ["mnist", "digits, cifar10, cifar100, folder, restricted-imagenet"]),
        (["--arch", "resnet19"], ["resnet19", "resnet18, resnet50"]),
        (["--replay", "some"], ["full, buffer, none"]),
        (["--select", "best-val", "--val-fraction", "0"], ["--val-fraction"]),
        (["--arch", "vgg16_bn"], ["vgg16_bn", "16"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--replay", "none", "--mega-batches", "120"], ["two training samples"]),
        (["--speed", "9"], ["--speed"]),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(argv, words, tmp_path, capsys):
    refused(
        capsys, 2, *words, argv=[*argv, "--out", f"{tmp_path}/x.json", "--checkpoint", f"{tmp_path}/x.pt"]
    )
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_is_told_which_exist(capsys):
    names = ", ".join(baselines.METHODS)
    refused(capsys, 2, "--method", "forget", names, call=baselines.main, argv=["--method", "forget"])


def test_a_file_of_another_configuration_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert lure.main([*TINY, "--out", str(out)]) == 0
    before = out.read_bytes()
    capsys.readouterr()
    refused(capsys, 2, "run.json", "epochs 1, not 2", argv=["--out", str(out), "--epochs", "2"])
    record = json.loads(before)
    out.write_text(json.dumps(record | {"data": record["data"] | {"sha256": "other"}}))
    refused(capsys, 2, "run.json", "sha256 other", argv=["--out", str(out)])
    out.write_bytes(before)
    assert lure.main([*TINY, "--out", str(out)]) == 0  # the same: nothing is run, nothing is written
    assert out.read_bytes() == before
    capsys.readouterr()
    out.write_text("something else")
    refused(capsys, 2, "run.json", "or no file (JSONDecodeError)", argv=["--out", str(out)])
    assert out.read_text() == "something else"


def test_a_record_is_compared_by_the_precision_that_it_ran_in(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert lure.main([*TINY, "--precision", "float32", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    ran = lure.pick_precision("auto", torch.device("cpu"))
    out.write_text(json.dumps(record | {"precision": ran}))
    assert lure.main([*TINY, "--out", str(out)]) == 0  # auto, which means the same
    other = "float32" if ran == "bfloat16" else "bfloat16"
    capsys.readouterr()
    refused(capsys, 2, f"precision {ran}, not {other}", argv=["--out", str(out), "--precision", other])


def test_interrupted_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lure, "train_epoch_", interrupt)
    assert lure.main([*TINY, "--out", f"{tmp_path}/x.json"]) == 130
    assert not list(tmp_path.iterdir()) and "interrupted" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        lure.write(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_every_option_is_on_the_command_line_with_its_help(capsys):
    with pytest.raises(SystemExit) as exit:
        baselines.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for f in fields(baselines.Config):
        assert f"--{f.name.replace('_', '-')} " in text and " ".join(f.metadata["help"].split()) in text


def test_the_record_says_where_its_numbers_come_from(tmp_path):
    files = ["--out", f"{tmp_path}/x.json", "--checkpoint", f"{tmp_path}/x.pt"]
    assert baselines.main([*TINY, "--method", "sp", "--set", "noise=0.1", *files]) == 0
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["config"]["method"] == "sp" and record["config"]["set"] == ["noise=0.1"]
    command = f"python baselines.py {' '.join(TINY)} {' '.join(files)} --method sp --set noise=0.1"
    assert set(record["command"].split()) == set(command.split())
    assert record["versions"]["torch"] == torch.__version__ and record["data"]["train"] == 120
    rows, totals = record["mega_batches"], record["totals"]
    assert totals["cer"] == sum(row["test"]["errors"] for row in rows)
    assert totals["image_passes"] == sum(row["image_passes"] for row in rows) == 54 + 108
    for row in rows:
        assert row["test"]["accuracy"] == pytest.approx(100 - row["test"]["errors"] / 0.6)
    gap = rows[-1]["train"]["accuracy"] - rows[-1]["val"]["accuracy"]
    assert totals["generalization_gap"] == pytest.approx(gap)
    weights = torch.load(tmp_path / "x.pt", weights_only=True)["weights"]
    model = lure.build_model("small", 10, 1, (0.0,), (1.0,))
    model.load_state_dict(weights)


def test_importing_prints_and_changes_nothing():
    script = (
        "import random, torch; torch.manual_seed(1); a = torch.get_rng_state(); n = torch.get_num_threads()\n"
        "import lure, baselines, evaluate, bench\n"
        "assert torch.equal(torch.get_rng_state(), a) and torch.get_num_threads() == n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lure_runs_alone(tmp_path):
    shutil.copy(ROOT / "lure.py", tmp_path)
    done = subprocess.run([sys.executable, "lure.py", *TINY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "test_accuracy" in json.loads(done.stdout)


def requirements(text):
    return {line.strip() for line in text.splitlines() if re.match(r"\s*[a-z]", line)}


def test_the_script_block_is_what_the_requirements_say():
    block = re.search(r"(?s)^# /// script\n(.*?)^# ///$", (ROOT / "lure.py").read_text(), re.M)[1]
    needed = set(re.findall(r'"([a-z-]+>=[\d.]+)"', block))
    assert needed and needed <= requirements((ROOT / "requirements.txt").read_text())
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / "lure.py").read_text(), re.M))
    third = {name for name in imported if name not in sys.stdlib_module_names} - {
        "PIL"
    }  # torchvision needs it
    assert third == {name.split(">")[0].replace("scikit-learn", "sklearn") for name in needed}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project to run make in."""
    for name in ("lure.py", "baselines.py", "evaluate.py", "Makefile", "results/paper.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    return tmp_path


def make(folder, *words):
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    words = ["make", f"PYTHON={sys.executable}", *words]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


TARGETS = [f"reproduce-table{i}" for i in range(1, 10)] + [f"reproduce-figure{i}" for i in range(2, 7)]
TARGETS += ["where-from", "cost", "forgetting", "precision"]


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


def test_make_demo_at_a_reduced_size(checkout):
    done = make(
        checkout, "demo", "METHODS=warm-start lure fire", "ARGS=--epochs 1 --limit 200 --limit-test 50"
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2:] == ["Warm start", "LURE", "FIRE"] and "img/s" not in done.stdout
    assert (checkout / "demo" / "demo-digits.png").stat().st_size > 10_000
    assert not (checkout / ".venv").exists()


def test_make_runs_what_is_missing_and_nothing_else(checkout):
    words = ["demo", "OUT=out", "METHODS=warm-start sp", "SEEDS=1 2"]
    words.append(f"ARGS={' '.join(TINY[2:])}")
    assert make(checkout, *words, "-j2").returncode == 0
    files = sorted((checkout / "out" / "digits").glob("*-?.json"))
    assert [f.name for f in files] == ["sp-1.json", "sp-2.json", "warm-start-1.json", "warm-start-2.json"]
    times = {f: f.stat().st_mtime_ns for f in files}
    files[2].unlink()
    assert make(checkout, *words).returncode == 0
    assert [f for f in files if f.stat().st_mtime_ns != times[f]] == [files[2]]


def test_make_measures_checkpoints_and_makes_them_again_where_they_are_gone(checkout):
    words = ["reproduce-figure4", "OUT=out", "DATASETS=digits", "METHODS=lure", "SEEDS=1"]
    words.append(f"ARGS={' '.join(TINY[2:])}")
    assert make(checkout, *words).returncode == 0
    record, measured = (checkout / "out" / "digits" / f"lure-1{end}" for end in (".json", ".metrics.json"))
    assert (checkout / "out" / "figure4-digits.png").exists()
    before = json.loads(measured.read_text())["ece"]
    record.with_suffix(".pt").unlink()
    assert make(checkout, *words).returncode == 0
    assert not record.with_suffix(".pt").exists()  # what was measured of it is still there
    measured.unlink()
    assert make(checkout, *words).returncode == 0
    assert json.loads(measured.read_text())["ece"] == before


def test_every_row_is_of_a_method_and_options_that_there_are():
    options = {f.name.replace("_", "-"): f for f in fields(baselines.Config)}
    for scale, there in tables.SCALES.items():
        asked = tables.arguments(["all", "--scale", scale])
        rows = {run.row for name in there for run in tables.planned(name, asked)}
        for row in {*rows, f"lure {tables.BASE[scale]}"}:
            method, *pairs = row.split()
            given = {
                key.replace("-", "_"): value for key, _, value in (pair.partition("=") for pair in pairs)
            }
            typed = {k: type(options[k.replace("_", "-")].default)(v) for k, v in given.items()}
            baselines.Config(method=method, **typed)
    assert {*tables.COMPARED, "fisher", "magnitude", "random"} == set(baselines.METHODS)


def test_make_names_the_runs_of_every_table_without_data(checkout):
    for scale in ("paper", "small"):
        for target in TARGETS:
            runs, text = planned(checkout, target, f"SCALE={scale}")
            assert runs and all("--seed" in line and "--checkpoint" in line for line in runs.values())
            where = "precision" if target == "precision" else scale
            assert f"-m experiments.report {target.removeprefix('reproduce-')} --jobs 1" in text
            assert all(f"--out results/{where}/" in line for line in runs.values())


def test_the_runs_at_the_papers_protocol(checkout):
    runs, _ = planned(checkout, "-j2", "reproduce-table1", "IMAGENET=/imagenet")
    assert len(runs) == 3 * 9 * 3 and "results/paper/cifar100/fire-3.json" in runs
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
    files = {t: set(planned(checkout, t)[0]) for t in TARGETS if t != "precision"}
    same = {
        f"results/paper/cifar10/{m}+mega-batches=4-{s}.json"
        for m in ("warm-start", "lure")
        for s in (1, 2, 3)
    }
    for target in ("reproduce-table6", "reproduce-table8", "reproduce-table9", "where-from", "cost"):
        assert same <= files[target]
    assert "results/paper/cifar10/lure-1.json" in files["reproduce-table1"] & files["reproduce-table7"]
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
    folder = tmp_path / "results" / "small" / "cifar10-jpeg"
    folder.mkdir(parents=True)
    for name in ("lure-1.json", "lure-1.attack.json", "lure-2.json"):
        (folder / name).touch()
    text = tables.rules(tables.arguments(words)).replace("$(equals)", "=")
    rule = {line.split(":")[0]: line for line in text.splitlines() if ": | " in line}
    noisy = [
        f"lure+mega-batches=4+limit=1136{noise}" for noise in ("", "+label-noise=0.2", "+label-noise=0.4")
    ]
    missing = {f"{row}-{seed}.json" for row in noisy for seed in (1, 2)} | {"lure-2.attack.json"}
    assert {Path(path).name for path in rule["all"].split()[2:]} == missing
    assert {Path(path).name for path in rule if path.endswith(".json")} == missing
    assert rule[f"{folder.relative_to(tmp_path)}/lure-2.attack.json"].endswith("/lure-2.pt")
    assert "OMP_NUM_THREADS=1 " in text and "evaluate.py --attack results/small" in text
    asked = tables.arguments([*words, "--incomplete"])
    assert "\nall: | \n" in tables.rules(asked)  # to render what is there, nothing is run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["table1", "--scale", "large"], "SCALE: expected"),
        (["table10"], "table10: SCALE=paper does not have it"),
    ],
)
def test_what_there_is_no_table_of_is_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as refusal:
        tables.arguments(words)
    error = capsys.readouterr().err
    assert refusal.value.code == 2 and error.startswith(told) and error.count("\n") == 1


def test_the_small_scale_and_what_narrows_a_table(checkout):
    runs, _ = planned(checkout, "reproduce-table1", "SCALE=small", "DATA=photos/cifar10-jpeg")
    assert len(runs) == 10 * 3 and "results/small/cifar10-jpeg/warm-start+gamma=1-2.json" in runs
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
    assert '--out "results/bench"' in make(checkout, "-n", "bench").stdout
    cores = os.cpu_count()
    for jobs in (1, cores):  # the threads are divided
        text = planned(checkout, f"-j{jobs}", "reproduce-table3", "SEEDS=1")[1]
        assert f"OMP_NUM_THREADS={cores // jobs} " in text


def test_the_narrow_scale_runs_the_papers_protocol_with_a_narrow_network(checkout):
    def rows(target, *words):
        runs, _ = planned(checkout, target, "SCALE=narrow", "DATA=photos/cifar10-jpeg", *words)
        protocol = "--dataset folder --data photos/cifar10-jpeg --arch small --precision float32 --method "
        assert all(protocol in line for line in runs.values())
        assert {"--limit", "--epochs", "--mega-batches"} & set(" ".join(runs.values()).split()) == set()
        seeds = [re.fullmatch(r"results/narrow/cifar10-jpeg/(.*)-(\d).json", file).groups() for file in runs]
        each = [name for name, seed in seeds if seed == "1"]
        assert seeds == [(name, seed) for seed in "123" for name in each]
        return [name.replace("+replay=none", "") for name in each]

    six = ["warm-start", "warm-start+gamma=1", "lure", "llf", "sp", "scratch"]
    table3 = [*six, "lure+gamma=1", "random", "rifle", "dash", "fire"]
    assert rows("reproduce-table3") == table3
    assert rows("reproduce-table1") == ["warm-start", "lure", "warm-start+gamma=1", "scratch"]
    assert rows("reproduce-table2") == [f"{name}+replay=buffer" for name in six]
    assert rows("where-from") == ["warm-start", "warm-start+gamma=1", "lure", "lure+gamma=1"]
    for target in ("forgetting", *(f"reproduce-figure{i}" for i in (2, 3, 4, 5))):
        assert rows(target) == table3
    first, _ = planned(checkout, "reproduce-table3", "SCALE=narrow", "METHODS=warm-start+gamma=1", "SEEDS=2")
    assert [*first] == ["results/narrow/DATA/warm-start+gamma=1+replay=none-2.json"]
    assert len(planned(checkout, "reproduce", "SCALE=narrow", "DATA=x")[0]) == 33 + 12 + 18


def test_make_reports_shows_what_is_there_and_starts_nothing(checkout):
    runs = checkout / "out" / "cifar10-jpeg"
    runs.mkdir(parents=True)
    shutil.copy(ROOT / "results" / "small" / "cifar10-jpeg" / "lure+replay=none-1.json", runs)
    words = ["reports", "SCALE=small", "OUT=out", "DATA=cifar10-jpeg"]
    done = make(checkout, *words)
    assert done.returncode == 0, done.stderr
    assert "Not measured: `warm-start+replay=none-1`, " in (checkout / "out" / "table3.md").read_text()
    assert "nothing has been measured yet for table4" in done.stdout
    assert sorted(path.name for path in (checkout / "out").glob("*.md")) == ["table3.md"]
    assert [path.name for path in runs.iterdir()] == ["lure+replay=none-1.json"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["reproduce-table2", "SCALE=small"], "DATA: expected DATA=<folder with train/<class>/ and"),
        (["reproduce-table5"], "IMAGENET: expected IMAGENET=<folder with train/ and val/>"),
        (["reproduce-figure2", "DATASETS=digits"], "CIFAR10C: expected CIFAR10C=<folder of CIFAR-10-C>"),
        (
            ["reproduce-table4", "SCALE=narrow"],
            "table4: SCALE=narrow does not have it, only table3",
        ),
        (["reproduce-table1", "SCALE=large"], "SCALE: expected paper, small or narrow"),
    ],
)
def test_make_without_what_it_needs_says_so(checkout, words, message):
    done = make(checkout, *words)
    assert done.returncode == 2 and message in done.stderr and not (checkout / "results" / "small").exists()


def test_the_papers_claims_are_about_runs_that_there_are():
    paper = json.loads((ROOT / "results" / "paper.json").read_text())
    options = {f.name for f in fields(baselines.Config)}
    for claim in paper["claims"]:
        assert claim["table"] in report.SUBJECTS and isinstance(claim["higher"], bool)
        for side in (claim["better"], claim["than"]):
            methods = side["method"] if isinstance(side["method"], list) else [side["method"]]
            assert set(methods) <= set(baselines.METHODS) and side.keys() <= options
    assert {name for name in report.SUBJECTS if name[-1].isdigit()} == {c["table"] for c in paper["claims"]}
    numbers = {"dataset", "test_acc", "std", "cer", "gap", "mca"}
    for printed in paper["tables"].values():
        assert all(
            row.keys() - numbers <= options and row["dataset"] in lure.DATASETS for row in printed["rows"]
        )


README = (ROOT / "README.md").read_text()


def test_the_snippets_of_the_readme_work_as_pasted(tmp_path):
    snippets = re.findall(r"(?s)```python\n(.*?)```", README)
    assert snippets
    for i, snippet in enumerate(snippets):
        (tmp_path / f"{i}.py").write_text(snippet)
        runpy.run_path(str(tmp_path / f"{i}.py"))


def test_reports_are_what_their_runs_say(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", {})  # without drawing
    monkeypatch.chdir(ROOT)
    there = {path for scale in ("small", "precision") for path in (ROOT / "results" / scale).glob("*.md")}
    for scale in ("small", "precision"):
        asked = tables.arguments(["all", "--scale", scale, "--data", "cifar10-jpeg"])
        for name in asked.tables:
            committed = ROOT / asked.out / f"{name}.md"
            runs = [(run.row, Path(run.path(asked.out))) for run in tables.planned(name, asked)]
            text = report.report(tmp_path / scale / f"{name}.md", runs)
            assert text == committed.read_text(), committed
            there.remove(committed)
    assert not there


def test_the_overview_and_the_readme_show_what_the_reports_say(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    overview = report.overview(tmp_path / "results")
    assert overview == (ROOT / "results" / "README.md").read_text()
    for path in re.findall(r"\]\(([^)]+)\)", overview):
        assert (ROOT / "results" / path).exists(), path
    claims = overview.split(report.CLAIMS)[1].split("\n\n")[0]
    assert claims and claims in README
    for name in ("small/table1.md", "precision/precision.md"):
        table = (ROOT / "results" / name).read_text().split(f"\n{report.CLAIMS}")[0].split("\n\n", 1)[1]
        assert table in README


def test_an_overview_of_nothing_is_refused(tmp_path):
    with pytest.raises(lure.DataError, match="found none"):
        report.overview(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_the_benchmarks_of_the_readme_are_what_the_results_say():
    results = re.findall(r"\((results/bench/[^)]+)\.md\)", README)
    assert results
    for result in results:
        text = bench.markdown(json.loads((ROOT / f"{result}.json").read_text()))
        assert text == (ROOT / f"{result}.md").read_text()
        assert text.split("\n\n")[1] in README


def test_the_numbers_in_the_prose_are_in_the_tables():
    prose = re.search(r"(?s)What it shows.*?:\n(.*?)\nThe paper's claims", README)[1]
    tables = " ".join(path.read_text() for path in (ROOT / "results").glob("*/*.md"))
    numbers = re.findall(r"\d+\.\d+", prose)
    assert numbers and all(re.search(rf"(?<![\d.]){re.escape(n)}(?![\d.])", tables) for n in numbers)


@pytest.mark.parametrize("size, taps", [(8, 1), (16, 9), (32, 9)])
def test_the_kernel_taps_that_meet_data_are_as_the_readme_says(size, taps):
    generator = torch.Generator().manual_seed(0)
    model = lure.build_model("small", 10, generator=generator)
    images, labels = torch.rand(64, 3, size, size, generator=generator), torch.arange(64) % 10
    scores = lure.connection_sensitivity(model, images, labels)
    assert int((scores["layer4.1.conv2.weight"].sum(dim=(0, 1)) > 0).sum()) == taps
    zeros = torch.cat([s.flatten() == 0 for s in scores.values()]).double().mean()
    assert size > 8 or zeros > 0.2


def test_what_the_readme_names_is_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z0-9-]+):.*  ## ", (ROOT / "Makefile").read_text(), re.M) + TARGETS
    assert set(re.findall(r"`make ([a-z][a-z0-9-]*)", README)) <= set(targets)
    options = {"--" + f.name.replace("_", "-") for f in fields(baselines.Config)}
    options |= {"--corruptions", "--attack", "--epsilons", "--sigmas", "--help"}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= options
