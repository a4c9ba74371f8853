"""Train in two gloo processes and leave what each ends with; started by test_training."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from comparisons.settings import Budget, Machine
from tests.comparisons.test_training import trained

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder = sys.argv[1:]
    fabric = Machine(devices=2).fabric()
    fabric.launch()
    density, history, _ = trained(name, fabric, Budget(steps=10))
    content = {"state": density.state_dict(), "validation": history.validation}
    torch.save(content, Path(folder) / f"{fabric.global_rank}.pt")
