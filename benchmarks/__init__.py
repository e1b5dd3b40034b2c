"""Yardsticks: how fast forge is beside the least that could do the same, on the same machine in one run."""
