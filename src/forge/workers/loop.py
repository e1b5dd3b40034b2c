"""The worker loop: pull → decode → heartbeat while handling → ack. One place, readable at one sitting.

Redelivery is for crashes: a delivery that is not acked means that its worker died. So a handler either ends
with everything written down (``DONE``, acked) or hands the delivery back at once for another worker
(``RELEASE``). Failures of the work itself are events, and then done. A negative ack with a delay is never
used: it would hold one of the three places.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import Error as JetStreamError

from forge.broker import heed_cancellation
from forge.errors import ForgeError, LogUnavailable
from forge.workers.numbers import deliveries

log = logging.getLogger("forge.loop")

PULL_SECONDS = 2.0
HEARTBEAT_SECONDS = 2.5
LEASE_SECONDS = 8.0
"""Without a confirmed heartbeat for so long the delivery may be somebody else's; below the consumer's
``ack_wait`` of 10 s."""


class Outcome(Enum):
    """What becomes of a delivery: taken off for good, given back for another worker, or left alone, since
    somebody else has it by now and a word of ours would count for them."""

    DONE = b"+ACK"
    RELEASE = b"-NAK"
    LEAVE = b""


class Delivery:
    """One message in a worker's hands."""

    def __init__(self, nc: Client, message: Msg) -> None:
        self.data, self.subject = message.data, message.subject
        self.sequence = message.metadata.sequence.stream
        self.at = message.metadata.timestamp  # when the server took it in, by its clock
        self.consumer = message.metadata.consumer
        self._nc, self._reply = nc, message.reply
        self._confirmed = time.monotonic()

    @property
    def held(self) -> bool:
        """Whether the lease is surely still ours."""
        return time.monotonic() - self._confirmed < LEASE_SECONDS

    async def keep(self) -> None:
        """Renew the lease until it is lost.

        Raises:
            LogUnavailable: nothing confirmed it for too long.
        """
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if not self.held:
                raise LogUnavailable(f"the lease on {self.subject} is lost")
            with suppress(LogUnavailable):
                await self._say(b"+WPI", LEASE_SECONDS / 4)
                self._confirmed = time.monotonic()

    async def settle(self, outcome: Outcome) -> None:
        """Tell the server what became of it; a lost answer only means that it is delivered again."""
        deliveries.labels(self.consumer, outcome.name.lower()).inc()
        if outcome is Outcome.LEAVE:
            return
        with suppress(LogUnavailable):
            await self._say(outcome.value, 2.0)

    async def _say(self, word: bytes, timeout: float) -> None:
        try:
            await self._nc.request(self._reply, word, timeout=timeout)
        except (TimeoutError, nats.errors.Error) as error:
            raise LogUnavailable(repr(error)) from error
        finally:
            heed_cancellation()


Handler = Callable[[Delivery], Awaitable[Outcome]]


Gate = Callable[[asyncio.Event], Awaitable[None]]


async def _always(_: asyncio.Event) -> None:
    """The gate of those who can take work at any time."""


async def consume(
    nc: Client, stream: str, consumer: str, handler: Handler, stop: asyncio.Event, gate: Gate = _always
) -> None:
    """Handle one delivery after the other until ``stop`` is set; the one in hand is finished first.

    ``gate`` is passed before each; it returns when work may be taken, and at the latest when ``stop`` is set.
    """
    pause = 0.1
    while not stop.is_set():
        await gate(stop)
        try:
            message = await _pull(nc, stream, consumer, stop)
        except (JetStreamError, nats.errors.Error) as error:
            log.warning("pulling failed", extra={"consumer": consumer, "error": repr(error)})
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)
            continue
        pause = 0.1
        if message is not None:
            await _handle(Delivery(nc, message), handler)


async def _pull(nc: Client, stream: str, consumer: str, stop: asyncio.Event) -> Msg | None:
    """One message, or None when ``stop`` is set; a pull that was given up never swallows one."""
    subscription = await nc.jetstream().pull_subscribe_bind(consumer, stream=stream)
    try:
        while not stop.is_set():
            try:
                [message] = await subscription.fetch(1, timeout=PULL_SECONDS)
                return message
            except TimeoutError:
                continue
            finally:
                heed_cancellation()
        return None
    finally:
        with suppress(nats.errors.Error):
            await subscription.unsubscribe()


async def _handle(delivery: Delivery, handler: Handler) -> None:
    keeping = asyncio.create_task(delivery.keep(), name=f"lease of {delivery.subject}")
    handling = asyncio.create_task(_outcome(delivery, handler), name=f"handling {delivery.subject}")
    try:
        await asyncio.wait({keeping, handling}, return_when=asyncio.FIRST_COMPLETED)
        if handling.done():
            await delivery.settle(handling.result())
        else:
            # whoever has the lease now finds what this worker left; results of ours would be refused
            deliveries.labels(delivery.consumer, "lost").inc()
            log.warning("lease lost", extra={"subject": delivery.subject})
    except asyncio.CancelledError:
        # stopping: whoever comes next adopts what runs, at once and not only when the lease ends
        await asyncio.shield(delivery.settle(Outcome.RELEASE))
        raise
    finally:
        for task in (handling, keeping):
            task.cancel()
        await asyncio.gather(handling, keeping, return_exceptions=True)


async def _outcome(delivery: Delivery, handler: Handler) -> Outcome:
    try:
        return await handler(delivery)
    except ForgeError as error:
        log.warning("handling is interrupted", extra={"subject": delivery.subject, "error": repr(error)})
    except Exception:
        log.exception("handling failed", extra={"subject": delivery.subject})
    await asyncio.sleep(1.0)  # held meanwhile, so that a persistent fault does not spin
    return Outcome.RELEASE
