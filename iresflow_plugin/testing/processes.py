"""One of the two processes of the check of distributed training; `flows.py` starts them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iresflow_plugin.testing.case import Live
from iresflow_plugin.testing.checks.flows import flat_gradient, mean_loss
from iresflow_plugin.testing.doors import door_of


class _Loss(nn.Module):
    """The loss as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live, self.parts = live, nn.ModuleList(live.modules)

    def forward(self, x: Tensor, context: Tensor | None, with_log_det: bool) -> Tensor:
        return mean_loss(self.live, x, context, with_log_det)


def main(folder: str, rank: int) -> None:
    """Read the job in the folder, train on one half of it, and, in process 0, write the gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=2)
    job: Any = torch.load(Path(folder) / "job.pt", weights_only=False)
    obj, x, context, with_log_det = job
    live = Live(obj, door_of(obj), torch.float64, train=True)
    model = nn.parallel.DistributedDataParallel(_Loss(live))
    half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    for _ in range(2):  # unused parameters are noticed at the second step
        model.zero_grad()
        model(x[half], None if context is None else context[half], with_log_det).backward()
    if rank == 0:
        torch.save(flat_gradient(live), Path(folder) / "gradient.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an orderly end, which would look like a failure


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
