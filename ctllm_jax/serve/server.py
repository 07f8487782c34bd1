"""The HTTP side: routes, refusals, streams, and a clean end. aiohttp parses HTTP: gcsfs brings it along anyway."""

import asyncio
import contextlib
import functools
import ipaddress
import itertools
import json
import logging
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import ChatTemplate, own_template
from ctllm_jax.generate import encode_prompt
from ctllm_jax.serve.config import ServeConfig
from ctllm_jax.serve.connections import Doorkeeper, is_local, watched
from ctllm_jax.serve.protocol import Answer, ParsedRequest, Refusal, parse_request
from ctllm_jax.serve.worker import FAILED, STOPPED, Full, Worker
from ctllm_jax.slots import Decoder, Request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ENDINGS = {STOPPED: (503, "the server is being stopped"), FAILED: (500, "the model failed; the server ends")}
_quiet = logging.getLogger("ctllm_jax.serve.http")  # aiohttp tells the client what was malformed, that is enough
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class Server:
    """One model behind HTTP."""

    def __init__(self, decoder: Decoder, config: ServeConfig):
        """`decoder`: warm, and nobody else's from now on."""
        self._config, self._decoder = config, decoder
        self._name = config.name or decoder.model.name
        tokenizer = decoder.model.tokenizer
        self._template: ChatTemplate | None = None
        with contextlib.suppress(UserError):  # a model without a template completes texts
            self._template = own_template(tokenizer)
        self._stop_ids = frozenset([tokenizer.eos_id, *(self._template.end_ids if self._template else ())])
        self._numbers = itertools.count()  # of the requests without a seed
        self._stopping = False

    async def run(self, stop: asyncio.Event, ready: Callable[[str, int], None]) -> bool:
        """Serves until `stop` is set, then ends what is running, within `stop_seconds`.

        Args:
          stop: set from this event loop.
          ready: called with host and port once clients can come.

        Returns:
          Whether the model worked to the end.

        Raises:
          UserError: the address cannot be had.
        """
        config, loop = self._config, asyncio.get_running_loop()
        failed = asyncio.Event()

        def fail() -> None:
            loop.call_soon_threadsafe(lambda: (failed.set(), stop.set()))

        self._worker = Worker(self._decoder, config.slots, config.queue, fail)
        runner = web.AppRunner(
            self._application(),
            access_log=None,
            logger=_quiet,
            handler_cancellation=True,  # a client that goes frees its slot
            lingering_time=1.0,
            shutdown_timeout=2.0,
        )
        await runner.setup()
        self._doorkeeper = Doorkeeper(runner.server, config.connections, config.header_seconds)
        try:
            listening = await loop.create_server(self._doorkeeper, config.host, config.port, start_serving=False)
            self._local = all(ipaddress.ip_address(own.getsockname()[0]).is_loopback for own in listening.sockets)
            await listening.start_serving()
        except OSError as error:
            self._worker.close()
            await runner.cleanup()
            raise UserError(f"{config.host}:{config.port}: cannot listen there ({error.strerror})") from None
        ready(config.host, _port(listening.sockets))
        await stop.wait()
        self._stopping = True
        listening.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.stop_seconds):
                while self._worker.open:
                    await asyncio.sleep(0.05)
        await asyncio.to_thread(self._worker.close)
        await runner.cleanup()
        return not failed.is_set()

    def _application(self) -> web.Application:
        middlewares = [watched(lambda: self._doorkeeper), _refusals, self._same_machine]
        application = web.Application(middlewares=middlewares, client_max_size=self._config.body_bytes)
        application.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name}", self._model),
                web.post("/v1/chat/completions", functools.partial(self._complete, chat=True)),
                web.post("/v1/completions", functools.partial(self._complete, chat=False)),
            ]
        )
        return application

    @web.middleware
    async def _same_machine(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        host = http.headers.get("Host", "")
        if self._local and not is_local(host):
            why = f"this server is for its own machine, where its name is localhost or 127.0.0.1, not {host[:100]!r}"
            raise Refusal(403, f"{why}; a proxy before it must send one of them as Host", code="foreign_host")
        return await handler(http)

    # ---- Routes

    async def _health(self, http: web.Request) -> web.Response:
        well = self._worker.alive and not self._stopping
        state = {"status": "ok" if well else "stopping", "open": self._worker.open, "slots": self._config.slots}
        return web.json_response(state, status=200 if well else 503)

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def _model(self, http: web.Request) -> web.Response:
        if http.match_info["name"] != self._name:
            raise Refusal(404, f"there is one model: {self._name}", param="model", code="model_not_found")
        return web.json_response(self._card())

    def _card(self) -> dict:
        context = self._decoder.context
        return {"id": self._name, "object": "model", "created": 0, "owned_by": "ctllm-jax", "max_model_len": context}

    async def _complete(self, http: web.Request, chat: bool) -> web.StreamResponse:
        if chat and not self._template:
            raise Refusal(400, "the model's tokenizer has no chat template; use /v1/completions")
        parsed = parse_request(await self._body(http), chat, self._name, self._config.sampling)
        ids = await asyncio.to_thread(self._encode, parsed)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(text: str, reason: str | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (text, reason))

        row = 0 if parsed.seeded else next(self._numbers)
        request = Request(ids, parsed.sampling, self._stop_ids, deliver, row)
        if self._stopping:
            raise Refusal(*ENDINGS[STOPPED])
        try:
            self._worker.submit(request)
        except Full as full:
            raise Refusal(429, "the line is full; try again later", code="queue_full", wait=full.wait) from None
        answer = Answer(chat, self._name, len(ids))
        try:
            reply = self._stream if parsed.stream else self._whole
            return await reply(http, parsed, request, answer, _until_ended(events, self._config.seconds))
        finally:
            self._worker.cancel(request)

    async def _body(self, http: web.Request) -> bytes:
        if http.content_type != "application/json":  # what a web page may send anywhere without being asked is not
            raise Refusal(415, "the header must say: Content-Type: application/json", code="unsupported_media_type")
        seconds = self._config.header_seconds
        try:
            async with asyncio.timeout(seconds):
                return await http.read()
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {seconds:g} seconds") from None

    def _encode(self, parsed: ParsedRequest) -> list[int]:
        try:
            if parsed.messages:
                ids = self._template.render_prompt(parsed.messages)
            elif isinstance(parsed.prompt, str):
                ids = encode_prompt(self._decoder.model.tokenizer, parsed.prompt, None)
            else:
                ids = parsed.prompt
        except UserError as error:
            raise Refusal(400, str(error)) from None
        if problem := self._decoder.refusal(ids):
            raise Refusal(400, problem, code="context_length_exceeded" if len(ids) >= self._decoder.context else None)
        return ids

    async def _whole(self, http, parsed: ParsedRequest, request: Request, answer: Answer, events) -> web.Response:
        parts = [event async for event in events]
        text = "".join(text for text, _ in parts)
        return web.json_response(answer.whole(text, parts[-1][1], request.tokens))

    async def _stream(
        self, http, parsed: ParsedRequest, request: Request, answer: Answer, events
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(http)

        async def send(*entries: dict | str) -> None:
            for entry in entries:
                data = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
                await self._write(http, response, f"data: {data}\n\n".encode())

        try:
            await send(*answer.opening())
            async for text, reason in events:
                await send(*answer.part(text, reason))
            if parsed.usage:
                await send(answer.closing(request.tokens))
            await send("[DONE]")
        except Refusal as refusal:
            await send(refusal.body)
        return response

    async def _write(self, http: web.Request, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._config.header_seconds):
                await response.write(data)
        except TimeoutError:
            if http.transport:
                http.transport.abort()
            raise ConnectionResetError("the client does not read") from None


async def _until_ended(events: asyncio.Queue, seconds: float) -> AsyncIterator[tuple[str, str | None]]:
    """(text, reason) until there is a reason.

    Raises:
      Refusal: the time is over, or the server's.
    """
    end = asyncio.get_running_loop().time() + seconds
    reason = None
    while not reason:
        try:
            async with asyncio.timeout_at(end):
                text, reason = await events.get()
        except TimeoutError:
            raise Refusal(504, f"the answer took longer than {seconds:g} seconds", code="timeout") from None
        if reason in ENDINGS:
            raise Refusal(*ENDINGS[reason])
        yield text, reason


@web.middleware
async def _refusals(http: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in the form that OpenAI's clients read."""
    try:
        return await handler(http)
    except Refusal as refusal:
        return _error(refusal)
    except web.HTTPException as error:
        return _error(Refusal(error.status, f"{http.method} {http.path[:200]}: {error.reason}"))
    except ConnectionError:  # the client has gone; nobody reads what is answered
        raise
    except Exception:
        traceback.print_exc()
        return _error(Refusal(500, "an error in the server; its log has more"))


def _error(refusal: Refusal) -> web.Response:
    headers = {"Retry-After": str(refusal.wait)} if refusal.wait else {}
    return web.json_response(refusal.body, status=refusal.status, headers=headers)


def _port(sockets: list[socket.socket]) -> int:
    return sockets[0].getsockname()[1]
