"""`python -m iresflow_plugin.testing MODULE:FACTORY --event 8 --context 3`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

from iresflow_plugin.testing.checks import CHECKS
from iresflow_plugin.testing.kit import check_transform


def load(target: str) -> Any:
    """What MODULE:FACTORY names; the current folder is searched too."""
    module, _, name = target.partition(":")
    if not name:
        raise SystemExit(f"{target!r} must have the form MODULE:FACTORY, for example mine:make_transform.")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{target} cannot be found: {error}.") from error


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, print; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m iresflow_plugin.testing",
        description="Check a flow transform of any library; print the table; exit 1 if a property fails.",
    )
    parser.add_argument("target", metavar="MODULE:FACTORY", help="a transform, or a function that makes one")
    parser.add_argument("--event", type=int, nargs="+", required=True, help="shape of one sample, e.g. 8, or 3 16 16")
    parser.add_argument("--context", type=int, nargs="+", help="shape of one sample's context")
    parser.add_argument("--check", action="append", choices=list(CHECKS), help="run this check alone; repeatable")
    parser.add_argument("--skip", action="append", default=[], choices=list(CHECKS), help="leave this out; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = check_transform(
        load(options.target),
        options.event,
        options.context,
        checks=options.check,
        skip=options.skip,
        seed=options.seed,
        raise_failures=False,
    )
    print(report)
    return int(not report.passed)


if __name__ == "__main__":
    sys.exit(main())
