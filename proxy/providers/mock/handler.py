"""The mock provider: an upstream in OpenAI's wire format, as a pure function of the request.

The same seed and the same request give the same bytes, ids and times included; no clock is read and nothing is
fetched. It is honest where it matters to a proxy's tests: it counts real tokens, refuses what a provider would
refuse, keeps books (`ledger`), and fails on request (`faults`, `script`). It says nothing sensible. With the prompt
cache on (`prefixes`), usage tells what was cached, and that depends on the requests before.

    request ─▶ script step? ─▶ route ─▶ parse ─▶ admit ─▶ compose ─▶ draft ─▶ fault ─▶ pace ─▶ Answer ─▶ ledger
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qs, unquote

import orjson

from proxy.providers.mock import faults, other
from proxy.providers.mock.ask import Prompt, parse
from proxy.providers.mock.chat import chat, completions
from proxy.providers.mock.compose import BENCH
from proxy.providers.mock.counting import Memo
from proxy.providers.mock.draft import Draft, paced, plain, refused
from proxy.providers.mock.ledger import Ledger, fingerprint
from proxy.providers.mock.prefixes import Prefixes
from proxy.providers.mock.refusal import Refusal
from proxy.providers.mock.responses import Stored, read_input, responses
from proxy.providers.mock.script_steps import Script
from proxy.providers.mock.text import Count
from proxy.transport.answer import Answer, Serving
from proxy.types import Headers

_MODELS: Final = ("mock-large", "mock-small", "gpt-4o-mini", "text-embedding-3-small", *faults.NAMES)
_MOST_REMEMBERED: Final = 256
_LONGEST_REMEMBERED: Final = 262_144
"""Bytes that one remembered request may cost. With the number above it bounds the memory of ready answers to 64 MiB."""

_Generator = Callable[[Prompt, Count], Draft]
_GENERATORS: Final[dict[str, _Generator]] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/embeddings": other.embeddings,
    "/v1/moderations": other.moderations,
    "/v1/audio/speech": other.speech,
}
_CACHED: Final = frozenset({"/v1/chat/completions", "/v1/responses"})
"""Where the prompt cache looks."""


class _Ready:
    """An answer with what the ledger needs: what is remembered for equal requests."""

    __slots__ = ("answer", "billed", "cached_tokens", "model", "path", "prompt_tokens", "request_id")

    def __init__(self, answer: Answer, draft: Draft, path: str, model: str, request_id: bytes) -> None:
        self.answer = answer
        self.billed = draft.billed
        self.prompt_tokens = draft.prompt_tokens
        self.cached_tokens = draft.cached_tokens
        self.path = path
        self.model = model
        self.request_id = request_id


class Mock:
    """A `Handler`. Not bound to an event loop; one may serve an in-process transport and a server alike.

    Its own pages stand under `/__` and `/v1/__`: `GET /__health`; `GET` and `DELETE /__ledger`; `POST /__outage`, from
    which on everything else is answered 503, and `DELETE /__outage`, which ends that.
    """

    def __init__(
        self,
        count: Count,
        *,
        seed: int = 0,
        tokens_per_second: float = 0.0,
        first_token_ms: float = 0.0,
        slow_ms: float = 2000.0,
        script: Script | None = None,
        ledger: Ledger | None = None,
        prompt_cache: bool = False,
    ) -> None:
        """`count`: tokens of a text. `tokens_per_second`: 0 is as fast as possible. `slow_ms`: of the model `slow`.

        `prompt_cache`: prompts of chat and responses are compared with the earlier ones of the same key and model, and
        usage and ledger say how much of each was cached. So the same request does not get the same bytes again.
        """
        self.ledger = ledger if ledger is not None else Ledger()
        self._count = Memo(count)
        self._seed = str(seed).encode()[:64]
        self._rate = tokens_per_second
        self._first = first_token_ms / 1000
        self._slow = slow_ms / 1000
        self._script = script
        self._stored = Stored()
        self._prefixes = Prefixes() if prompt_cache else None
        self._out = False
        """An outage: every request but those for the mock's own pages is answered 503."""
        self._ready: dict[tuple[bytes, bytes], _Ready] = {}

    def handle(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> Serving:
        request_id = authorization = content_type = b""
        for name, value in headers:
            if name == b"x-request-id":
                request_id = value
            elif name == b"authorization":
                authorization = value
            elif name in (b"api-key", b"x-api-key"):
                authorization = authorization or value
            elif name == b"content-type":
                content_type = value
        ready = self._ready.get((target, body)) if method == b"POST" and not self._out else None
        if ready is None or self._script is not None:
            path, _, query = target.partition(b"?")
            text = unquote(path.decode("latin-1"))
            if text.startswith(("/__", "/v1/__")):
                text = text.removeprefix("/v1")
                return Serving(self._own(method, text, parse_qs(query.decode("latin-1"))).answer(), request_id)
            ready = self._answer(method, text, query, content_type, body, authorization)
            self._remember(ready, method, target, body)
        entry = self.ledger.open(
            ready.path,
            ready.model,
            ready.answer.status,
            ready.prompt_tokens,
            ready.billed,
            request_id or ready.request_id,
            authorization,
            ready.cached_tokens,
        )
        return Serving(ready.answer, request_id or ready.request_id, entry)

    def _answer(
        self, method: bytes, path: str, query: bytes, content_type: bytes, body: bytes, authorization: bytes
    ) -> _Ready:
        model = ""
        request_id = b"req_mock"
        prompt = None
        step = None
        try:
            if method == b"POST" and (path in _GENERATORS or path.startswith("/v1/responses")):
                prompt = parse(self._seed, path, body)
                model = prompt.model
                request_id = b"req_" + prompt.ident.encode()
                prompt.prefixes = self._prefixes if path in _CACHED else None
                prompt.owner = "\n".join((path, prompt.name, fingerprint(authorization) or "")).encode()
            if self._out:
                raise Refusal(503, "The mock has an outage.", code="outage")
            step = self._script.take(path, model) if self._script is not None else None
            draft = step.draft() if step is not None else None
            if draft is None:
                draft = self._route(method, path, query, content_type, body, prompt)
        except Refusal as refusal:
            draft = refused(refusal)
        if step is not None:
            step.bend(draft)
        return _Ready(draft.answer(), draft, path, model, request_id)

    def _route(
        self, method: bytes, path: str, query: bytes, content_type: bytes, body: bytes, prompt: Prompt | None
    ) -> Draft:
        """Raises Refusal."""
        if prompt is not None:
            return self._generate(path, prompt)
        if method in (b"GET", b"HEAD", b"DELETE"):
            return self._stored_object(method, path, query)
        if method == b"POST" and path == "/v1/files":
            return other.upload(content_type, body)
        raise _unknown(method, path)

    def _generate(self, path: str, prompt: Prompt) -> Draft:
        if path == "/v1/responses/input_tokens":
            read_input(prompt, self._count)
            return plain(orjson.dumps({"object": "response.input_tokens", "input_tokens": prompt.prompt_tokens}))
        generator = _GENERATORS.get(path)
        if generator is None and path != "/v1/responses":
            raise _unknown(b"POST", path)
        faults.before(prompt)
        if generator is not None:
            draft = generator(prompt, self._count)
        else:
            draft = responses(prompt, self._count, self._stored)
        sized = BENCH.fullmatch(prompt.name)
        rate = float(sized[2]) if sized and sized[2] else self._rate
        first = self._slow if prompt.name == "slow" else self._first
        faults.after(prompt, draft, path)
        paced(draft, rate, first)
        return draft

    def _stored_object(self, method: bytes, path: str, query: bytes) -> Draft:
        parts = path.split("/")
        reads = method != b"DELETE"
        if path == "/v1/models" and reads:
            return other.model_list(list(_MODELS))
        if path.startswith("/v1/models/") and reads:
            return other.model(path.removeprefix("/v1/models/"))
        if path.startswith("/v1/files/") and len(parts) == 5 and parts[4] == "content" and reads:
            return other.file_content()
        if path.startswith("/v1/responses/") and len(parts) in (4, 5):
            return self._stored_response(parts[3:], reads, query)
        raise _unknown(method, path)

    def _stored_response(self, parts: list[str], reads: bool, query: bytes) -> Draft:
        response, items = self._stored.get(parts[0])
        if parts[1:] == ["input_items"] and reads:
            return plain(orjson.dumps({"object": "list", "data": items, "has_more": False}))
        if len(parts) > 1:
            raise Refusal(404, "There is no such part of a response.")
        if not reads:
            self._stored.remove(parts[0])
            return plain(orjson.dumps({"id": parts[0], "object": "response", "deleted": True}))
        if b"stream=true" in query:
            raise Refusal(400, "The mock does not replay a stored response as a stream.", param="stream")
        return plain(orjson.dumps(response))

    def _own(self, method: bytes, path: str, query: dict[str, list[str]]) -> Draft:
        """The mock's own pages, which are in no ledger."""
        if path == "/__health" and method in (b"GET", b"HEAD"):
            return plain(b'{"status":"ok"}')
        if path == "/__outage" and method in (b"POST", b"DELETE"):
            self._out = method == b"POST"
            return plain(orjson.dumps({"outage": self._out}))
        if path == "/__ledger" and method == b"DELETE":
            return plain(orjson.dumps({"dropped": self.ledger.reset()}))
        if path == "/__ledger" and method in (b"GET", b"HEAD"):
            asked = {name: query.get(name, [otherwise])[0] for name, otherwise in (("since", "0"), ("limit", "100000"))}
            if all(value.isascii() and value.isdigit() and len(value) < 16 for value in asked.values()):
                return plain(orjson.dumps(self.ledger.read(int(asked["since"]), int(asked["limit"]))))
            return refused(Refusal(400, "'since' and 'limit' must be whole numbers."))
        return refused(_unknown(method, path))

    def _remember(self, ready: _Ready, method: bytes, target: bytes, body: bytes) -> None:
        """Keeps an answer that depends on nothing but the request's target and body."""
        if method != b"POST" or ready.path not in _GENERATORS or self._script is not None or self._out:
            return
        if self._prefixes is not None and ready.path in _CACHED:
            return
        size = sum(len(data) for _, data in ready.answer.steps)
        if len(body) + 3 * size > _LONGEST_REMEMBERED:  # a server keeps two encodings beside the steps
            return
        if len(self._ready) >= _MOST_REMEMBERED:
            del self._ready[next(iter(self._ready))]
        self._ready[target, body] = ready


def _unknown(method: bytes, path: str) -> Refusal:
    shown = f"{method.decode('latin-1')[:16]} {path[:200]}"
    return Refusal(404, f"Invalid URL ({shown})", code="unknown_url")
