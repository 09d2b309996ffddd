"""What becomes of claims: of the two comparisons that were named before their runs, and of the paper's.

Enters: rows, of rows.py, and for the paper's claims those of results/paper.json. Leaves: cells of tables.
"""

import statistics
from itertools import compress, product
from typing import NamedTuple

from experiments.differences import bounds, interval, paired, with_interval
from experiments.rows import NAMES, Row

# ------------------------------------------------------------ Named before the runs
MARGIN = 0.5  # points of the mean accuracy over the stream, named with the comparisons


class Primary(NamedTuple):
    """LURE − warm start, both with the decay, on seeds that nobody had seen when the margin was named."""

    table: str
    dataset: str
    seeds: tuple
    before: tuple = ()  # seeds that had been seen


PRIMARY = (
    Primary("table3", "cifar10-jpeg", seeds=(4, 5, 6, 7), before=(1, 2, 3)),
    Primary("table1", "cifar10-lossless", seeds=(1, 2, 3)),
)


def decided(differences: list[float], margin: float = MARGIN) -> str:
    """The verdict on the mean of three or more differences; wrong in at most 5 of 100 cases, by Bonferroni.

    Equivalent: the 95 % interval lies within ± margin (two one-sided tests at 2.5 %). Different: the 97.5 %
    interval excludes 0. ValueError for fewer than three.
    """
    if len(differences) < 3:
        raise ValueError(f"expected three differences or more, got {len(differences)}")
    low, high = interval(differences)
    equivalent = -margin < low and high < margin
    low, high = interval(differences, 0.975)
    different = low > 0 or high < 0
    if equivalent and different:
        return f"different, by less than {margin}"
    if equivalent:
        return f"equivalent within ±{margin}"
    return "different" if different else "undecided"


def primary(table: str, dataset: str, rows: list[Row]) -> list[list[str]]:
    """Lines of seeds, difference, its two intervals and verdict, of the comparison that was named, if any."""
    named = [p for p in PRIMARY if (p.table, p.dataset) == (table, dataset)]
    plain = {row.method: row for row in rows if not row.told}
    if not named or not {"lure", "warm-start"} <= plain.keys():
        return []
    (comparison,) = named
    path = ("totals", "stream_accuracy")
    mine = plain["lure"].by_seed(*path)
    theirs = plain["warm-start"].by_seed(*path)
    there = {seed: mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())}

    def line(what, seeds, verdict):
        differences = [there[seed] for seed in seeds]
        listed = f"{what}: {', '.join(map(str, seeds))}"
        return [listed, with_interval(differences), bounds(differences, 0.975), verdict]

    missing = [seed for seed in comparison.seeds if seed not in there]
    if missing:
        told = f"not complete: {len(comparison.seeds) - len(missing)} of {len(comparison.seeds)} seeds"
        lines = [[f"seeds {', '.join(map(str, comparison.seeds))}", "–", "–", told]]
    else:
        lines = [line("seeds", comparison.seeds, decided([there[seed] for seed in comparison.seeds]))]
    if comparison.before and {*comparison.before} <= there.keys():
        lines.append(line("seen before the margin was named", comparison.before, "–"))
        if not missing:
            lines.append(line("all, as a description", [*there], "–"))
    return lines


# ------------------------------------------------------------ The paper's
class Comparison(NamedTuple):
    """The differences, seed by seed, of one measure between two rows."""

    who: tuple  # names that tell it apart: the rows and their options, the measure last
    differences: list[float]
    sign: int  # of a difference as the claim has it
    digits: int

    def side(self, level: float = 0.95) -> int:
        """1: the interval is on the claim's side of zero; −1: on the other; 0: on both, or of two seeds."""
        if len(self.differences) < 3:
            return 0
        low, high = sorted(self.sign * end for end in interval(self.differences, level))
        return 1 if low > 0 else -1 if high < 0 else 0


def verdict(claim: dict, rows: list[Row]) -> tuple[str, str, int] | None:
    """What became of a claim: its differences with their intervals, a word, and how many intervals there are.

    Held: each 95 % interval is on the claim's side of zero. Not held: one is on the other side, and would be
    after Bonferroni's correction for their number. What does not differ at all, as under an attack that
    nothing withstands, has no say. None if nothing of it was measured.
    """
    found = ranges_compared(claim, rows) if claim.get("range") else compared(claim, rows)
    if not found:
        return None
    differing = [comparison for comparison in found if any(comparison.differences)]
    telling = [comparison for comparison in differing if len(comparison.differences) > 2]
    if any(comparison.side(1 - 0.05 / len(telling)) < 0 for comparison in telling):
        word = "not held"
    elif differing and all(comparison.side() > 0 for comparison in differing):
        word = "held"
    else:
        word = "not decided"
    return text_of(found), word, len(telling)


def compared(claim: dict, rows: list[Row]) -> list[Comparison]:
    """All that a claim is about, as far as it was measured.

    `better` and `than` say which rows are compared; in what they do not say, the two have the same options.
    `metrics`: the paths of what is compared, in the record.
    """
    better = claim["better"]
    than = claim["than"]
    free = {key for key in better | than if better.get(key) != than.get(key)}
    found = []
    for mine, theirs in product(fitting(rows, better), fitting(rows, than)):
        if any(mine.options[key] != theirs.options[key] for key in mine.options.keys() - free):
            continue
        options = [f"{key.replace('_', '-')} {value}" for key, value in theirs.options.items()]
        for path in claim["metrics"]:
            differences = paired(mine, theirs, *path)
            if differences:
                who = (NAMES[mine.method], NAMES[theirs.method], *options, str(path[-1]))
                found.append(comparison_of(claim, who, differences, digits=0 if path[-1] == "cer" else 2))
    return found


def ranges_compared(claim: dict, rows: list[Row]) -> list[Comparison]:
    """Of a claim about the range of a measure over all rows of a method."""
    (path,) = claim["metrics"]
    mine = ranges(rows, claim["better"]["method"], path)
    theirs = ranges(rows, claim["than"]["method"], path)
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    return [comparison_of(claim, (), differences)] if differences else []


def comparison_of(claim: dict, who: tuple, differences: list[float], digits: int = 2) -> Comparison:
    return Comparison(who, differences, 1 if claim["higher"] else -1, digits)


def ranges(rows: list[Row], method: str, path: list[str]) -> dict:
    """Seed → the range of a measure over all rows of the method, where all of them have it."""
    values = [row.by_seed(*path) for row in rows if row.method == method]
    if len(values) < 2:
        return {}
    seeds = set.intersection(*map(set, values))
    return {seed: max(of[seed] for of in values) - min(of[seed] for of in values) for seed in seeds}


def fitting(rows: list[Row], wanted: dict) -> list[Row]:
    return [row for row in rows if fits(row, wanted)]


def fits(row: Row, wanted: dict) -> bool:
    """Whether the row has these options; a list names several values."""
    return all(row.config[k] in (v if isinstance(v, list) else [v]) for k, v in wanted.items())


def is_of(row: Row, published: dict) -> bool:
    """Whether a row of the paper's is of the same method and options, as far as it names them."""
    shared = published.keys() & row.config.keys() - {"dataset"}
    return fits(row, {key: published[key] for key in shared})


def text_of(found: list[Comparison]) -> str:
    """A line for each difference, named by what tells it apart; of many measures of the same rows, one."""
    telling = [len({*words}) > 1 for words in zip(*(c.who for c in found), strict=True)]
    groups: dict[tuple, list[Comparison]] = {}
    for comparison in found:
        groups.setdefault(comparison.who[:-1], []).append(comparison)
    lines = []
    for rows, group in groups.items():
        if len(group) > 5:
            lines.append(named(rows, telling, summary(group)))
        else:
            lines += [named(c.who, telling, with_interval(c.differences, c.digits)) for c in group]
    return "<br>".join(lines)


def named(who: tuple, telling: list[bool], text: str) -> str:
    label = ", ".join(compress(who, telling))
    return f"{label}: {text}" if label else text


def summary(group: list[Comparison]) -> str:
    means = [statistics.fmean(comparison.differences) for comparison in group]
    sides = [comparison.side() for comparison in group]
    intervals = (
        f"{len(group)} intervals, {sides.count(1)} on the claim's side, {sides.count(-1)} on the other"
    )
    return f"{min(means):+.2f} to {max(means):+.2f}, {intervals}"
