"""Reports: records put together to rows, tables beside the paper's, figures, claims, the overview."""

import json
import math
import re
import shutil

import pytest
from conftest import ROOT, SMALL
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import baselines
import evaluate
import lure
from experiments import figures, report, tables
from experiments.claims import decided, primary, verdict
from experiments.data import DataError
from experiments.differences import interval, paired_p, pooled_p, spread, warm_start_of, with_interval
from experiments.figures import FIGURES
from experiments.rows import MEASURED, NAMES, Row, load_rows


def runs_of(paths):
    """The runs in these files, or in these folders: for each its row and its file."""
    paths = [p for path in paths for p in (sorted(path.glob("*-*.json")) if path.is_dir() else [path])]
    paths = [path for path in paths if not path.name.endswith(tuple(MEASURED))]
    return [(path.stem.rpartition("-")[0].replace("+", " "), path) for path in paths]


@pytest.fixture(scope="module")
def measured_folder(folder, tmp_path_factory):
    """The same runs, those of two methods with metrics and attacks."""
    measured = shutil.copytree(folder, tmp_path_factory.mktemp("measured") / "digits")
    for name in ("warm-start-1.pt", "warm-start-2.pt", "lure-1.pt", "lure-2.pt"):
        checkpoint = str(measured / name)
        assert evaluate.main([checkpoint]) == evaluate.main([checkpoint, "--attack"]) == 0
    return measured


def render(out, paths, incomplete=False):
    return report.report(out, runs_of(paths), out.resolve().parent.name, incomplete)


def copy(folder, tmp_path, name="digits"):
    (tmp_path / name).mkdir(parents=True)
    for path in folder.glob("*-?.json"):
        (tmp_path / name / path.name).write_bytes(path.read_bytes())
    return tmp_path / name


def change(path, name=None, totals=None, **options):
    """Change a record's options and totals; under another name, beside it."""
    record = json.loads(path.read_text())
    record["config"] |= options
    record["totals"] |= totals or {}
    (path.with_name(name) if name else path).write_text(json.dumps(record))


def measured(path, accuracies):
    """Let a run have measured these test accuracies, one for each mega-batch, of 100 images."""
    record = json.loads(path.read_text())
    rows = record["mega_batches"][: len(accuracies)]
    for row, accuracy in zip(rows, accuracies, strict=True):
        row["test"] |= dict(accuracy=accuracy, errors=100 - accuracy)
    record |= dict(mega_batches=rows, totals=lure.totals(rows))
    path.write_text(json.dumps(record))


def rows_of(text):
    """The cells of a report's table; its claims are left out."""
    lines = [line for line in text.split(report.CLAIMS)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.numerics
def test_report_of_runs(folder, tmp_path):
    runs, out = copy(folder, tmp_path), tmp_path / "demo.md"
    names = [f"{row}-{seed}.json" for seed in "12" for row in ("warm-start", "warm-start+gamma=1", "lure")]
    for name, accuracy in zip(names, (50, 51, 51, 52, 51, 56), strict=True):
        measured(runs / name, [40, accuracy])
    text = render(out, [runs / name for name in names])
    head, _, *rows = rows_of(text)
    assert head[:4] == ["Method", "gamma", "Seeds", "Test accuracy, %"] and "paper" not in head
    assert [row[:3] for row in rows] == [
        ["Warm start", "0.1", "2 †"],
        ["Warm start", "1", "2 †"],
        ["LURE", "0.1", "2 †"],
    ]
    assert [row[3] for row in rows] == ["51.00 ± 1.41", "51.00", "53.50 ± 3.54"]
    # Of two differences, 1 and 4: t of one degree of freedom is 12.71, their deviation over √2 is 1.5.
    assert [row[4] for row in rows] == ["–", "+0.00 [-12.71, +12.71]", "+2.50 [-16.56, +21.56]"]
    # Over the stream of two mega-batches, the first of which has 40 in all runs.
    assert [row[5] for row in rows] == ["45.50 ± 0.71", "45.50", "46.75 ± 1.77"]
    assert [row[7] for row in rows] == ["109 ± 1", "109", "106 ± 4"]  # CER
    assert out.read_text() == text
    assert (tmp_path / "demo-digits.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_folder_takes_all_its_runs(folder, tmp_path):
    runs = copy(folder, tmp_path)
    assert len(rows_of(render(tmp_path / "table.md", [runs]))) == 2 + 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "table.md"]  # no figure goes with it


def test_report_stands_beside_the_paper(folder, tmp_path):
    runs = copy(folder, tmp_path, "small/cifar10-like")
    files, out = sorted(runs.glob("*.json")), tmp_path / "small" / "table1.md"
    printed = [row[0] for row in rows_of(render(out, [runs])) if row[2] == "–"]
    assert printed == ["Warm start", "LLF", "S&P", "LURE"]  # ours, of two mega-batches, are not in the paper
    for path in files:
        change(path, mega_batches=8)
    toy = [row[0] for row in rows_of(render(out, [runs])) if row[2] == "–"]
    assert toy == printed  # nor do they stand beside runs of a part of the images
    for path in files:
        change(path, limit=0, limit_test=0)
    head, _, *rows = rows_of(render(out, [runs]))  # in the order of the names, so gamma=1 comes first
    where = [i for i, title in enumerate(head) if title == "paper"]
    by_name = {(row[0], row[1]): [row[i] for i in where] for row in rows}
    # CER is a count, of other test images here; where nothing of ours stands beside it, it is shown
    assert by_name["LURE", "0.1"] == ["93.32", "–", "6.60"]
    assert by_name["Warm start", "0.1"] == ["89.47 ‡", "–", "8.98 ‡"]
    assert "‡ The paper's baseline. The authors' code trains it without the decay" in out.read_text()
    assert by_name["Warm start", "1"] == ["–", "–", "–"]  # a number of the paper's stands there once
    assert by_name["LLF", "–"] == ["91.43", "10103", "7.22"]
    assert "| small, cifar10-like |" in out.read_text() and "| not decided |" in out.read_text()
    for path in files:
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"data": record["data"] | {"test": 10_000}}))
    assert "| 9622 |" in render(out, [runs])


@pytest.mark.parametrize(
    "name, rows",
    [
        ("figure6", ["warm-start", "warm-start+lr=0.5", "lure", "lure+lr=0.5+weight-decay=0.01"]),
        ("cost", ["warm-start", "warm-start+epochs=5", "lure", "lure+epochs=5"]),
        ("where-from", ["warm-start+select=best-val", "lure+keep-momentum"]),
    ],
)
def test_reports_whose_rows_differ_by_options(folder, tmp_path, name, rows):
    runs = copy(folder, tmp_path)
    for row in rows:
        method, *pairs = row.split("+")
        options = {k.replace("-", "_"): v for k, _, v in (pair.partition("=") for pair in pairs)}
        options = {k: True if v == "" else v if k == "select" else float(v) for k, v in options.items()}
        for seed in (1, 2):
            change(runs / f"{method}-{seed}.json", f"{row}-{seed}.json", **options)
    files = [runs / f"{row}-{seed}.json" for row in rows for seed in (1, 2)]
    found = rows_of(render(tmp_path / f"{name}.md", files))[2:]
    assert len(found) == len(rows) and (tmp_path / f"{name}-digits.png").exists() == (name in FIGURES)
    for cells, row in zip(found, rows, strict=True):
        method, *pairs = row.split("+")
        values = {pair.partition("=")[2] or "True" for pair in pairs}
        assert cells[0] == NAMES[method] and values <= set(cells[1:4])


def test_figures_of_what_metrics_measured(measured_folder, tmp_path):
    runs = copy(measured_folder, tmp_path, "digits")
    files = [runs / f"{method}-{seed}.json" for method in ("warm-start", "lure") for seed in (1, 2)]
    names = ("figure2", "figure3", "figure4", "figure5")
    for name in names:
        with pytest.raises(DataError, match=r"warm-start-1.json: expected what evaluate.py measures"):
            render(tmp_path / f"{name}.md", files)
    for path in files:
        for ending in (".metrics.json", ".attack.json"):
            shutil.copy(measured_folder / f"{path.stem}{ending}", runs)
        measured = json.loads(path.with_suffix(".metrics.json").read_text())
        shade = 30.0 + int(path.stem[-1])  # the colour that CIFAR-10-C has, digits have not
        corruptions = {name: [shade] * 5 for name in evaluate.CORRUPTIONS} | {"mean": shade}
        measured |= {"corruptions": corruptions, "images_per_severity": 7}
        path.with_suffix(".corruptions.json").write_text(json.dumps(measured))
    more, rows = [runs / "lure+label-noise=0.2+mega-batches=4-3.json"], {}  # the other half of figure 3
    change(runs / "lure-1.json", more[0].name, seed=3, label_noise=0.2, mega_batches=4)
    for name in names:
        text = render(tmp_path / f"{name}.md", files + more * (name == "figure3"))
        rows[name] = rows_of(text)
        assert [row[0] for row in rows[name]][2:4] == ["Warm start", "LURE"]
        assert (tmp_path / f"{name}-digits.png").stat().st_size > 10_000
        assert "| The paper's claim |" in text
        assert "small, 2 mega-batches" in text and "label-noise" not in rows[name][0]  # what the shown have
    assert rows["figure2"][3][1:3] == ["2 †", "31.50 ± 0.71"] and "7 images of CIFAR-10-C" in render(
        tmp_path / "figure2.md", files
    )
    of = [json.loads((runs / f"lure-{seed}.metrics.json").read_text()) for seed in (1, 2)]
    ece, attack, clean, noisy = (
        [m["ece"] for m in of],
        [json.loads((runs / f"lure-{seed}.attack.json").read_text())["pgd"]["2/255"] for seed in (1, 2)],
        [m["weight_noise"]["0"] for m in of],
        [m["weight_noise"]["0.01"] for m in of],
    )
    assert rows["figure4"][3][2] == spread(ece)
    head, cells = rows["figure3"][0], rows["figure3"][3]
    assert cells[head.index("At ε = 2/255, %")] == spread(attack)
    head, cells = rows["figure5"][0], rows["figure5"][3]
    drop = [a - b for a, b in zip(clean, noisy, strict=True)]
    assert cells[head.index("Without noise, %")] == spread(clean)
    assert cells[head.index("Drop at σ = 0.01, points")] == spread(drop)
    published = [{"dataset": "cifar10", "method": "lure", "label_noise": 0.2, "test_acc": 86.79}]
    shown, others = load_rows(runs_of(files)), load_rows(runs_of(more))
    gain = published[0] | {"label_noise": 0}
    for draw, printed in (
        (
            figures.corruptions,
            [gain | {"method": m, "mca": a} for m, a in (("warm-start", 68), ("lure", 74))],
        ),
        (figures.attack_and_noise, published),
    ):
        draw(figure := Figure(), shown, printed, others)
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        texts = [text.get_text() for legend in legends for text in legend.get_texts()]
        assert any("in the paper" in text for text in texts), texts
        if draw is figures.corruptions:
            (axes,) = figure.axes
            ours, star = [line for line in axes.get_lines() if len(line.get_xdata()) in (1, 20)]
            assert star.get_ydata() == 74 - 68
            assert [*ours.get_ydata()] == [0] * 20  # both have the colour that was put there


def test_in_records_of_the_first_format_ece_is_a_fraction(folder, tmp_path):
    runs = copy(folder, tmp_path)
    newer = json.loads((runs / "lure-1.json").read_text())
    older = json.loads((runs / "lure-2.json").read_text())
    assert newer["format"] == 2 and newer["totals"]["ece"] > 1
    older["totals"]["ece"] /= 100
    (runs / "lure-2.json").write_text(json.dumps(older | {"format": 1}))
    (row,) = [row for row in load_rows(runs_of([runs])) if row.label == "LURE"]
    assert row.values("totals", "ece") == pytest.approx(
        [newer["totals"]["ece"], 100 * older["totals"]["ece"]]
    )
    evaluated = dict(newer, ece=0.25)  # what evaluate.py wrote
    for form, expected in (({"format": 2}, 0.25), ({}, 25)):
        measured = {key: value for key, value in evaluated.items() if key != "format"} | form
        (runs / "lure-1.metrics.json").write_text(json.dumps(measured))
        (row,) = [row for row in load_rows(runs_of([runs])) if row.label == "LURE"]
        assert row.values("ece") == [expected]


def test_the_measurements_of_another_run_are_refused(measured_folder, tmp_path):
    runs = copy(measured_folder, tmp_path)
    shutil.copy(measured_folder / "lure-2.metrics.json", runs / "lure-1.metrics.json")
    with pytest.raises(DataError, match=r"lure-1.metrics.json: .*it is of another run"):
        render(tmp_path / "table.md", [runs])


def test_report_refuses_what_cannot_be_compared(folder, tmp_path):
    def refused(name, *words):
        out = tmp_path / name / "table.md"
        with pytest.raises(DataError) as refusal:
            render(out, [tmp_path / name])
        assert all(word in str(refusal.value) for word in words) and not out.exists()

    change(copy(folder, tmp_path, "a") / "lure-2.json", epochs=7)
    refused("a", "cannot be compared: epochs is", "7")
    change(copy(folder, tmp_path, "c") / "warm-start+gamma=1-2.json", gamma=0.5)
    refused("c", "warm-start+gamma=1-2.json", "it is of gamma 0.5")
    path = copy(folder, tmp_path, "d") / "warm-start+gamma=1-1.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"data": record["data"] | {"sha256": "0"}}))
    refused("d", "data is")
    path = copy(folder, tmp_path, "h") / "lure-2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "float16"}))
    refused("h", "precision is", "float16")
    path = copy(folder, tmp_path, "m") / "lure-2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"keep": 0.5}}))
    refused("m", "cannot be compared: the settings of lure are {'keep': 0.5}, {'keep': 0.8} in lure-1.json")
    (copy(folder, tmp_path, "e") / "lure-3.json").write_text("{")
    refused("e", "lure-3.json: expected the record of a run of lure")
    path = copy(folder, tmp_path, "f") / "lure-1.json"
    path.rename(path.with_name("sp-1.json"))
    refused("f", "sp-1.json", "it is of method lure")
    (copy(folder, tmp_path, "k") / "lure-1.metrics.json").write_text("{")
    refused("k", "lure-1.metrics.json: expected")
    runs = copy(folder, tmp_path, "l")
    (runs / "lure+keep=0.8-1.json").write_bytes((runs / "lure-1.json").read_bytes())
    refused("l", "expected one run of each kind", "lure-1.json")
    (tmp_path / "g").mkdir()
    refused("g", "expected records of runs")


def row(method, accuracies, **options):
    """A row of a table with these accuracies, of seeds 1, 2, 3 and so on."""
    records = [
        {"config": {"method": method, "seed": i, **options}, "totals": {"test_accuracy": a, "cer": 10 * a}}
        for i, a in enumerate(accuracies, start=1)
    ]
    return Row(method, options, options, records, options)


ACCURACY = {"metrics": [["totals", "test_accuracy"]], "higher": True}


LURE, WARM = {"method": "lure"}, {"method": "warm-start"}


@pytest.mark.parametrize(
    "lure_, higher, word",
    [
        ([51, 52.1, 53.2], True, "held"),
        ([51, 52.1, 53.2], False, "not held"),
        ([49, 50.1, 51.2], True, "not held"),
        ([51, 52, 50], True, "not decided"),
        ([51, 52.1], True, "not decided"),  # of two seeds only
        ([51], True, "not decided"),
    ],
)
def test_a_claim_is_decided_by_its_interval_alone(lure_, higher, word):
    rows = [row("warm-start", [50, 51, 52]), row("lure", lure_)]
    claim = ACCURACY | {"better": LURE, "than": WARM, "higher": higher}
    assert verdict(claim, rows)[1] == word


def test_a_claim_of_several_rows_compares_what_belongs_together():
    rows = [row("warm-start", [50, 50, 50], t=10), row("lure", [52, 52, 52.1], t=10)]
    rows += [row("warm-start", [60, 60, 60], t=20), row("lure", [61, 61, 61.1], t=20)]
    claim = ACCURACY | {"better": LURE, "than": WARM}
    text, word, intervals = verdict(claim, rows)
    assert (
        intervals == 2
        and word == "held"
        and text == "t 10: +2.03 [+1.89, +2.18]<br>t 20: +1.03 [+0.89, +1.18]"
    )
    rows[-1] = row("lure", [60, 61, 59], t=20)
    assert verdict(claim, rows)[1] == "not decided"
    rows[-1] = row("lure", [55, 55.1, 55], t=20)
    assert verdict(claim, rows)[1] == "not held"
    only = claim | {"better": LURE | {"t": [10]}, "than": WARM | {"t": [10]}}
    assert verdict(only, rows)[0] == "+2.03 [+1.89, +2.18]"
    best = ACCURACY | {"better": LURE | {"t": 10}, "than": LURE | {"t": [20]}}  # as that of Table 7
    assert verdict(best, rows)[0].startswith("-3.0")
    assert verdict(claim | {"than": {"method": "sp"}}, rows) is None
    several = [row("warm-start", [50, 50, 50]), row("lure", [52, 52, 52.1]), row("fisher", [49, 49, 49.1])]
    text, word, _ = verdict(ACCURACY | {"better": {"method": ["lure", "fisher"]}, "than": WARM}, several)
    assert word == "not held" and re.findall("([A-Za-z ]+):", text) == ["LURE", "LURE by Fisher"]


def test_one_interval_of_many_on_the_other_side_refutes_a_claim_only_if_it_would_by_bonferroni():
    def told(*lures):
        pairs = [(row("warm-start", [50, 50, 50], t=i), row("lure", x, t=i)) for i, x in enumerate(lures)]
        return verdict(ACCURACY | {"better": LURE, "than": WARM}, [r for pair in pairs for r in pair])[1:]

    slightly, clearly, above = [49.5, 49.7, 49.6], [49.5, 49.5, 49.51], [52, 52, 52.1]
    assert told(slightly) == ("not held", 1)
    assert told(*[above] * 9, slightly) == ("not decided", 10)
    assert told(*[above] * 9, clearly) == ("not held", 10)


def test_many_measures_of_the_same_rows_are_one_line():
    rows = [row("warm-start", [50, 50, 50]), row("lure", [52, 52, 52.1])]
    for r, signs in zip(rows, ([0] * 6, [1, 1, 1, 1, -1, 0]), strict=True):
        for i, record in enumerate(r.records):
            record["corruption"] = {f"c{j}": sign + 0.01 * i * bool(sign) for j, sign in enumerate(signs)}
    metrics = [["corruption", f"c{j}"] for j in range(6)]
    text, word, intervals = verdict({"better": LURE, "than": WARM, "metrics": metrics, "higher": True}, rows)
    assert text == "-0.99 to +1.01, 6 intervals, 4 on the claim's side, 1 on the other"
    assert (word, intervals) == ("not held", 5)  # the sixth does not differ


def test_a_claim_about_a_range_compares_the_widths_over_all_rows_of_a_method():
    rows = [row("lure", [50, 51, 52], lr=0.1), row("lure", [49, 50.1, 51], lr=0.2)]
    rows += [row("warm-start", [50, 51, 52], lr=0.1), row("warm-start", [40, 41, 42], lr=0.2)]
    rows += [row("warm-start", [45, 45, 45], lr=0.3)]
    claim = ACCURACY | {"better": LURE, "than": WARM, "higher": False, "range": True}
    assert verdict(claim, rows) == ("-9.03 [-9.18, -8.89]", "held", 1)
    assert verdict(claim | {"higher": True}, rows)[1] == "not held"
    assert verdict(claim, rows[1:]) is None  # of one row there is no range


def test_what_does_not_differ_at_all_has_no_say_in_a_claim():
    claim = {
        "better": LURE,
        "than": WARM,
        "higher": True,
        "metrics": [["totals", "cer"], ["totals", "floor"]],
    }
    rows = [row("warm-start", [50, 50, 50]), row("lure", [52, 52, 52.1])]
    for r in rows:
        for record in r.records:
            record["totals"]["floor"] = 0
    assert verdict(claim, rows)[1] == "held"
    assert verdict(claim | {"metrics": [["totals", "floor"]]}, rows)[1] == "not decided"


def test_what_warm_start_a_row_is_compared_with():
    plain, noisy = row("warm-start", [50]), row("warm-start", [40], label_noise=0.2)
    rows = [plain, noisy, row("lure", [41], label_noise=0.2, keep=0.9), row("lure", [52], keep=0.9)]
    found = [warm_start_of(r, rows) for r in rows]
    assert found[0] is None and found[1] is plain and found[2] is noisy and found[3] is plain
    assert warm_start_of(row("lure", [41], gamma=1), rows) is None  # that of gamma 1 is not there
    short, long = row("warm-start", [50], epochs=5), row("warm-start", [50])
    for r, passes in ((short, 5), (long, 10)):
        r.records[0]["totals"]["image_passes"] = passes
    assert warm_start_of(short, [short, long]) is None  # it has trained on fewer images


@pytest.mark.parametrize(
    "differences, word",
    [  # the half width is 4.30 or 6.21 times the deviation over √3, of the 95 and the 97.5 % interval
        ([0.1, 0.0, -0.1], "equivalent within ±0.5"),
        ([3.0, 3.1, 2.9], "different"),
        ([0.31, 0.3, 0.29], "different, by less than 0.5"),
        ([1.0, -1.0, 0.3], "undecided"),
        ([0.2, 0.1, 0.15, 0.15], "different, by less than 0.5"),
        ([-0.2, -0.1, -0.15, -0.15], "different, by less than 0.5"),
        ([0.0, 0.2, -0.2], "equivalent within ±0.5"),
        ([0.0, 0.21, -0.21], "undecided"),
        ([1.0, 1.6, 1.3], "different"),
        ([1.0, 1.9, 1.45], "undecided"),  # the 95 % interval would exclude 0
    ],
)
def test_the_verdict_reads_off_two_intervals(differences, word):
    assert decided(differences) == word
    low, high = interval(differences)
    assert ("equivalent" in word or "by less" in word) == (low > -0.5 and high < 0.5)
    low, high = interval(differences, 0.975)
    assert ("different" in word) == (low > 0 or high < 0)


def test_the_verdict_needs_three_seeds():
    for few in ([], [0.0], [0.1, 0.1]):
        with pytest.raises(ValueError, match="three"):
            decided(few)


def test_a_primary_comparison_is_decided_when_all_its_seeds_are_there_and_by_the_mean_over_the_stream():
    def told(table, dataset, mine, theirs):
        rows = [of_seeds("warm-start", theirs), of_seeds("lure", mine), of_seeds("lure", mine, gamma=1)]
        return primary(table, dataset, rows)

    def of_seeds(method, accuracy, **options):
        plain = row(method, [0] * len(accuracy), **options)
        for record, (seed, value) in zip(plain.records, accuracy.items(), strict=True):
            record["config"]["seed"] = seed
            record["totals"]["stream_accuracy"] = value
        return plain

    warm, better = {s: 70.0 + s for s in range(1, 8)}, {s: 73.0 + s + 0.1 * (s % 2) for s in range(1, 8)}
    lines = told("table3", "cifar10-jpeg", better, warm)
    assert [line[0] for line in lines] == [
        "seeds: 4, 5, 6, 7",
        "seen before the margin was named: 1, 2, 3",
        "all, as a description: 1, 2, 3, 4, 5, 6, 7",
    ]
    assert [line[-1] for line in lines] == ["different", "–", "–"] and lines[0][1].startswith("+3.05 [")
    fewer = {seed: a for seed, a in better.items() if seed != 6}
    assert [line[-1] for line in told("table3", "cifar10-jpeg", fewer, warm)] == [
        *("not complete: 3 of 4 seeds", "–"),
    ]
    assert told("table1", "cifar10-lossless", better, warm)[0][0] == "seeds: 1, 2, 3"
    assert told("table1", "cifar10-jpeg", better, warm) == []  # not a comparison that was named
    assert told("table1", "cifar10-lossless", {}, warm)[0][-1] == "not complete: 0 of 3 seeds"


def test_one_error_for_all_rows_is_that_of_the_two_way_layout():
    rows = [row("warm-start", [50, 51, 55]), row("lure", [52, 52, 56.5]), row("sp", [47, 49.5, 51])]
    # Residuals of rows and seeds by hand: means 52, 53.5, 49.17 and 49.67, 50.83, 54.17 of 51.56.
    table = [[50, 51, 55], [52, 52, 56.5], [47, 49.5, 51]]
    means, seeds = [sum(line) / 3 for line in table], [sum(column) / 3 for column in zip(*table, strict=True)]
    grand = sum(means) / 3
    squares = sum((table[i][j] - means[i] - seeds[j] + grand) ** 2 for i in range(3) for j in range(3))
    t = (means[1] - means[0]) / (2 * squares / 4 / 3) ** 0.5
    x = t / (t**2 + 4) ** 0.5  # of 4 degrees of freedom, Student's distribution is a polynomial of this
    expected = 1 - (1.5 * x - 0.5 * x**3)
    assert pooled_p(rows[1], rows[0], rows, "totals", "test_accuracy") == pytest.approx(expected)
    assert paired_p([1.0, 2.0]) == pytest.approx(2 * math.atan(1 / 3) / math.pi)  # t = 3 of Cauchy's
    assert (paired_p([0.0, 0.0]), paired_p([1.0, 1.0])) == (1.0, 0.0)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_interval_is_students(values):
    low, high = interval(values)
    n, mean = len(values), sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    quantile = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010][
        n - 2
    ]
    assert (low + high) / 2 == pytest.approx(mean, abs=1e-9)
    assert (high - low) / 2 == pytest.approx(quantile * deviation / n**0.5, rel=1e-4, abs=1e-9)


def test_overview_has_every_report_that_is_there(folder, tmp_path):
    runs = copy(folder, tmp_path / "small", "cifar10")
    for path in runs.glob("*.json"):
        change(path, mega_batches=8)
    for name in ("table8", "table1"):
        render(tmp_path / "small" / f"{name}.md", [runs / "lure-1.json", runs / "warm-start-1.json"])
    text = report.overview(tmp_path)
    assert text == (tmp_path / "README.md").read_text()
    assert (
        text.index("The paper's claims")
        < text.index("## Table 1: full replay (small)")
        < text.index("## Table 8")
    )
    assert text.count("CIFAR-10: small, 8 mega-batches") == 2 and text.count(report.CLAIMS) == 1
    assert "Full replay: LURE is more accurate" in text.split("## Table 1")[0]
    assert "](small/table1-cifar10.png)" in text


def test_an_overview_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="found none"):
        report.overview(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_methods_own_settings_are_in_its_name(tmp_path):
    out = tmp_path / "digits"
    for name, more in (("warm-start", []), ("sp+set=noise=0.1", ["--set", "noise=0.1"])):
        options = ["--method", name.split("+")[0], *more, "--out", f"{out}/{name}-1.json"]
        assert baselines.main([*SMALL, *options]) == 0
    assert "| S&P | ['noise=0.1'] |" in render(tmp_path / "table.md", [out])
    (out / "sp+set=noise=0.1-1.json").rename(out / "sp-1.json")
    with pytest.raises(DataError, match="set is"):
        render(tmp_path / "table.md", [out])


def test_forgetting_is_reported_around_each_forgetting_and_by_tensor(measured_folder, tmp_path):
    runs = copy(measured_folder, tmp_path)
    out = tmp_path / "forgetting.md"
    for seed in (1, 2):
        shutil.copy(measured_folder / f"lure-{seed}.metrics.json", runs)
    text = render(out, [runs / f"{m}-{s}.json" for m in ("warm-start", "lure") for s in (1, 2)])
    head, _, warm, ours, anew_head, _, anew_warm, anew_ours, shares_head, _, *shares = rows_of(text)
    rows = [json.loads((runs / f"lure-{s}.json").read_text())["mega_batches"] for s in (1, 2)]
    shown = [
        [r[0]["test"]["accuracy"] for r in rows],
        [r[0]["forgotten"]["accuracy"] for r in rows],
        [r[1]["test"]["accuracy"] for r in rows],
    ]
    assert head[2:4] + head[5:6] == ["Before, %", "Right after, %", "Relearned, %"]
    assert ours[2:4] + ours[5:6] == [spread(values) for values in shown]
    costs = [after - before for before, after in zip(shown[0], shown[1], strict=True)]
    assert head[4] == "Right after − before [95 %]" and ours[4] == with_interval(costs)
    assert head[7] == "Training accuracy then, %"
    assert ours[7] == spread([r[1]["train"]["accuracy"] for r in rows])
    assert warm[2] == warm[3]  # nothing was forgotten
    anew = [[r[0]["reestimated"][when]["accuracy"] for r in rows] for when in ("before", "after")]
    beside = [cell for pair in zip(shown[:2], anew, strict=True) for cell in map(spread, pair)]
    assert anew_head[0] == "With running statistics" and anew_warm[0] == "Warm start"
    assert anew_ours[:6] == ["LURE", "2", *beside]
    assert anew_ours[6] == with_interval([b - a for a, b in zip(*anew, strict=True)])
    assert shares_head == ["Redrawn of, %", "LURE"]
    by_tensor = [[100 * r[0]["redrawn_by_tensor"]["layer4.1.conv1.weight"] for r in rows]]
    assert ["layer4.1.conv1", *(spread(values, 1) for values in by_tensor)] in shares
    assert len(shares) == len(rows[0][0]["redrawn_by_tensor"])
    figure = Figure()
    figures.forgetting(figure, load_rows(runs_of([runs])), [], [])
    assert len(figure.axes) == 2
    redrawn = json.loads((runs / "lure-1.metrics.json").read_text())["redrawing"]
    lines = [line for line in figure.axes[1].get_lines() if line.get_linestyle() != "None"]
    assert list(lines[0].get_xdata()) == [0, 5, 10, 20, 40, 60, 80] and len(lines) == 4
    both = [json.loads((runs / f"lure-{s}.metrics.json").read_text())["redrawing"] for s in (1, 2)]
    mean = sum(r["random"]["0.8"] for r in both) / 2
    assert lines[3].get_ydata()[-1] == pytest.approx(mean) and set(redrawn) == set(figures.CRITERIA)
    path = runs / "warm-start-1.json"  # an old record does not say what was forgotten
    record = json.loads(path.read_text())
    for row in record["mega_batches"]:
        del row["reestimated"]
    path.write_text(json.dumps(record))
    assert [r[0] for r in rows_of(render(out, [path, runs / "lure-1.json"]))[4:7]] == [
        *("With running statistics", ":---", "LURE"),
    ]
    for row in record["mega_batches"]:
        del row["forgotten"], row["redrawn_by_tensor"]
    path.write_text(json.dumps(record))
    text = render(out, [path, runs / "lure-1.json"])
    assert "Not measured: `warm-start-1`." in text
    with pytest.raises(DataError, match=r"warm-start-1.json: expected what newer runs measure"):
        render(out, [path])


def test_generations_are_reported_beside_one_schedule_and_right_after_each_forgetting(tmp_path):
    runs, out = tmp_path / "digits", tmp_path / "generations.md"
    names = {
        "KE": "ke+generations",
        "LURE by chance": "random+generations",
        "One schedule": "warm-start+generations+mega-batches=1+epochs=3",
        "Warm start": "warm-start+generations",
    }
    accuracy, forgotten = {}, {}
    for title, name in names.items():
        method, *more = name.split("+")
        options = [*SMALL, "--mega-batches", "3", *(f"--{option}" for option in more), "--method", method]
        path = runs / f"{name}-1.json"
        assert baselines.main([*options, "--limit-test", "20", "--out", str(path)]) == 0
        record = json.loads(path.read_text())
        accuracy[title] = record["totals"]["test_accuracy"]
        forgotten[title] = [f"{row['forgotten']['accuracy']:.1f}" for row in record["mega_batches"][:-1]]
    head, _, *rows = rows_of(render(out, [runs]))
    assert head[:3] == ["Method", "mega-batches", "epochs"] and head[-1] == "Image passes"
    assert [row[:3] for row in rows[:4]] == [
        ["KE", "3", "1"],
        ["LURE by chance", "3", "1"],
        ["Warm start", "1", "3"],
        ["Warm start", "3", "1"],
    ]
    assert {row[-1] for row in rows[:4]} == {str(3 * 108)} and rows[2][5] != "–"  # beside warm start's
    others = ("LURE by chance", "One schedule")
    assert rows[4] == ["Test accuracy", *(f"− {other}'s [95 %]" for other in others)]
    assert rows[6:10] == [
        [title, *("–" if o == title else f"{accuracy[title] - accuracy[o]:+.2f} (one seed)" for o in others)]
        for title in names
    ]
    after, _, *lines = rows[10:]
    assert after[1:] == ["after generation 1", "after generation 2"]
    assert lines == [[title, *forgotten[title]] for title in names if forgotten[title]]
    figures.generations(figure := Figure(), load_rows(runs_of([runs])), [], [])
    (axes,) = figure.axes
    assert axes.get_xlabel() == "generation"
    drawn = {c.get_label(): [*c.lines[0].get_ydata()] for c in axes.containers}
    assert [*drawn] == ["KE", "LURE by chance", "Warm start", "One schedule"]
    assert {label: y[-1] for label, y in drawn.items()} == accuracy and len(set(drawn["One schedule"])) == 1


def test_an_incomplete_report_renders_what_is_there_and_names_what_is_not(folder, tmp_path):
    runs, out = copy(folder, tmp_path), tmp_path / "table3.md"
    files = [runs / f"{m}-{s}.json" for m in ("warm-start", "lure", "fire") for s in (1, 2)]
    (runs / "lure-2.json").unlink()
    with pytest.raises(DataError, match=r"lure-2.json"):
        render(out, files)
    assert not out.exists()
    text = render(out, files, incomplete=True)
    assert [row[:2] for row in rows_of(text)[2:4]] == [["Warm start", "2 †"], ["LURE", "1 †"]]
    assert "\nNot measured: `lure-2`, `fire-1`, `fire-2`.\n" in text
    assert (tmp_path / "table3-digits.png").exists()
    out.unlink()
    assert render(out, files[-1:], incomplete=True) == "nothing has been measured yet for table3"
    figure4 = tmp_path / "figure4.md"  # the runs are there, what it shows of them is not
    assert render(figure4, files, incomplete=True) == "nothing has been measured yet for figure4"
    assert not out.exists() and not figure4.exists()


def test_runs_elsewhere_stand_beside_the_committed_ones(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "paper.json", tmp_path / "results")
    committed = copy(folder, tmp_path / "results" / "small", "digits")
    own = copy(folder, tmp_path / "runs" / "small", "digits")
    record = json.loads((own / "lure-1.json").read_text())
    accuracy = record["totals"]["test_accuracy"]
    record["totals"]["test_accuracy"] += 1.5
    (own / "lure-1.json").write_text(json.dumps(record))
    change(own / "lure-2.json", epochs=7)
    (committed / "warm-start-1.json").unlink()
    files = [own / f"{name}-1.json" for name in ("warm-start", "lure")]
    text = render(tmp_path / "runs" / "small" / "table3.md", files)
    beside = [line for line in text.splitlines() if line.startswith("| digits/")]
    assert beside == [
        f"| digits/lure-1 | {accuracy + 1.5:.2f} | {accuracy:.2f} | +1.50 "
        f"| {record['device']}, {record['precision']} |"
    ]
    text = render(tmp_path / "runs" / "small" / "table1.md", [own / "lure-2.json"])
    assert "| – | not compared: epochs 1, not 7 here |" in text
    text = render(tmp_path / "results" / "small" / "table3.md", [committed / "lure-1.json"])
    assert "Your runs beside" not in text


def test_a_row_looks_the_same_in_all_figures_and_unlike_the_others_of_its_table():
    def look(options, others=()):
        told = lambda pairs: dict(pair.split(" ", 1) if " " in pair else (pair, True) for pair in pairs)  # noqa: E731
        rows = [Row("lure", {}, told(pairs), [], told(pairs)) for pairs in (options, *others)]
        return figures.look_of(rows[0], rows)

    assert look(["gamma 1"]) == look(["gamma 1"], [[], ["mega-batches 25"]]) != look([])
    for scale in tables.SCALES.values():
        for parts in scale.values():
            rows = {tuple(row.split()) for part in parts for row in part.rows}
            shared = {option for option in min(rows)[1:] if all(option in row for row in rows)}
            for method in {row[0] for row in rows}:
                options = [[o for o in row[1:] if o not in shared] for row in rows if row[0] == method]
                looks = {str(look([o.replace("=", " ", 1) for o in own])) for own in options}
                assert len(looks) == len(options), (method, options)
