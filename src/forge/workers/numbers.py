"""What workers count, each process for itself.

======================================  =========  ==========================================
name                                    kind       labels
======================================  =========  ==========================================
``forge_deliveries_total``              counter    ``consumer``, ``outcome``: done, release, leave, lost
``forge_orders_in_hand``                gauge      orders this process runs
``forge_places``                        gauge      how many orders may be out at once
``forge_places_taken``                  gauge      as the dispatcher sees it
``forge_orders_total``                  counter    orders given
``forge_orders_lost_total``             counter    orders that had gone and were given again
``forge_projected_events_total``        counter    ``stream``
``forge_projector_position``            gauge      ``stream``; the last event the tables have
``forge_projection_seconds``            histogram  ``stream``; a transaction, of one event or a thousand
``forge_projection_age_seconds``        histogram  ``stream``; how old an event was when the tables had it
``forge_projector_interruptions_total`` counter    ``stream``
======================================  =========  ==========================================
"""

from __future__ import annotations

from collections.abc import Sequence

from forge.events.envelope import Recorded
from forge.telemetry.numbers import counter, gauge, histogram

deliveries = counter("forge_deliveries", "What became of deliveries.", "consumer", "outcome")
in_hand = gauge("forge_orders_in_hand", "Orders that run here.")
places = gauge("forge_places", "Orders that may be out at once.")
places_taken = gauge("forge_places_taken", "Orders that are out.")
orders = counter("forge_orders", "Orders given.")
orders_lost = counter("forge_orders_lost", "Orders that had gone and were given again.")
interruptions = counter("forge_projector_interruptions", "Times projecting was interrupted.", "stream")

_events = counter("forge_projected_events", "Events taken into the tables.", "stream")
_position = gauge("forge_projector_position", "The last event the tables have.", "stream")
_seconds = histogram("forge_projection_seconds", "Seconds of a transaction.", "stream")
_age = histogram("forge_projection_age_seconds", "Seconds from an event to its rows.", "stream")


def projected(stream: str, records: Sequence[Recorded], began: float, now: float) -> None:
    """Events were taken into the tables, from ``began`` until ``now``, in Unix seconds."""
    _events.labels(stream).inc(len(records))
    _position.labels(stream).set(records[-1].seq)
    _seconds.labels(stream).observe(now - began)
    _age.labels(stream).observe(max(0.0, now - records[0].meta.at.timestamp()))
