"""What `make` does before it runs or renders anything: load the data, compare the records with what is asked.

Enters: the words that experiments/tables.py reads, and the records of the plan. Leaves: decoded images in the
cache; status 0, or one line that says what was not given, or which record is of other options or other data.
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from functools import cache

import lure
from experiments import runs, tables
from experiments.command import Parser, guarded
from experiments.data import FOLDERS, load_whole, part_of
from experiments.files import data_digest
from experiments.make import command, planned_files, where
from experiments.rows import named_options
from experiments.tables import Run

loaded = cache(load_whole)


def prepare(asked: argparse.Namespace) -> None:
    """ValueError for what was not given, or for a record of another run; DataError for data."""
    paths, also = planned_files(asked)
    missing = [path for path in (*paths.values(), *also) if not os.path.exists(path)]
    to_run = bool(missing) and not asked.incomplete
    if to_run:
        refuse_what_was_not_given(asked, paths, missing)
    told = False
    for run, path in paths.items():
        given = asked.imagenet if run.dataset == "restricted-imagenet" else asked.data
        config = config_of(run, asked)
        refuse_other_row(run.row, config)
        data = digest_of(config) if to_run or given else None
        if os.path.exists(path):
            compare(path, config, data)
            told = told or data is None
    if told:
        print("No run is started. Records were compared with the call by their options, not with the data.")


def refuse_what_was_not_given(asked: argparse.Namespace, paths: dict[Run, str], missing: list[str]) -> None:
    names = {where(run.dataset, asked)[0] for run in paths}
    if not asked.data and "folder" in names:
        parts = dict.fromkeys(run.dataset for run in paths)
        each = f" with {', '.join(parts)}, each" if asked.scale == "narrow" else ""
        folder = f"<folder{each} with train/<class>/ and test/<class>/ of images>"
        instead = "DATASETS=cifar10" if asked.scale == "narrow" else "DATASETS=digits"
        raise ValueError(f"DATA: expected DATA={folder}, or {instead}")
    if not asked.imagenet and "restricted-imagenet" in names:
        raise ValueError("IMAGENET: expected IMAGENET=<folder with train/ and val/>")
    if not asked.cifar10c and any(path.endswith(".corruptions.json") for path in missing):
        raise ValueError("CIFAR10C: expected CIFAR10C=<folder of CIFAR-10-C>")


def refuse_other_row(row: str, config: runs.Config) -> None:
    """ValueError if METHODS= or ARGS= change an option that the row names, and its files are named by."""
    try:
        named_options(row, as_read(config))
    except ValueError as error:
        expected = f"expected no option that the row {row} has itself"
        raise ValueError(f"METHODS, ARGS: {expected} ({error})") from error


def config_of(run: Run, asked: argparse.Namespace) -> runs.Config:
    parser = Parser(allow_abbrev=False)
    lure.add_settings(parser, runs.Config)
    return runs.Config(**vars(parser.parse_args(shlex.split(command(run, asked)))))


def as_read(config: runs.Config) -> dict:
    """As a record has it, when it is read."""
    return json.loads(json.dumps(asdict(config)))


def digest_of(config: runs.Config) -> dict:
    size = config.image_size if config.dataset in FOLDERS else 0
    return digest_of_part(
        *(config.dataset, config.data, config.cache, size),
        *(config.image_size, config.limit, config.limit_test, config.shots),
    )


@cache
def digest_of_part(name, folder, cache_folder, size, *part) -> dict:
    return data_digest(part_of(loaded(name, folder, cache_folder, size), name, *part))


def compare(path: str, config: runs.Config, data: dict | None) -> None:
    """ValueError if the record is of another run; without data, by the options alone."""
    run = dict(config=as_read(config), data=data or {}, precision=config.precision)
    run["settings"] = runs.settings_of(config)
    free = {"its precision"} if config.precision == "auto" else set()
    if data is None:
        free |= {"train", "test", "sha256"}
    runs.read_earlier(path, runs.read_record, run, but=free)


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(guarded(words[0], lambda: prepare(tables.arguments(words))))
