"""The README, the committed results, and lure.py by itself."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, seeded

import baselines
import experiments
import lure
from experiments import bench, bench_tables, report, runs, tables
from experiments.data import LOADERS


def test_importing_prints_and_changes_nothing():
    script = (
        "import random, torch; torch.manual_seed(1); a = torch.get_rng_state(); n = torch.get_num_threads()\n"
        "import lure, baselines, evaluate, experiments.bench, experiments.report\n"
        "assert torch.equal(torch.get_rng_state(), a) and torch.get_num_threads() == n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lure_runs_alone(tmp_path):
    (folder := tmp_path / "checkout").mkdir()  # as coverage knows it
    shutil.copy(ROOT / "lure.py", folder)
    command = [sys.executable, "lure.py", "--dataset", "digits", "--mega-batches", "2", "--epochs", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "test_accuracy" in json.loads(done.stdout.splitlines()[-1]), done.stderr


USES = {
    "baselines.py": """
        import torch, lure, baselines
        pi = torch.rand(8, 4), torch.arange(8) % 3
        model = torch.nn.Linear(4, 3)
        between = lure.Between(pi, lambda: torch.nn.Linear(4, 3), torch.Generator(), None, None)
        for name in ("sp", "fire", "random", "fisher", "released"):
            baselines.METHODS[name](model, between)
        """,
    "evaluate.py": """
        import torch, evaluate
        images, labels = torch.rand(8, 3, 4, 4), torch.arange(8) % 3
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        evaluate.accuracy(model, evaluate.pgd_attack(model, images, labels, 0.1), labels)
        evaluate.weight_noise_accuracy(model, images, labels, [0.1])
        evaluate.reliability_bins(evaluate.predict(model, images).softmax(1), labels)
        """,
}


@pytest.mark.parametrize("name", USES)
def test_methods_and_metrics_need_lure_alone(name, tmp_path):
    for file in (name, "lure.py"):
        shutil.copy(ROOT / file, tmp_path)
    script = textwrap.dedent(USES[name])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / name).read_text(), re.M))
    assert imported - sys.stdlib_module_names <= {"torch", "numpy", "tqdm", "lure"}


def test_a_room_uses_only_what_is_below_its_floor():
    floors = re.findall(r"(?m)^    (.*)$", experiments.__doc__)
    rooms = [floor[:44].split() for floor in floors]  # what it says of them stands further right
    height = {room: -i for i, names in enumerate(rooms) for room in names}
    files = {path.stem: path for path in (ROOT / "experiments").glob("[!_]*.py")}
    files |= {name: ROOT / f"{name}.py" for name in ("lure", "baselines", "evaluate")}
    assert height.keys() == files.keys()
    for room, path in files.items():
        lines = re.findall(r"(?m)^(?:from|import) .*", path.read_text())
        used = {word for line in lines for word in re.findall(r"\w+", line.replace("experiments.", ""))}
        assert all(height[other] < height[room] for other in used & height.keys()), path


def test_tables_know_the_data_sets_that_have_a_name():
    assert {*tables.KNOWN, "folder"} == LOADERS.keys()


def requirements(text):
    return {line.strip() for line in text.splitlines() if re.match(r"\s*[a-z]", line)}


def test_the_script_block_is_what_the_requirements_say():
    block = re.search(r"(?s)^# /// script\n(.*?)^# ///$", (ROOT / "lure.py").read_text(), re.M)[1]
    needed = set(re.findall(r'"([a-z-]+>=[\d.]+)"', block))
    assert needed and needed <= requirements((ROOT / "requirements.txt").read_text())
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / "lure.py").read_text(), re.M))
    third = imported - sys.stdlib_module_names
    assert third == {name.split(">")[0].replace("scikit-learn", "sklearn") for name in needed}


def test_the_papers_claims_are_about_runs_that_there_are():
    paper = json.loads((ROOT / "results" / "paper.json").read_text())
    options = {f.name for f in fields(runs.Config)}
    for claim in paper["claims"]:
        assert claim["table"] in report.SUBJECTS and isinstance(claim["higher"], bool)
        for side in (claim["better"], claim["than"]):
            methods = side["method"] if isinstance(side["method"], list) else [side["method"]]
            assert set(methods) <= set(baselines.METHODS) and side.keys() <= options
    numbered = {name for name in report.SUBJECTS if name[-1].isdigit()}
    assert numbered | {"where-from", "generations"} == {c["table"] for c in paper["claims"]}
    numbers = {"dataset", "test_acc", "std", "cer", "gap", "mca"}
    for printed in paper["tables"].values():
        assert all(row.keys() - numbers <= options and row["dataset"] in LOADERS for row in printed["rows"])


README = (ROOT / "README.md").read_text()


def test_the_snippets_of_the_readme_work_as_pasted(tmp_path, monkeypatch):
    monkeypatch.setitem(baselines.METHODS, "halve", None)  # which one of them adds, for this test alone
    snippets = re.findall(r"(?s)```python\n(.*?)```", README)
    assert snippets
    for i, snippet in enumerate(snippets):
        (tmp_path / f"{i}.py").write_text(snippet)
        runpy.run_path(str(tmp_path / f"{i}.py"))


def test_reports_are_what_their_runs_say(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", {})  # without drawing
    monkeypatch.chdir(ROOT)
    there = {path for scale in report.SHOWN for path in (ROOT / "results" / scale).glob("*.md")}
    for scale in report.SHOWN:
        asked = tables.arguments(["all", "--scale", scale, "--data", "cifar10-jpeg", "--incomplete"])
        for name in asked.tables:
            committed = ROOT / asked.out / f"{name}.md"
            if not committed.exists():  # it has not been measured yet
                continue
            runs = [(run.row, Path(run.path(asked.out))) for run in tables.planned(name, asked)]
            text = report.report(tmp_path / scale / f"{name}.md", runs, scale, incomplete=True)
            assert text == committed.read_text(), committed
            there.remove(committed)
    assert not there


def test_the_overview_shows_what_the_reports_say(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    overview = report.overview(tmp_path / "results")
    assert overview == (ROOT / "results" / "README.md").read_text()
    for path in re.findall(r"\]\((?!https:)([^)]+)\)", overview):
        assert (ROOT / "results" / path).exists(), path


def rows_of(text):
    """The cells of the first table in a text, by row: its head, a line, then the others."""
    table = text[text.index("| Method |") :].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.split("\n")]


MEASURED = README.split("\n## What we measured\n")[1].split("\n## ")[0]


def test_the_table_of_the_readme_is_the_reports():
    shown, full = (rows_of(text) for text in (MEASURED, (ROOT / "results/narrow/table3.md").read_text()))
    columns = [full[0].index(title) for title in shown[0]]
    picked = [[row[i] for i in columns] for row in full[2:]]
    assert len(columns) > 5 and len(shown) > 5 and all(row in picked for row in shown[2:])


# Where the numbers of a paragraph stand: in the lines of a report that begin so.
SOURCES = {
    "1. **Under one schedule": [("table3", "| LURE | 0.1 | last |")],
    "2. **The schedule alone": [("where-from", ""), ("table3", "| Warm start |"), ("table3", "| LURE |")],
    "The figure shows": [("forgetting", "| LURE | 0.1 | last |")],
    "The paper's largest gain": [("table3", "| Warm start |"), ("table3", "| LURE |")],
    "‡ The paper's baseline": [("table3", "| Warm start |")],
}


def decimals(text):
    return {number.lstrip("+-") for number in re.findall(r"[-+]?\d+\.\d+", text)}


def test_the_numbers_in_the_prose_of_the_readme_are_in_the_reports():
    prose = re.sub(r"\(http[^)]*\)", "", MEASURED)
    paragraphs = re.split(r"\n\n|\n(?=\d\. )", prose)
    told = [text for text in paragraphs if "|" not in text and decimals(text)]
    assert len(told) == len(SOURCES)
    for text in told:
        (sources,) = [found for start, found in SOURCES.items() if text.strip().startswith(start)]
        there = set()
        for report_name, start in sources:
            lines = (ROOT / "results/narrow" / f"{report_name}.md").read_text().splitlines()
            there |= decimals(" ".join(line for line in lines if line.startswith(start)))
        assert decimals(text) <= there, text


def hours_of(*words):
    """How long each run of a call took, of those that are there."""
    asked = tables.arguments([*words, "--data=cifar10-jpeg", "--incomplete"])
    paths = {Path(run.path(asked.out)) for name in asked.tables for run in tables.planned(name, asked)}
    return [runs.read_record(path)["totals"]["seconds"] / 3600 for path in paths if path.exists()]


def test_the_hours_in_the_readme_are_those_of_the_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = " ".join(README.split())
    narrow = hours_of("table3", "--scale=narrow")
    assert f"Without replay a run took {min(narrow):.1f} to {max(narrow):.1f} hours" in text
    small = [name for name in tables.SMALL if name != "generations"]
    together = sum(hours_of(*small, "--scale=small"))
    assert f"all of its runs took {together:.1f} hours" in text
    assert f"`make generations` {sum(hours_of('generations', '--scale=small')):.1f} hours more" in text


def test_table_3_has_the_largest_gain_on_cifar10_of_the_papers_tables():
    gains = {}
    for name, printed in json.loads((ROOT / "results/paper.json").read_text())["tables"].items():
        rows = [row for row in printed["rows"] if row["dataset"] == "cifar10" and name.startswith("table")]
        accuracy = {
            (row["method"], *(row.get(k) for k in ("mega_batches", "arch", "label_noise"))): row["test_acc"]
            for row in rows
        }
        lure_rows = [key for key in accuracy if key[0] == "lure" and ("warm-start", *key[1:]) in accuracy]
        gains |= {(name, key): accuracy[key] - accuracy[("warm-start", *key[1:])] for key in lure_rows}
    assert len(gains) > 10 and max(gains, key=gains.get)[0] == "table3"


def test_the_benchmark_of_the_readme_is_what_its_record_says():
    (name,) = re.findall(r"\((results/bench/[^)]+)\.md\)", README)
    result = json.loads((ROOT / f"{name}.json").read_text())
    assert bench.markdown(result) == (ROOT / f"{name}.md").read_text()
    assert not any(map(bench_tables.disturbed, result["loops"]))
    for precision in ("bfloat16", "float32"):
        loop = result["loops"][0]["loops"][precision]
        ratio = f"{loop['ratio']:.2f} times ({loop['ratio_low']:.2f} to {loop['ratio_high']:.2f})"
        assert ratio in " ".join(README.split())


@pytest.mark.parametrize("size, taps", [(8, 1), (16, 9), (32, 9)])
def test_at_8_by_8_pixels_most_taps_of_the_last_kernels_would_meet_no_data(size, taps):
    images, labels = torch.rand(64, 3, size, size, generator=seeded(0)), torch.arange(64) % 10
    none, classes = torch.empty(0, size, size, 3), list("0123456789")
    model = lure.build_model("small", lure.Dataset(none, labels, none, labels, classes), seeded(0))
    scores = lure.connection_sensitivity(model, images, labels)
    assert int((scores["layer4.1.conv2.weight"].sum(dim=(0, 1)) > 0).sum()) == taps
    zeros = torch.cat([s.flatten() == 0 for s in scores.values()]).double().mean()
    assert size > 8 or zeros > 0.2


def test_what_the_readme_names_is_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z0-9-]+):.*  ## ", (ROOT / "Makefile").read_text(), re.M)
    targets += [f"reproduce-{name}" for name in tables.PAPERS]
    assert set(re.findall(r"`make ([a-z][a-z0-9-]*)", README)) <= set(targets)
    options = {"--" + f.name.replace("_", "-") for f in fields(runs.Config)}
    options |= {"--corruptions", "--attack", "--epsilons", "--sigmas", "--help"}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= options
