"""Commands beside the three entry points, run from the root: `python -m scripts.NAME`."""
