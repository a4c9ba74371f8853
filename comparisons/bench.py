"""`python -m comparisons bench`: the measurements of `speed.py` at several sizes, as tables, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.fabric import seed_everything
from rich.console import Console
from rich.progress import Progress

from comparisons.methods import BLOCKS
from comparisons.provenance import provenance
from comparisons.speed import (
    LIPSCHITZ,
    SCALE,
    CertificateCost,
    Settings,
    Throughput,
    Versus,
    certificate_cost,
    side_by_side,
    throughputs,
)
from comparisons.tables import PROGRESS_COLUMNS, Columns, markdown_table, print_wide, rich_table

VERSUS_COLUMNS: Columns[Versus] = {
    "quantity": lambda row: row.quantity,
    "D": lambda row: str(row.features),
    "unit": lambda row: row.unit,
    "ours": lambda row: f"{row.ours:.3g}",
    "normflows": lambda row: f"{row.theirs:.3g}",
    "ours / normflows": lambda row: f"{row.ratio:.2f}",
    "allowed": lambda row: (
        "" if row.allowed is None else f"{row.allowed:.1f} {'kept' if row.ratio <= row.allowed else 'MISSED'}"
    ),
}

THROUGHPUT_COLUMNS: Columns[Throughput] = {
    "method": lambda row: row.method,
    "D": lambda row: str(row.features),
    "parameters": lambda row: f"{row.parameters:,}",
    "training (points/s)": lambda row: f"{row.training:,.0f}",
    "density (points/s)": lambda row: f"{row.density:,.0f}",
    "sampling (samples/s)": lambda row: f"{row.sampling:,.0f}",
    "memory of a step (MB)": lambda row: f"{row.megabytes:.1f}",
}

CERTIFICATE_COLUMNS: Columns[CertificateCost] = {
    "D": lambda row: str(row.features),
    "constrained (ms)": lambda row: f"{1e3 * row.constrained:.1f}",
    "free (ms)": lambda row: f"{1e3 * row.free:.1f}",
    "cost of the certificate": lambda row: f"{row.percent:+.0f} %",
    "allowed": lambda row: f"25 % {'kept' if row.percent <= 25 else 'MISSED'}",
}


@dataclass(frozen=True)
class Part:
    """One table of the bench: a measurement for events of one size, repeated over sizes."""

    name: str
    title: str
    columns: Columns
    measure: Callable[[int, Settings], list]


PARTS = (
    Part(
        "side_by_side",
        "Our block beside normflows' Residual(LipschitzMLP): the same sizes, the constraint binding",
        VERSUS_COLUMNS,
        side_by_side,
    ),
    Part("throughput", "Hosts' own flows at equal parameters", THROUGHPUT_COLUMNS, throughputs),
    Part("certificate", "What the certificate adds to a training step", CERTIFICATE_COLUMNS, certificate_cost),
)


def bench(settings: Settings, seed: int, out: Path, console: Console) -> None:
    """Measure every part at every size; print the tables, and write `bench.json` and `bench.md` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list] = {part.name: [] for part in PARTS}
    jobs = [(features, part) for features in settings.features for part in PARTS]
    with Progress(*PROGRESS_COLUMNS, console=console) as progress, alike():
        for features, part in progress.track(jobs, description="bench"):
            seed_everything(seed, verbose=False)
            measured[part.name] += part.measure(features, settings)
            write(out, measured, settings)
    print_wide(console, [rich_table(part.title, part.columns, measured[part.name]) for part in PARTS])
    console.print(f"Written: {out / 'bench.json'} and {out / 'bench.md'}", highlight=False)


@contextmanager
def alike() -> Iterator[None]:
    """One thread, and no denormal numbers: normflows' series decays into them, and a CPU then is eight times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def write(out: Path, measured: dict[str, list], settings: Settings) -> None:
    """What is measured so far, as JSON and as Markdown."""
    run = provenance()
    content = {
        "run": run,
        "settings": describe(settings),
        **{name: [asdict(row) for row in rows] for name, rows in measured.items()},
    }
    (out / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
    how = "\n".join(f"- {name}: {as_text(value)}" for name, value in {**run, "settings": describe(settings)}.items())
    tables = [f"## {part.title}\n\n{markdown_table(part.columns, measured[part.name])}" for part in PARTS]
    (out / "bench.md").write_text("\n\n".join(["# Bench", how, *tables]) + "\n")


def describe(settings: Settings) -> dict[str, object]:
    """The settings and what all sizes share, as text and numbers."""
    common = {"blocks": BLOCKS, "lipschitz": LIPSCHITZ, "weights scaled by": SCALE}
    return {**asdict(settings), "device": str(settings.device), **common}


def as_text(value: object) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)
