"""`python -m comparisons bench`: the measurements of `speed.py` at several sizes, as tables, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import seed_everything
from rich.console import Console
from rich.progress import Progress

from comparisons import speed, speed_classifiers, speed_images
from comparisons.methods import BLOCKS
from comparisons.provenance import provenance
from comparisons.speed import LIPSCHITZ, SCALE, CertificateCost, Settings, Throughput, Versus
from comparisons.speed_classifiers import CompiledStep
from comparisons.tables import PROGRESS_COLUMNS, Columns, markdown_table, print_lines, print_wide, rich_table
from comparisons.workers import steady

VERSUS_COLUMNS: Columns[Versus] = {
    "quantity": lambda row: row.quantity,
    "size": lambda row: row.size,
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
    "size": lambda row: row.size,
    "constrained (ms)": lambda row: f"{1e3 * row.constrained:.1f}",
    "free (ms)": lambda row: f"{1e3 * row.free:.1f}",
    "cost of the certificate": lambda row: f"{row.percent:+.0f} %",
    "allowed": lambda row: f"25 % {'kept' if row.percent <= 25 else 'MISSED'}",
}

COMPILED_COLUMNS: Columns[CompiledStep] = {
    "size": lambda row: row.size,
    "network": lambda row: row.network,
    "as it is (ms)": lambda row: f"{1e3 * row.eager:.1f}",
    "compiled (ms)": lambda row: f"{1e3 * row.compiled:.1f}",
    "compiled / as it is": lambda row: f"{row.ratio:.2f}",
}


@dataclass(frozen=True, eq=False)
class Part:
    """One table of the bench: a measurement for events of one size, repeated over sizes."""

    name: str
    title: str
    columns: Columns
    measure: Callable[[Any, Settings], list]
    sizes: Callable[[Settings], Sequence[Any]]


VECTORS = (
    Part(
        "side_by_side",
        "Our block beside normflows' Residual(LipschitzMLP): the same sizes, the constraint binding",
        VERSUS_COLUMNS,
        speed.side_by_side,
        lambda settings: settings.features,
    ),
    Part(
        "throughput",
        "Hosts' own flows at equal parameters",
        THROUGHPUT_COLUMNS,
        speed.throughputs,
        lambda settings: settings.features,
    ),
    Part(
        "certificate",
        "What the certificate adds to a training step",
        CERTIFICATE_COLUMNS,
        speed.certificate_cost,
        lambda settings: settings.features,
    ),
)
IMAGES = (
    Part(
        "side_by_side_images",
        "Images: our block beside normflows' Residual(LipschitzCNN), the same sizes, the constraint binding",
        VERSUS_COLUMNS,
        speed_images.side_by_side,
        lambda settings: settings.images,
    ),
    Part(
        "certificate_images",
        "Images: what the certificate adds to a training step",
        CERTIFICATE_COLUMNS,
        speed_images.certificate_cost,
        lambda settings: (*settings.images, *settings.wide_images),
    ),
)
CLASSIFIERS = (
    Part(
        "certificate_classifiers",
        "Classifiers: what the constraint adds to a training step of the vanilla twin",
        CERTIFICATE_COLUMNS,
        speed_classifiers.certificate_cost,
        lambda settings: settings.classifiers,
    ),
    Part(
        "compiled_classifiers",
        "Classifiers: a training step by torch.compile",
        COMPILED_COLUMNS,
        speed_classifiers.compiled_steps,
        lambda settings: settings.classifiers,
    ),
)
KINDS = {"vectors": VECTORS, "images": IMAGES, "classifiers": CLASSIFIERS}


def bench(settings: Settings, kinds: Sequence[str], seed: int, out: Path, console: Console) -> None:
    """Measure every part at every size; print the tables, and write `bench.json` and `bench.md` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [part for kind in dict.fromkeys(kinds) for part in KINDS[kind]]
    measured: dict[Part, list] = {part: [] for part in parts}
    jobs = [(size, part) for part in parts for size in part.sizes(settings)]
    with Progress(*PROGRESS_COLUMNS, console=console) as progress, alike():
        for size, part in progress.track(jobs, description="bench"):
            seed_everything(seed, verbose=False)
            measured[part] += part.measure(size, settings)
            write(out, measured, settings)
    print_wide(console, [rich_table(part.title, part.columns, rows) for part, rows in measured.items() if rows])
    print_lines(console, f"Written: {out / 'bench.json'} and {out / 'bench.md'}")


@contextmanager
def alike() -> Iterator[None]:
    """One thread, and no denormal numbers: normflows' series decays into them, and a CPU then is eight times slower."""
    threads = torch.get_num_threads()
    steady()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def write(out: Path, measured: dict[Part, list], settings: Settings) -> None:
    """What is measured so far, as JSON and as Markdown."""
    run = provenance()
    content = {
        "run": run,
        "settings": describe(settings),
        **{part.name: [asdict(row) for row in rows] for part, rows in measured.items()},
    }
    (out / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
    how = "\n".join(f"- {name}: {as_text(value)}" for name, value in {**run, "settings": describe(settings)}.items())
    tables = [f"## {part.title}\n\n{markdown_table(part.columns, rows)}" for part, rows in measured.items() if rows]
    (out / "bench.md").write_text("\n\n".join(["# Bench", how, *tables]) + "\n")


def describe(settings: Settings) -> dict[str, object]:
    """The settings and what all sizes share, as text and numbers."""
    common = {"blocks": BLOCKS, "blocks on images": speed_images.BLOCKS}
    common |= {"lipschitz": LIPSCHITZ, "weights scaled by": SCALE}
    sizes = {name: [str(size) for size in getattr(settings, name)] for name in ("images", "wide_images", "classifiers")}
    return {**asdict(settings), **sizes, "device": str(settings.device), **common}


def as_text(value: object) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)
