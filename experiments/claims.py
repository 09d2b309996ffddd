"""Differences between rows, their 95 % intervals, and what becomes of the paper's claims by them."""

import math
import statistics
from itertools import compress, product

from experiments.rows import NAMES, Row


def paired(row: Row, other: Row, *path) -> list[float]:
    """Differences to another row, seed by seed."""
    mine, theirs = row.by_seed(*path), other.by_seed(*path)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % t interval of the mean of two or more values."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return mean - half, mean + half


def with_interval(differences: list[float], digits: int = 2) -> str:
    numbers = [statistics.fmean(differences), *(interval(differences) if len(differences) > 1 else ())]
    mean, *ends = [f"{x:+.{digits}f}" for x in numbers]
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation, the latter from two values on that are not all the same."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def fits(row: Row, wanted: dict) -> bool:
    return all(row.config[k] in (v if isinstance(v, list) else [v]) for k, v in wanted.items())


def is_of(row: Row, published: dict) -> bool:
    shared = published.keys() & row.config.keys() - {"dataset"}
    return fits(row, {key: published[key] for key in shared})


def verdict(claim: dict, rows: list[Row]) -> tuple[str, str] | None:
    """What became of a claim: the differences that it is about, with their intervals, and a word.

    `better` and `than` say which rows are compared; in what they do not say, the two have the same options.
    Held: each interval excludes zero on the claim's side; not held: one does on the other side. What does
    not differ at all, as under an attack that nothing withstands, has no say. None without such rows.
    """
    better, than = claim["better"], claim["than"]
    free = {key for key in better | than if better.get(key) != than.get(key)}
    found = []
    for a, b in product((r for r in rows if fits(r, better)), (r for r in rows if fits(r, than))):
        if all(a.options[key] == b.options[key] for key in a.options.keys() - free):
            what = [
                NAMES[a.method],
                NAMES[b.method],
                *(f"{key.replace('_', '-')} {v}" for key, v in b.options.items()),
            ]
            for path in claim["metrics"]:
                if differences := paired(a, b, *path):
                    text = with_interval(differences, 0 if path[-1] == "cer" else 2)
                    found.append(([*what, str(path[-1])], text, differences))
    if not found:
        return None
    telling = [len({*words}) > 1 for words in zip(*(what for what, *_ in found), strict=True)]
    texts, words = [], set()
    for what, text, differences in found:
        label = ", ".join(compress(what, telling))
        texts.append(f"{label}: {text}" if label else text)
        low, high = interval(differences) if len(differences) > 2 else (-math.inf, math.inf)
        low, high = (low, high) if claim["higher"] else (-high, -low)
        if any(differences):
            words.add("held" if low > 0 else "not held" if high < 0 else "not decided")
    word = "not held" if "not held" in words else "held" if words == {"held"} else "not decided"
    return "<br>".join(texts), word
