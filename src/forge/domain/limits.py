"""The hard limits and bounds that no setting changes."""

MAX_BATCH = 100
"""Jobs in one batch."""

MAX_ATTEMPTS = 3
"""Attempts of a job before it fails, and more of them for each retry."""

MAX_ADOPTIONS = 3
"""Workers that may take over one attempt before it counts as failed: a job that kills its worker must end."""

MAX_REDIRECTIONS = 20
"""Times one attempt may go to another backend because the one chosen took no connection."""

PRIORITIES = range(1, 11)
DEFAULT_PRIORITY = 5

BACKOFF_SECONDS = (2.0, 10.0, 60.0)
"""Wait after the first, second and every later failed attempt."""
