"""Head to head: tasks x methods x metrics, one training loop, one report. See `python -m comparisons --help`."""
