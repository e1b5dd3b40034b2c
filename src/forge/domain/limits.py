"""The hard limits and bounds that no setting changes."""

MAX_RUNNING_JOBS = 3
"""L1, as clients are told; what holds it are the places in ``nats/streams.json``."""

MAX_QUEUED_JOBS = 10
"""L2: jobs of one user that are accepted and not over."""

MAX_SESSION_BYTES = 2 * 1024**3
"""L3: what the pictures of one session may take on disk."""

MAX_CHARACTER_ASSETS = 100
"""L4: pictures of one character."""

MAX_BATCH = 100
"""Jobs in one batch."""

MAX_ATTEMPTS = 3
"""Attempts of a job before it fails, and more of them for each retry."""

MAX_ADOPTIONS = 3
"""Workers that may take over one attempt before it counts as failed: a job that kills its worker must end."""

MAX_UPLOAD_BYTES = 10 * 1024 * 1024
MAX_UPLOAD_PIXELS = 4096 * 4096
"""Of a picture that a user sends, before it is decoded."""
MAX_REDIRECTIONS = 20
"""Times one attempt may go to another backend because the one chosen took no connection."""

PRIORITIES = range(1, 11)
DEFAULT_PRIORITY = 5

BACKOFF_SECONDS = (2.0, 10.0, 60.0)
"""Wait after the first, second and every later failed attempt."""
