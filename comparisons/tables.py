"""Tables and bars for the terminal. A table is made of columns: a heading, and a function from a row to its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Row = TypeVar("Row")
Columns = Mapping[str, Callable[[Row], str]]
NOTHING = "–"  # the text of a cell that has no number

PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("to go"),
    TimeRemainingColumn(),
)


@contextmanager
def bar(total: float, console: Console) -> Iterator[tuple[Progress, Callable[[float], None]]]:
    """A progress bar with the time to go, and what is to be told how much is done."""
    with Progress(*PROGRESS_COLUMNS, console=console) as progress:
        task = progress.add_task("cells", total=total)
        yield progress, lambda done: progress.update(task, completed=done)


def print_lines(console: Console, *lines: str) -> None:
    """Unbroken, however narrow the terminal: a path is there to be copied."""
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Grid:
    """A table as text, made once for the terminal, Markdown and HTML; columns without a number are left out."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: int | None = None  # a row that stands out

    @classmethod
    def of(cls, title: str, columns: Columns[Row], rows: Sequence[Row], bold: int | None = None) -> Grid:
        filled = {name: [cell(row) for row in rows] for name, cell in columns.items()}
        kept = {name: cells for name, cells in filled.items() if set(cells) != {NOTHING}}
        return cls(title, list(kept), list(zip(*kept.values(), strict=True)), bold)

    def with_line(self, cells: Mapping[str, str]) -> Grid:
        """With one more row, empty but for the given columns."""
        return replace(self, rows=[*self.rows, [cells.get(heading, "") for heading in self.headings]])

    def rich(self) -> Table:
        return rich_table(self.title, self.columns, self.rows, None if self.bold is None else self.rows[self.bold])

    def markdown(self) -> str:
        return markdown_table(self.columns, self.rows)

    @property
    def columns(self) -> Columns[Sequence[str]]:
        return {heading: itemgetter(number) for number, heading in enumerate(self.headings)}


def rich_table(title: str, columns: Columns[Row], rows: Sequence[Row], best: Row | None = None) -> Table:
    """For the terminal; the best row in bold."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()), style="bold" if row is best else "")
    return table


def markdown_table(columns: Columns[Row], rows: Sequence[Row]) -> str:
    lines = [
        columns,
        ["-" * len(heading) for heading in columns],
        *([cell(row) for cell in columns.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_wide(console: Console, tables: Sequence[Table]) -> None:
    """Print without squeezing: in a narrow terminal lines break, but no number is lost."""
    for table in tables:
        width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
        Console(file=console.file, width=width).print(table)
