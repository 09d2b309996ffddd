"""Differences between rows of runs, seed by seed, and what their intervals say.

Enters: rows, of rows.py. Leaves: numbers, and the text of them that reports show.
"""

import statistics

from scipy.stats import t as student

from experiments.rows import Row


def paired(row: Row, other: Row, *path) -> list[float]:
    """Differences of what the path leads to, for each seed that both rows have."""
    mine = row.by_seed(*path)
    theirs = other.by_seed(*path)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def warm_start_of(row: Row, rows: list[Row]) -> Row | None:
    """The warm start that a row is compared with: of the same options, or else of most of them and no other.

    What a method has besides may only be of forgetting; what a warm start has besides may be anything. Both
    have trained on as many images.
    """
    of_forgetting = {"keep", "pi", "pi_fraction", "set"}
    may_differ = {*row.named} if row.method == "warm-start" else of_forgetting
    fitting = [
        other
        for other in rows
        if other.method == "warm-start" and other is not row
        if len({*row.values("totals", "image_passes"), *other.values("totals", "image_passes")}) <= 1
        if other.named.items() <= row.named.items() and row.named.keys() - other.named.keys() <= may_differ
    ]
    return max(fitting, key=lambda other: len(other.named), default=None)


# ------------------------------------------------------------ Intervals
def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """t interval of the mean of two or more values."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def paired_p(differences: list[float]) -> float:
    """Two-sided p of the t test that the mean of two or more is 0."""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return two_sided(statistics.fmean(differences), error, len(differences) - 1)


def pooled_p(row: Row, other: Row, rows: list[Row], *path) -> float:
    """The same for two rows of a table, by one error for all: of the two-way layout of rows by seeds.

    Each value is taken as its row's mean plus its seed's deviation plus an error; the variance of that is
    what is left, on (rows − 1) · (seeds − 1) degrees of freedom. The seeds are those that all rows have.
    """
    values = [row.by_seed(*path) for row in rows]
    seeds = sorted(set.intersection(*map(set, values)))
    table = [[of[seed] for seed in seeds] for of in values]
    row_means = [statistics.fmean(line) for line in table]
    seed_means = [statistics.fmean(column) for column in zip(*table, strict=True)]
    mean = statistics.fmean(row_means)
    squares = 0.0
    for line, row_mean in zip(table, row_means, strict=True):
        for value, seed_mean in zip(line, seed_means, strict=True):
            squares += (value - row_mean - seed_mean + mean) ** 2
    freedom = (len(rows) - 1) * (len(seeds) - 1)
    error = (2 * squares / freedom / len(seeds)) ** 0.5
    return two_sided(row_means[rows.index(row)] - row_means[rows.index(other)], error, freedom)


def two_sided(difference: float, error: float, freedom: int) -> float:
    if not error:
        return 0.0 if difference else 1.0
    return 2 * float(student.sf(abs(difference) / error, freedom))


# ------------------------------------------------------------ As text
def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation, the latter from two values on that are not all the same."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def with_interval(differences: list[float], digits: int = 2) -> str:
    """Their mean and its 95 % interval; of one alone, that it is of one seed."""
    mean = f"{statistics.fmean(differences):+.{digits}f}"
    if len(differences) == 1:
        return f"{mean} (one seed)"
    return f"{mean} {bounds(differences, digits=digits)}"


def bounds(differences: list[float], level: float = 0.95, digits: int = 2) -> str:
    low, high = interval(differences, level)
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"
