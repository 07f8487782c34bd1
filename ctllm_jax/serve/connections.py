"""Connections that take up room without asking anything, and requests that a browser was tricked into.

aiohttp limits the size of headers and bodies, but waits for ever for the end of a header: here connections have a limit
of their number and of their time. Web pages elsewhere reach a server of this machine through the browser of whoever
looks at them; see `is_local`.
"""

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable

from aiohttp import web


class Doorkeeper:
    """Stands before aiohttp's protocol: makes connections, and closes those that dawdle."""

    def __init__(self, make: Callable[[], asyncio.Protocol], most: int, seconds: float):
        """
        Args:
          make: aiohttp's protocol for one connection.
          most: connections at a time; further ones are closed at once.
          seconds: until a request's header is complete, from the beginning or from the last answer on.
        """
        self._make, self._most, self._seconds = make, most, seconds
        self._timers: dict[asyncio.BaseTransport, asyncio.TimerHandle | None] = {}  # None: a request is being answered

    def __call__(self) -> asyncio.Protocol:
        return _Connection(self, self._make())

    def opened(self, transport: asyncio.Transport) -> None:
        self._timers[transport] = None
        if len(self._timers) > self._most:
            transport.abort()
        else:
            self._watch(transport)

    def closed(self, transport: asyncio.BaseTransport) -> None:
        if timer := self._timers.pop(transport, None):
            timer.cancel()

    def answering(self, transport: asyncio.BaseTransport) -> None:
        """A header is complete."""
        if timer := self._timers.get(transport):
            timer.cancel()
            self._timers[transport] = None

    def answered(self, transport: asyncio.Transport) -> None:
        if transport in self._timers:
            self._watch(transport)

    def _watch(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        self._timers[transport] = loop.call_later(self._seconds, transport.abort)


class _Connection(asyncio.Protocol):
    """Hands everything on."""

    def __init__(self, doorkeeper: Doorkeeper, inner: asyncio.Protocol):
        self._doorkeeper, self._inner = doorkeeper, inner
        self.data_received = inner.data_received
        self.eof_received = inner.eof_received
        self.pause_writing = inner.pause_writing
        self.resume_writing = inner.resume_writing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._inner.connection_made(transport)
        self._doorkeeper.opened(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._doorkeeper.closed(self._transport)
        self._inner.connection_lost(error)


def watched(doorkeeper: Callable[[], Doorkeeper]):
    """aiohttp's middleware that tells the doorkeeper when a request is being answered."""

    @web.middleware
    async def tell(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]):
        transport = request.transport
        if transport is None:
            return await handler(request)
        doorkeeper().answering(transport)
        try:
            return await handler(request)
        finally:
            doorkeeper().answered(transport)

    return tell


def is_local(host: str) -> bool:
    """Whether a Host header (name or address, with or without port) names this machine itself.

    A page whose own name is made to mean 127.0.0.1 once it is loaded (DNS rebinding) is of the same origin as a server
    there to the browser, and may ask it anything; but it asks for that name.
    """
    name = re.sub(r":\d*$", "", host).lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
