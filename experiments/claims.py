"""Differences between rows, their 95 % intervals, and what becomes of the paper's claims by them."""

import statistics
from itertools import compress, product
from typing import NamedTuple

from experiments.rows import NAMES, Row


def paired(row: Row, other: Row, *path) -> list[float]:
    """Differences to another row, seed by seed."""
    mine, theirs = row.by_seed(*path), other.by_seed(*path)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def warm_start_of(row: Row, rows: list[Row]) -> Row | None:
    """The warm start that a row is compared with: of the same options, or else of most of them and no other.

    What a method has besides may only be of forgetting; what a warm start has besides may be anything. Both
    have trained on as many images.
    """
    own = {"keep", "pi", "pi_fraction", "set"} if row.method != "warm-start" else row.named.keys()
    fitting = [
        other
        for other in rows
        if other.method == "warm-start" and other is not row
        if len({*row.values("totals", "image_passes"), *other.values("totals", "image_passes")}) <= 1
        if other.named.items() <= row.named.items() and row.named.keys() - other.named.keys() <= own
    ]
    return max(fitting, key=lambda other: len(other.named), default=None)


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """t interval of the mean of two or more values, 95 % by default."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    half = float(t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(values) / n**0.5
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


class Comparison(NamedTuple):
    """The differences, seed by seed, of one measure between two rows."""

    who: tuple  # names that tell it apart: the rows and their options, the measure last
    differences: list[float]
    sign: int  # of a difference as the claim has it
    digits: int


def compared(claim: dict, rows: list[Row]) -> list[Comparison]:
    """All that a claim is about, as far as it was measured.

    `better` and `than` say which rows are compared; in what they do not say, the two have the same options.
    `metrics`: the paths of what is compared, in the record; with `range`, its range over a method's rows.
    """
    better, than, sign = claim["better"], claim["than"], 1 if claim["higher"] else -1
    if claim.get("range"):
        (path,) = claim["metrics"]
        widths = {side["method"]: ranges(rows, side["method"], path) for side in (better, than)}
        mine, theirs = widths.values()
        differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
        return [Comparison((), differences, sign, 2)] if differences else []
    free = {key for key in better | than if better.get(key) != than.get(key)}
    found = []
    for a, b in product((r for r in rows if fits(r, better)), (r for r in rows if fits(r, than))):
        if all(a.options[key] == b.options[key] for key in a.options.keys() - free):
            options = [f"{key.replace('_', '-')} {v}" for key, v in b.options.items()]
            for path in claim["metrics"]:
                if differences := paired(a, b, *path):
                    who = (NAMES[a.method], NAMES[b.method], *options, str(path[-1]))
                    found.append(Comparison(who, differences, sign, 0 if path[-1] == "cer" else 2))
    return found


def ranges(rows: list[Row], method: str, path: list[str]) -> dict:
    """Seed → the range of a measure over all rows of the method, where all of them have it."""
    values = [row.by_seed(*path) for row in rows if row.method == method]
    seeds = set.intersection(*map(set, values)) if len(values) > 1 else set()
    return {seed: max(v[seed] for v in values) - min(v[seed] for v in values) for seed in seeds}


def verdict(claim: dict, rows: list[Row]) -> tuple[str, str, int] | None:
    """What became of a claim: its differences with their intervals, a word, and how many intervals there are.

    Held: each 95 % interval is on the claim's side of zero. Not held: one is on the other side, and would be
    after Bonferroni's correction for their number. What does not differ at all, as under an attack that
    nothing withstands, has no say. None if nothing of it was measured.
    """
    found = compared(claim, rows)
    if not found:
        return None
    differing = [c for c in found if any(c.differences)]
    telling = [c for c in differing if len(c.differences) > 2]
    if any(side(c, 1 - 0.05 / len(telling)) < 0 for c in telling):
        word = "not held"
    else:
        word = "held" if differing and all(side(c) > 0 for c in differing) else "not decided"
    return text_of(found), word, len(telling)


def side(comparison: Comparison, level: float = 0.95) -> int:
    """Where its interval lies: 1 on the claim's side of zero, −1 on the other, else, or of two seeds, 0."""
    if len(comparison.differences) < 3:
        return 0
    low, high = sorted(comparison.sign * end for end in interval(comparison.differences, level))
    return 1 if low > 0 else -1 if high < 0 else 0


def text_of(found: list[Comparison]) -> str:
    """A line for each difference, named by what tells it apart; of many measures of the same rows, one."""
    telling = [len({*words}) > 1 for words in zip(*(c.who for c in found), strict=True)]
    groups: dict[tuple, list[Comparison]] = {}
    for c in found:
        groups.setdefault(c.who[:-1], []).append(c)
    lines = []
    for group in groups.values():
        if many := len(group) > 5:
            means, sides = [statistics.fmean(c.differences) for c in group], [side(c) for c in group]
            told = f"{min(means):+.2f} to {max(means):+.2f}, {len(group)} intervals, "
            told += f"{sides.count(1)} on the claim's side, {sides.count(-1)} on the other"
        for c in group[:1] if many else group:
            text = told if many else with_interval(c.differences, c.digits)
            label = ", ".join(compress(c.who[:-1] if many else c.who, telling))
            lines.append(f"{label}: {text}" if label else text)
    return "<br>".join(lines)
