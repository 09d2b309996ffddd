"""Records of runs, read and put together to the rows of a table.

Enters: the paths of records. Leaves: rows, each of runs that differ by their seed alone.
"""

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from baselines import METHODS
from experiments.command import DataError
from experiments.runs import DEFAULTS, PATHS, defaults_of, read_record

NAMES = {method: method for method in METHODS}
NAMES |= {"warm-start": "Warm start", "sp": "S&P", "llf": "LLF", "lure": "LURE", "scratch": "Scratch"}
NAMES |= {"rifle": "RIFLE", "ke": "KE", "dash": "DASH", "fire": "FIRE"}
NAMES |= {"fisher": "LURE by Fisher", "magnitude": "LURE by magnitude", "random": "LURE by chance"}
NAMES |= {"released": "LURE as released"}
MEASURED = {
    ".metrics.json": (
        *("ece", "reliability", "weight_noise", "redrawing"),
        *("redrawing_reestimated", "accuracy_reestimated"),
    ),
    ".attack.json": ("pgd",),
    ".corruptions.json": ("corruptions", "images_per_severity"),
}
SIZES = ("limit", "limit_test", "shots", "image_size")  # these change the data


class Row(NamedTuple):
    """Runs that differ by their seed alone."""

    method: str
    options: dict  # those in which the rows of a table differ, and their values
    named: dict  # those that the row is named by, and their values
    records: list[dict]
    told: dict  # of `named`, what tells the row from the others of its table

    def by_seed(self, *path) -> dict:
        """Seed → what the path leads to in the record, where it was measured."""
        found = {}
        for record in self.records:
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, dict) else value[key]
                if value is None:
                    break
            else:
                found[record["config"]["seed"]] = value
        return found

    def values(self, *path) -> list:
        return [*self.by_seed(*path).values()]

    @property
    def config(self) -> dict:
        return self.records[0]["config"]

    @property
    def in_one_schedule(self) -> bool:
        """Whether it is what generations are compared with: a single one that is as long as all of them."""
        return self.config["generations"] and self.config["mega_batches"] == 1

    @property
    def label(self) -> str:
        if self.in_one_schedule:
            return "One schedule"
        return ", ".join([NAMES[self.method], *(word(*pair) for pair in self.told.items())])


def word(option: str, value) -> str:
    """An option of a row, as labels and tables have it."""
    name = option.replace("_", "-")
    if value is True:
        return name
    return f"{name} {value:g}" if type(value) is float else f"{name} {value}"


def load_record(path: Path, row: str) -> dict:
    """The record of a run of the row, "METHOD OPTION=VALUE ...", with what was measured beside it.

    Adds its `path`, the options of the row (`named`) and all that may set it apart from others (`options`).
    ECE is in percent. DataError for a file that is no record, or not of that row.
    """
    file = path
    try:
        record = with_options(path)
        record |= {"path": path, "named": named_options(row, record["config"])}
        for suffix, keys in MEASURED.items():
            file = path.with_suffix(suffix)
            if file.exists():
                record |= measured_beside(file, record, keys)
        file = path
        record["options"]["precision"] = record["precision"]  # that it ran in, whatever the option's word
        return record | derived(record)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: expected the record of a run of {row} ({reason})") from error


def with_options(file: Path) -> dict:
    """What a file of a run holds, its configuration completed by defaults, and the options out of that."""
    record = read_record(file)
    config = DEFAULTS | {"method": "lure", "set": []} | record["config"]
    apart = PATHS | {"method", "seed", "classes", "precision"}
    options = {key: value for key, value in config.items() if key not in apart}
    options["data"] = record["data"]["sha256"]
    if "keep" not in defaults_of(config["method"]):
        options["keep"] = None
    record |= {"config": config, "options": options}
    if record.get("format", 0) < 2:  # ECE was a fraction
        if "ece" in record:
            record["ece"] *= 100
        if "totals" in record:
            record["totals"]["ece"] *= 100
    return record


def named_options(row: str, config: dict) -> dict[str, Any]:
    """The options that the row names, with their values. ValueError if the run is not of them."""
    method, *pairs = row.split()
    named: dict[str, Any] = {}
    for key, _, text in (pair.partition("=") for pair in pairs):
        key = key.replace("-", "_")
        if key == "set":
            named.setdefault("set", []).append(text)
        elif key in named:
            raise ValueError(f"it names {key} twice")
        else:
            named[key] = type(config[key])(text or True)
    for key, value in {"method": method, **named}.items():
        if config[key] != value:
            raise ValueError(f"it is of {key} {config[key]}")
    return named


def measured_beside(file: Path, record: dict, keys: tuple[str, ...]) -> dict:
    """Of a file beside a record, what reports show. ValueError if it is of another run."""
    measured = with_options(file)
    if measured["options"] != record["options"] or measured["config"]["seed"] != record["config"]["seed"]:
        raise ValueError("it is of another run")
    return {key: measured[key] for key in keys if key in measured}


def derived(record: dict) -> dict:
    """What reports show that records do not hold as such."""
    rows = record["mega_batches"]
    stream_accuracy = statistics.fmean(row["test"]["accuracy"] for row in rows)
    found: dict = {"totals": record["totals"] | {"stream_accuracy": stream_accuracy}}
    found |= forgetting_of(rows)
    if noisy := record.get("weight_noise"):
        found["noise_drop"] = {sigma: noisy["0"] - a for sigma, a in noisy.items() if sigma != "0"}
    by_type = {name: values for name, values in record.get("corruptions", {}).items() if name != "mean"}
    found["corruption"] = {name: statistics.fmean(values) for name, values in by_type.items()}
    return found


def forgetting_of(rows: list[dict]) -> dict:
    """What forgetting did, the mean over all times; of an old record, which lacks it, nothing."""
    pairs = [(a, b) for a, b in pairwise(rows) if a.get("forgotten")]
    if not pairs:
        return {}
    of = {
        "before": [a["test"]["accuracy"] for a, _ in pairs],
        "after": [a["forgotten"]["accuracy"] for a, _ in pairs],
        "relearned": [b["test"]["accuracy"] for _, b in pairs],
        "trained": [b["train"]["accuracy"] for _, b in pairs],
    }
    forgetting: dict[str, Any] = {k: statistics.fmean(v) for k, v in of.items()}
    forgetting["cost"] = forgetting["after"] - forgetting["before"]
    if anew := [a["reestimated"] for a, _ in pairs if a.get("reestimated")]:
        forgetting["anew"] = {
            when: statistics.fmean(both[when]["accuracy"] for both in anew) for when in ("before", "after")
        }
    masks = [a["redrawn_by_tensor"] for a, _ in pairs if a["redrawn_by_tensor"]]
    shares = {name: statistics.fmean(100 * mask[name] for mask in masks) for name in (masks or [{}])[0]}
    return {"forgetting": forgetting, "shares": shares or None}


def load_rows(runs: list[tuple[str, Path]]) -> list[Row]:
    """The rows of a table, in the order of the runs, (row, path). DataError if they cannot be compared.

    Two runs may differ in their seed, their method and the options that one of their rows tells.
    """
    records = [load_record(path, row) for row, path in runs]
    apart: dict = {}
    for key in records[0]["options"]:
        having = [r for r in records if r["options"].get(key) is not None]
        for record in having:
            value, other = (r["options"][key] for r in (record, having[0]))
            free = {*record["named"], *having[0]["named"]}
            if value != other and not free & {key, *(SIZES if key == "data" else ())}:
                where = f"{other} in {having[0]['path'].name}"
                raise DataError(f"{record['path']}: cannot be compared: {key} is {value}, {where}")
            if value != other and key != "data":
                apart[key] = None
    rows: dict[str, Row] = {}
    named = [record["named"] for record in records]
    for record in records:
        method, options = record["config"]["method"], {key: record["options"][key] for key in apart}
        told = {k: v for k, v in record["named"].items() if any(other.get(k) != v for other in named)}
        row = Row(method, options, record["named"], [], told)
        row = rows.setdefault(json.dumps([method, options]), row)
        refuse_other_settings(record, row)
        if twice := [r for r in row.records if r["config"]["seed"] == record["config"]["seed"]]:
            other = twice[0]["path"].name
            raise DataError(f"{record['path']}: expected one run of each kind, {other} is it too")
        row.records.append(record)
    return [*rows.values()]


def refuse_other_settings(record: dict, row: Row) -> None:
    """DataError if the method had other settings in a record of the row; old records do not tell them."""
    for other in row.records:
        both = (record.get("settings"), other.get("settings"))
        if None not in both and both[0] != both[1]:
            told = f"the settings of {row.method} are {both[0]}, {both[1]} in {other['path'].name}"
            raise DataError(f"{record['path']}: cannot be compared: {told}")


def split_measured(rows: list[Row], paths: list[tuple]) -> tuple[list[Row], list[Row]]:
    """The rows with the records in which all that the paths lead to was measured, and with the others."""
    seeds = [set.intersection(*({*row.by_seed(*path)} for path in paths)) for row in rows]
    split: tuple[list[Row], list[Row]] = [], []
    for row, having in zip(rows, seeds, strict=True):
        for part, there in zip(split, (True, False), strict=True):
            if records := [r for r in row.records if (r["config"]["seed"] in having) == there]:
                part.append(row._replace(records=records))
    return split
