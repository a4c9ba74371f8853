"""What the numbers say, in sentences: of losses as of wins."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from comparisons.columns import with_error
from comparisons.results import Failure, Result
from comparisons.standings import OURS, Gain, Number, Opponent, Standing, Tally, tally
from comparisons.statistics import Verdict


def outcome(standings: Sequence[Standing], failures: Sequence[Failure] = ()) -> str:
    """How ours does on one task, and whose trainings failed; nothing where it was not run."""
    failed = Counter(failure.method for failure in failures)
    note = f" Failed trainings: {listed([f'{n} of {name}' for name, n in failed.items()])}." if failed else ""
    return (standing_of_ours(standings) + note).strip()


def standing_of_ours(standings: Sequence[Standing]) -> str:
    ours = next((standing for standing in standings if standing.method == OURS), None)
    if ours is None:
        return ""
    if ours.diverged:
        return (
            "Ours diverged: a test point has no finite score, or one below a million nats; differences are left open."
        )
    others = [standing for standing in standings if standing.gap is not None]
    if not others:
        return "Ours ran alone."
    found: dict[Verdict | None, list[Standing]] = {}
    for standing in others:
        found.setdefault(standing.gap and standing.gap.verdict, []).append(standing)
    parts = [
        f"ahead of {len(found.get('better', []))} of {counted(len(others), 'other method')} beyond two standard errors"
    ]
    if worse := found.get("worse"):
        parts.append(f"behind {listed([by_how_much(standing) for standing in worse])}")
    if level := found.get("within 2 standard errors"):
        parts.append(f"too close to call against {listed([standing.method for standing in level])}")
    if left := found.get(None):
        reasons = [f"{standing.method} ({standing.gap.reason})" for standing in left if standing.gap]
        parts.append(f"not comparable with {listed(reasons)}")
    alone = any(standing.gap and standing.gap.seeds == 1 for standing in others)
    note = " Where there is one seed, errors are over test points alone." if alone else ""
    return f"Ours ranks {ours.rank} of {len(standings)}. It is {'; '.join(parts)}.{note}"


def by_how_much(standing: Standing) -> str:
    """A method that ours is behind of, and how far."""
    if standing.gap is None or standing.gap.interval is None:
        return standing.method
    interval = standing.gap.interval
    return f"{standing.method} by {with_error(type(interval)(-interval.mean, interval.error, interval.degrees))}"


def price(standings: Sequence[Standing]) -> str:
    """What ours costs beside the other methods that are trained."""
    ours = next((standing for standing in standings if standing.method == OURS), None)
    others = [standing for standing in standings if standing.method != OURS and standing.median(step_seconds)]
    if ours is None or not others:
        return ""
    costs: dict[str, Number] = {
        "a training step": step_seconds,
        "a density": lambda result: result.density_seconds,
        "a sample (ours without its log-det)": lambda result: result.sampling_seconds,
    }
    parts = [
        f"{name} {own / usual:.2g} times"
        for name, of in costs.items()
        if (own := ours.median(of)) and (usual := usual_cost(others, of))
    ]
    return f"Beside the median of the other trained methods, ours takes for {listed(parts)} as long." if parts else ""


def step_seconds(result: Result) -> float | None:
    return result.step_seconds


def usual_cost(standings: Sequence[Standing], of: Number) -> float | None:
    costs = [cost for standing in standings if (cost := standing.median(of))]
    return statistics.median(costs) if costs else None


def over_all(opponents: Sequence[Opponent], tasks: int) -> str:
    """All comparisons of ours together; nothing where there are none."""
    if not opponents:
        return ""
    found = tally(gap for opponent in opponents for gap in opponent.gaps.values())
    return (
        f"Over {counted(tasks, 'task')} and {counted(len(opponents), 'other method')}: in {found.total} comparisons "
        f"{in_words(found, 'ours is')}."
    )


def of_swaps(gains: Sequence[Gain]) -> str:
    """All swaps together."""
    found = tally(gain.gap for gain in gains)
    return f"Of {counted(found.total, 'swap')}, {in_words(found, 'the residual blocks are')}."


def in_words(found: Tally, who: str) -> str:
    parts = [f"{who} ahead in {found.ahead}", f"behind in {found.behind}", f"and too close to call in {found.level}"]
    return ", ".join(parts) + (f"; {found.open} left open" if found.open else "")


def counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def listed(items: Sequence[str], most: int = 5) -> str:
    """With commas and an "and"; a long list is cut."""
    if len(items) > most:
        items = [*items[: most - 1], f"{len(items) - most + 1} more"]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
