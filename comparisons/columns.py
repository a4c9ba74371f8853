"""The columns of the report's tables, and what each of them means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from comparisons.results import Result
from comparisons.standings import OURS, Gain, Gap, Number, Opponent, Standing, Tally, tally
from comparisons.statistics import Interval, Verdict
from comparisons.tables import NOTHING, Columns, Grid

MARKS: dict[Verdict | None, str] = {"better": "▲", "worse": "▼", "within 2 standard errors": "≈", None: "?"}
LEGEND = (
    "▲ ours is ahead beyond two standard errors (more with few seeds), ▼ ours is behind, ≈ too close to call, "
    "? left open. "
    "† one seed: the error is over test points alone and says nothing about another training."
)

# Bits per dimension on MNIST and CIFAR-10, gathered from Grathwohl et al. 2018 (arXiv 1810.01367), Behrmann et al. 2019
# (arXiv 1811.00995), Chen et al. 2019 (arXiv 1906.02735) and Perugachi-Diaz et al. 2021 (arXiv 2102.02694).
REAL_NVP, GLOW = {"mnist": 1.06, "cifar10": 3.49}, {"mnist": 1.05, "cifar10": 3.35}
PUBLISHED: dict[str, dict[str, float]] = {
    "nice": {"mnist": 4.36, "cifar10": 4.48},
    "made": {"mnist": 2.04, "cifar10": 5.67},
    "nflows-maf": {"mnist": 1.89, "cifar10": 4.31},
    "nflows-realnvp": REAL_NVP,
    "normflows-realnvp": REAL_NVP,
    "nflows-glow": GLOW,
    "normflows-glow": GLOW,
    "ffjord": {"mnist": 0.99, "cifar10": 3.40},
    "i-resnet": {"mnist": 1.06, "cifar10": 3.45},
    "residual-flow": {"cifar10": 3.28},
    "i-densenet": {"cifar10": 3.25},
}


# text of a cell --------------------------------------------------------------------------------------


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    if value is None:
        return NOTHING
    return format(scale * value, form) if math.isfinite(value) else "not finite"


def with_error(interval: Interval, sign: str = "") -> str:
    """Three decimals, or as many as the error needs to be seen."""
    if not math.isfinite(interval.mean):
        return "diverged"
    error = interval.error
    digits = min(6, max(3, -math.floor(math.log10(error)))) if error > 0 and math.isfinite(error) else 3
    return f"{interval.mean:{sign}.{digits}f} ± {error:.{digits}f}"


def gap_text(gap: Gap | None) -> str:
    if gap is None:
        return NOTHING
    if gap.interval is None:
        return f"{gap.reason} {MARKS[None]}"
    return f"{with_error(gap.interval, '+')}{dagger(gap.seeds)} {MARKS[gap.verdict]}"


def dagger(seeds: int) -> str:
    return " †" if seeds == 1 else ""


def seeds_text(standing: Standing) -> str:
    return str(standing.seeds) + (f" ({standing.failed} failed)" if standing.failed else "")


def score_text(standing: Standing) -> str:
    return with_error(standing.score) + ("" if standing.diverged else dagger(standing.seeds))


def bits_text(standing: Standing) -> str:
    """With the standard error of the score, in bits per dimension."""
    bits, first = standing.mean(lambda result: result.bits_per_dimension), standing.results[0]
    if standing.diverged:
        return NOTHING
    if bits is None or not first.bits_error:
        return number(bits, ".3f")
    per_nat = first.bits_error / first.log_likelihood.error
    return with_error(Interval(bits, per_nat * standing.score.error, standing.score.degrees))


def published_text(standing: Standing) -> str:
    data = standing.task.removesuffix("-small")
    return number(PUBLISHED.get(standing.method, {}).get(data), ".2f")


def inverse_text(standing: Standing) -> str:
    lost = sum(int(value) for value in standing.values(lambda result: result.inverse and result.inverse.failed))
    largest = number(standing.largest(lambda result: result.inverse and result.inverse.largest), ".1e")
    return largest + (f", {lost} lost" if lost else "")


def log_det_text(standing: Standing) -> str:
    error = standing.largest(lambda result: result.log_det_error)
    if error == 0:
        return "exact" if any(result.blocks for result in standing.results) else NOTHING
    return number(error, ".1e")


def raw(result: Result) -> float:
    return result.raw_log_likelihood


def times(value: float | None) -> str:
    return NOTHING if value is None else f"× {value:.2g}"


def evaluations(result: Result) -> float | None:
    blocks = result.blocks
    return sum(block.evaluations for block in blocks) / len(blocks) if blocks else None


def median(of: Number, form: str, scale: float = 1.0) -> Callable[[Standing], str]:
    return lambda standing: number(standing.median(of), form, scale)


def mean(of: Number, form: str) -> Callable[[Standing], str]:
    return lambda standing: number(standing.mean(of), form)


def largest(of: Number, form: str) -> Callable[[Standing], str]:
    return lambda standing: number(standing.largest(of), form)


# columns of one task ---------------------------------------------------------------------------------

SCORE = "log-likelihood (nats)"

QUALITY: Columns[Standing] = {
    "method": lambda standing: standing.method,
    "rank": lambda standing: str(standing.rank),
    SCORE: score_text,
    "ours − theirs (nats)": lambda standing: gap_text(standing.gap),
    "seeds": seeds_text,
    "validation loss": mean(lambda result: result.validation, ".3f"),
    "raw (nats)": lambda standing: NOTHING if standing.diverged else number(standing.mean(raw), ".3f"),
    "bits/dim": bits_text,
    "published": published_text,
}
COST: Columns[Standing] = {
    "method": lambda standing: standing.method,
    "ms/step": median(lambda result: result.step_seconds, ".2f", 1e3),
    "training (s)": median(lambda result: result.training_seconds, ".1f"),
    "density (µs)": median(lambda result: result.density_seconds, ".1f", 1e6),
    "sampling (µs)": median(lambda result: result.sampling_seconds, ".1f", 1e6),
    "memory (MB)": median(lambda result: result.memory, ".1f"),
    "parameters": median(lambda result: result.parameters, ",.0f"),
    "learning rate": median(lambda result: result.learning_rate or None, "g"),
}
GUARANTEES: Columns[Standing] = {
    "method": lambda standing: standing.method,
    "inverse error": inverse_text,
    "Lipschitz bound": largest(lambda result: result.lipschitz_bound, ".3f"),
    "largest Jacobian": largest(lambda r: max((block.measured for block in r.blocks), default=None), ".3f"),
    "g per inverse": median(evaluations, ".1f"),
    "log-det error (nats)": log_det_text,
}
BRIEF = (
    "method",
    SCORE,
    "bits/dim",
    "ours − theirs (nats)",
    "ms/step",
    "density (µs)",
    "sampling (µs)",
    "inverse error",
)
COMPACT: Columns[Standing] = {name: ({**QUALITY, **COST, **GUARANTEES})[name] for name in (*BRIEF, "Lipschitz bound")}


def samples_columns(standings: Sequence[Standing]) -> Columns[Standing]:
    """A column for every distance that was taken."""
    names = dict.fromkeys(name for standing in standings for result in standing.results for name in result.distances)

    def column(name: str) -> Callable[[Standing], str]:
        def text(standing: Standing) -> str:
            pair = standing.distance(name)
            return NOTHING if pair is None else f"{number(pair.distance, '.3g')} ({number(pair.floor, '.2g')})"

        return text

    return {
        "method": lambda standing: standing.method,
        **{name: column(name) for name in names},
        "lost samples": mean(lambda result: result.lost_samples, ".1%"),
    }


def quality_grid(standings: Sequence[Standing], entropy: float | None) -> Grid:
    """The ranking; a last line says what is the most that there is to win."""
    grid = Grid.of("Quality", QUALITY, standings, ours_row(standings))
    if entropy is None:
        return grid
    return grid.with_line({"method": "entropy: no method can do better", SCORE: f"{-entropy:.3f}"})


def task_grids(standings: Sequence[Standing], entropy: float | None) -> list[Grid]:
    """All tables of one task."""
    row = ours_row(standings)
    return [
        quality_grid(standings, entropy),
        Grid.of("Cost", COST, standings, row),
        Grid.of("Guarantees", GUARANTEES, standings, row),
        Grid.of("Samples", samples_columns(standings), standings, row),
    ]


def ours_row(standings: Sequence[Standing]) -> int | None:
    return next((number for number, standing in enumerate(standings) if standing.method == OURS), None)


# columns over tasks ----------------------------------------------------------------------------------

GAINS: Columns[Gain] = {
    "swapped": lambda gain: f"{gain.task}: {gain.original}",
    "twin − original (nats)": lambda gain: gap_text(gain.gap),
    "step time": lambda gain: times(gain.step),
    "density time": lambda gain: times(gain.density),
    "sampling time": lambda gain: times(gain.sampling),
}


TALLY: Columns[Opponent] = {
    "method": lambda opponent: opponent.method,
    "▲ ahead": lambda opponent: str(opponent.tally.ahead),
    "▼ behind": lambda opponent: str(opponent.tally.behind),
    "≈ level": lambda opponent: str(opponent.tally.level),
    "? open": lambda opponent: str(opponent.tally.open),
}


def summary_grids(opponents: Sequence[Opponent], tasks: Sequence[str], most: int = 6) -> list[Grid]:
    """How often ours is ahead and behind, and methods by tasks with the differences, some tasks a table."""

    def column(task: str) -> Callable[[Opponent], str]:
        return lambda opponent: gap_text(opponent.gaps.get(task))

    total = overall(opponents)
    counts = {"▲ ahead": total.ahead, "▼ behind": total.behind, "≈ level": total.level, "? open": total.open}
    grid = Grid.of("Tasks on which ours is ahead and behind", TALLY, opponents)
    name = TALLY["method"]
    parts = [tasks[start : start + most] for start in range(0, len(tasks), most)]
    return [
        grid.with_line({"method": "all", **{name: str(count) for name, count in counts.items()}}),
        *(
            Grid.of(
                "Ours minus theirs (nats)",
                {"method": name, **{task: column(task) for task in part}},
                opponents,
            )
            for part in parts
        ),
    ]


def overall(opponents: Sequence[Opponent]) -> Tally:
    return tally(gap for opponent in opponents for gap in opponent.gaps.values())


# what they mean --------------------------------------------------------------------------------------

MEANING = {
    "rank": "By mean test log-likelihood; equal means share a rank. Last are those that diverged: a test point "
    "without a finite score, or with one below a million nats.",
    SCORE: "Mean over the test points, then over seeds, ± its standard error over seeds. The data are preprocessed as "
    "said at the end. Higher is better.",
    "ours − theirs (nats)": "Paired on the same test points and the same seeds, ± the standard error of the "
    "difference over seeds and test points together. Above 0 ours is better. With few seeds an error is itself "
    "uncertain, so the limit of two standard errors is raised: to 4.5 for three seeds.",
    "seeds": "Trainings that ended, and how many ended in an error.",
    "validation loss": "The best seen in training, mean over seeds; lower is better.",
    "raw (nats)": "The log-likelihood in the units of the data before preprocessing.",
    "bits/dim": "Bits per dimension of the raw data, where it is quantised, with the standard error; lower is better.",
    "published": "Bits per dimension that the authors report for models that are larger by a hundred times and trained "
    "for days: what there is to reach, and nothing to compare with.",
    "ms/step": "Training time by steps. All times are medians over seeds; on a CPU they are those of one thread at "
    "work, so that other programs do not count.",
    "training (s)": "Of the training steps alone.",
    "density (µs)": "One log-density within a batch of at most 256.",
    "sampling (µs)": "One sample within a batch of at most 256. Our blocks leave out their log-det (`Omitted()`), "
    "which a sample does not need; with it they take up to twice as long. Other transforms compute theirs.",
    "memory (MB)": "Peak of one training step, beyond weights and optimiser state.",
    "parameters": "All that are trained.",
    "learning rate": "Of Adam; none where the method is fitted in one go.",
    "inverse error": "Largest |x − x'| over 256 test points and all seeds, x' being x sent to noise and back, in the "
    "precision of the run; and how many points came back not finite.",
    "Lipschitz bound": "The largest certified bound of a residual branch g, over blocks and seeds; below 1 the block "
    "is invertible. Other transforms have none.",
    "largest Jacobian": "The largest norm of g's Jacobian at test points, over blocks and seeds: what the bound has "
    "to cover. The gap is room that the block does not use.",
    "g per inverse": "Evaluations of g to invert one block at one point, mean over blocks.",
    "log-det error (nats)": "Bound on what an inexact log-det (our blocks, FFJORD) adds to the error of the mean.",
    "lost samples": "Share of samples that are not finite; distances leave them out.",
    "energy distance": "Of samples to test points, mean over seeds; in brackets its floor, which fresh data would "
    "score. At the floor samples cannot be told from data. So for all distances.",
    "sliced Wasserstein": "Root mean square distance of samples to test points along random directions.",
    "MMD²": "Squared maximum mean discrepancy, Gaussian kernel.",
    "twin − original (nats)": "Above 0 the residual blocks are better than what they replaced; error as above.",
    "step time": "Multiple of the original's time; likewise density and sampling time.",
}
