"""Servers that live inside forge: NATS and Postgres, for `forge dev`, `forge demo` and the tests.

A server has a state directory of its own, survives being killed, ends with the process that started it, and
starts again on what it left. Nothing here is used when `FORGE_NATS_URL` and `FORGE_POSTGRES_DSN` are given.
"""

from forge.embedded.nats import EmbeddedNats
from forge.embedded.postgres import EmbeddedPostgres
from forge.embedded.process import OwnedProcess
from forge.embedded.state import DirectoryLock, clear_leftovers

__all__ = ["DirectoryLock", "EmbeddedNats", "EmbeddedPostgres", "OwnedProcess", "clear_leftovers"]
