"""Tasks x methods x metrics, one training loop, one report: `python -m comparisons --help`."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: its profiler's warnings say nothing
