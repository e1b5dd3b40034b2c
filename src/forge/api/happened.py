"""What has happened since this process came to the end of the log, counted for Prometheus.

Every API reads the whole log, so each of them counts the same: of several, look at one, or take the maximum.

======================================  =========  ==========================================
name                                    kind       labels
======================================  =========  ==========================================
``forge_jobs_admitted_total``           counter    ``job_type``
``forge_jobs_ended_total``              counter    ``job_type``, ``outcome``: completed, cached, failed …
``forge_job_wait_seconds``              histogram  ``job_type``; from its request or retry to its last start
``forge_job_run_seconds``               histogram  ``job_type``; from its last start to stored pictures
``forge_attempts_total``                counter    ``fact``: started, adopted, redirected, failed
``forge_attempt_failures_total``        counter    ``code`` of the attempt's failure
``forge_assets_total``                  counter    ``asset_type``, ``fact``: ready, deleted, expired
``forge_stored_bytes_total``            counter    ``asset_type``
``forge_asset_faults_total``            counter    ``fact``: lost, damaged
``forge_cleanups_total``                counter    ``fact``: requested, held, finished
======================================  =========  ==========================================
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from forge.events.assets import AssetFault, AssetGivenUp, AssetReady, AssetStored
from forge.events.cleanup import CleanupFinished, CleanupHeld, CleanupRequested
from forge.events.envelope import Recorded
from forge.events.jobs import (
    JobAdopted,
    JobAttemptFailed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobRedirected,
    JobStarted,
    JobSubmitted,
)

_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600, 1800, 3600)


class Happened:
    """Feed it the new events of the log with :meth:`count`; ``registry`` has the numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._admitted = self._counter("forge_jobs_admitted", "Jobs let in.", "job_type")
        self._ended = self._counter("forge_jobs_ended", "Jobs that are over.", "job_type", "outcome")
        self._waited = self._histogram("forge_job_wait_seconds", "Seconds a job waited for its last start.")
        self._ran = self._histogram("forge_job_run_seconds", "Seconds from a job's last start to its end.")
        self._attempts = self._counter("forge_attempts", "What became of attempts.", "fact")
        self._failures = self._counter("forge_attempt_failures", "Attempts that came to nothing.", "code")
        self._assets = self._counter("forge_assets", "Assets that came and went.", "asset_type", "fact")
        self._bytes = self._counter("forge_stored_bytes", "Bytes of stored pictures.", "asset_type")
        self._faults = self._counter("forge_asset_faults", "Files that were not as stored.", "fact")
        self._cleanups = self._counter("forge_cleanups", "What became of clean-ups.", "fact")
        # whose rate is watched, so that the first one is a step from 0 and not the beginning of a series
        for fact in ("started", "adopted", "redirected", "failed"):
            self._attempts.labels(fact)
        for fact in ("lost", "damaged"):
            self._faults.labels(fact)
        for fact in ("requested", "held", "finished"):
            self._cleanups.labels(fact)

    def count(self, records: Iterable[Recorded]) -> None:
        """Take these events into account."""
        for record in records:
            self._count(record)

    def _count(self, record: Recorded) -> None:
        event = record.event
        fact = event.type.rpartition(".")[2]
        match event:
            case JobSubmitted():
                self._admitted.labels(event.job_type).inc()
            case JobStarted() | JobAdopted() | JobRedirected():
                self._attempts.labels(fact).inc()
            case JobAttemptFailed():
                self._attempts.labels("failed").inc()
                self._failures.labels(event.code).inc()
            case JobCompleted():
                self._completed(event)
            case JobFailed() | JobCancelled():
                self._ended.labels(event.job_type, fact).inc()
            case AssetStored():
                self._bytes.labels(event.asset_type).inc(event.file_size_bytes)
            case AssetReady() | AssetGivenUp():
                self._assets.labels(event.asset_type, fact).inc()
            case AssetFault():
                self._faults.labels(fact).inc()
            case CleanupRequested() | CleanupHeld() | CleanupFinished():
                self._cleanups.labels(fact).inc()
            case _:
                pass

    def _completed(self, event: JobCompleted) -> None:
        self._ended.labels(event.job_type, "cached" if event.cached else "completed").inc()
        if not event.cached:
            self._waited.labels(event.job_type).observe(event.waited_ms / 1000)
            self._ran.labels(event.job_type).observe(event.run_ms / 1000)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("job_type",), buckets=_SECONDS, registry=self.registry)
