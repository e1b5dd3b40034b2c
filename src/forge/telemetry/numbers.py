"""The numbers of one process, for Prometheus and OTLP alike; each module makes its own, by :func:`counter`.

======================================  =========  ==========================================
name                                    kind       labels
======================================  =========  ==========================================
``forge_part_seconds``                  histogram  ``part``: a span's name; ``forge.append`` …
``forge_log_lines_total``               counter    ``level``
``forge_decoder_deaths_total``          counter    of the children that decode pictures; see ``images``
``forge_build_info``                    gauge      ``version``
``process_…``                           gauge      memory, CPU, open files, as everywhere
======================================  =========  ==========================================
"""

from __future__ import annotations

from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)

registry = CollectorRegistry()
"""Everything of this process that is not of one API."""


def counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, registry=registry)


def gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, registry=registry)


def histogram(name: str, text: str, *labels: str) -> Histogram:
    return Histogram(name, text, labels, registry=registry, buckets=SECONDS)


parts = histogram("forge_part_seconds", "Seconds a part of a piece of work took.", "part")
lines = counter("forge_log_lines", "Lines logged.", "level")
for _level in ("warning", "error"):
    lines.labels(_level)
gauge("forge_build_info", "1, with the version that runs.", "version").labels(version("forge")).set(1)
ProcessCollector(registry=registry)
