"""Theorem 2 on a live model: the target run, the source run that solves every layer, the report."""
