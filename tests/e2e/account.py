"""An upstream that keeps what it makes, as a provider's account does: responses and conversations, under its own ids.

It serves whoever has them by their id: who may have them is the gateway's to know.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.e2e.scene import END, SSE, chunk, plain
from tests.transport.servers import Peer

USAGE = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}


class Account:
    """`script` plays it. `pause`, where set, holds a stream back between its first events and its last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        """Method, path without the prefix, and body of each request."""
        self.answers: dict[str, tuple[bytes, ...]] = {}
        """Whole answers by path, in the pieces in which they are sent."""
        self.pause: asyncio.Event | None = None
        self._made = 0

    @property
    def last(self) -> tuple[str, str, Any]:
        return self.asked[-1]

    async def script(self, peer: Peer) -> None:
        while True:
            received = await peer.request()
            method, target, _ = received.head.decode().split(" ", 2)
            path = target.partition("?")[0].removeprefix("/v1")
            body = json.loads(received.body) if received.body else None
            self.asked.append((method, path, body))
            if path in self.answers:
                await peer.send(*self.answers[path])
            elif method == "POST" and path == "/responses" and body.get("stream"):
                await self._stream(peer, self._response(body))
            else:
                status, answer = self._answer(method, path, body)
                await peer.send(plain(json.dumps(answer).encode(), status))

    def _answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        first, object_id, *rest = [*path[1:].split("/"), ""]
        if method == "POST" and path == "/responses":
            return 200, self._response(body)
        if method == "POST" and path == "/responses/input_tokens":
            return 200, {"object": "response.input_tokens", "input_tokens": 11}
        if method == "POST" and path == "/responses/compact":
            made = {"id": self._id("cmp"), "object": "response.compaction", "created_at": 1, "output": []}
            return 200, {**made, "usage": USAGE}
        if method == "POST" and path == "/conversations":
            return 200, self._keep({"id": self._id("conv"), "object": "conversation", "created_at": 1, "metadata": {}})
        if first not in ("responses", "conversations") or object_id not in self.kept:
            return 404, {"error": {"message": "Not found here.", "type": "invalid_request_error"}}
        if method == "DELETE":
            del self.kept[object_id]
            return 200, {"id": object_id, "object": "response", "deleted": True}
        if rest[:1] == ["input_items"]:
            return 200, {"object": "list", "data": [], "has_more": False, "first_id": "", "last_id": ""}
        return 200, self.kept[object_id]

    def _id(self, kind: str) -> str:
        self._made += 1
        return f"{kind}_{self.name}_{self._made}"

    def _keep(self, made: dict[str, Any]) -> dict[str, Any]:
        self.kept[made["id"]] = made
        return made

    def _response(self, body: Any) -> dict[str, Any]:
        conversation = body.get("conversation")
        return self._keep(
            {
                "id": self._id("resp"),
                "object": "response",
                "created_at": 1,
                "status": "completed",
                "model": body["model"],
                "conversation": {"id": conversation} if isinstance(conversation, str) else conversation,
                "previous_response_id": body.get("previous_response_id"),
                "output": [
                    {
                        "id": "msg_1",
                        "type": "message",
                        "role": "assistant",
                        "status": "completed",
                        "content": [{"type": "output_text", "text": "Hello from " + self.name, "annotations": []}],
                    }
                ],
                "usage": USAGE,
            }
        )

    async def _stream(self, peer: Peer, made: dict[str, Any]) -> None:
        begun = {**made, "status": "in_progress", "output": [], "usage": None}
        # Without some content, too, nothing is forwarded yet: another provider might still answer.
        await peer.send(SSE, _event("response.created", begun), _delta("Hello"))
        if self.pause is not None:
            await self.pause.wait()
        await peer.send(_event("response.completed", made), END)


def _delta(text: str) -> bytes:
    kind = "response.output_text.delta"
    data = {"type": kind, "sequence_number": 1, "item_id": "msg_1", "output_index": 0, "content_index": 0}
    return chunk(f"event: {kind}\ndata: {json.dumps({**data, 'delta': text, 'logprobs': []})}\n\n".encode())


def _event(kind: str, response: dict[str, Any]) -> bytes:
    data = json.dumps({"type": kind, "sequence_number": 0, "response": response})
    return chunk(f"event: {kind}\ndata: {data}\n\n".encode())
