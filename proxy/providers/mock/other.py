"""The routes that generate no text: embeddings, models, moderations, speech, files."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from array import array
from typing import Any, Final

import orjson

from proxy.providers.mock.admission import admit
from proxy.providers.mock.ask import Json, Prompt, whole
from proxy.providers.mock.draft import Draft, plain
from proxy.providers.mock.refusal import Refusal, invalid
from proxy.providers.mock.text import Count

_DIMENSIONS: Final = 1536
_MOST_INPUTS: Final = 2048
_BINARY: Final = bytes(range(256)) * 16
"""What the binary routes serve: every byte value, so that a proxy which decodes text on its way is found out."""


def embeddings(prompt: Prompt, count: Count) -> Draft:
    """Raises Refusal."""
    body = prompt.body
    inputs = _inputs(body.get("input"))
    size = whole(body, "dimensions", 1, 4096) or _DIMENSIONS
    form = body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise invalid("'encoding_format' must be 'float' or 'base64'.", "encoding_format", "invalid_value")
    data = []
    for i, text in enumerate(inputs):
        vector = _unit(f"{prompt.name}\n{text}", size)
        value = vector.tolist() if form == "float" else base64.b64encode(_little_endian(vector)).decode()
        data.append({"object": "embedding", "index": i, "embedding": value})
    tokens = prompt.prompt_tokens = sum(count(text) if isinstance(text, str) else len(text) for text in inputs)
    admit(prompt, count, "input")
    answer: Json = {"object": "list", "data": data, "model": prompt.model}
    if prompt.name != "no-usage":
        answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return plain(orjson.dumps(answer), tokens)


def _inputs(value: Any) -> list[Any]:
    """`input`: a string, tokens, or a list of either. Raises Refusal."""
    if isinstance(value, str) and value:
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, int) for item in value):
            return [value]
        if len(value) <= _MOST_INPUTS and all(isinstance(item, str | list) and item for item in value):
            return value
    raise invalid("'input' must be a text, a list of tokens, or up to 2048 of either.", "input", "invalid_type")


def _unit(text: str, size: int) -> array[float]:
    """A vector of length 1 (float32) made from the text. A shorter one is the beginning of a longer one, rescaled."""
    stream = hashlib.shake_256(text.encode()).digest(4 * size)
    values = [word / 2147483648.0 - 1.0 for word in struct.unpack(f"<{size}I", stream)]
    norm = math.sqrt(math.fsum(value * value for value in values)) or 1.0
    return array("f", [value / norm for value in values])


def _little_endian(vector: array[float]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *vector)


def moderations(prompt: Prompt, count: Count) -> Draft:
    """Nothing is ever flagged. Raises Refusal."""
    inputs = _inputs(prompt.body.get("input"))
    names = ("harassment", "hate", "illicit", "self-harm", "sexual", "violence")
    random = prompt.random()
    results = [
        {
            "flagged": False,
            "categories": dict.fromkeys(names, False),
            "category_scores": {name: round(random.random() / 100, 6) for name in names},
            "category_applied_input_types": {name: ["text"] for name in names},
        }
        for _ in inputs
    ]
    return plain(orjson.dumps({"id": "modr-" + prompt.ident, "model": prompt.model, "results": results}))


def speech(prompt: Prompt, count: Count) -> Draft:
    """Bytes that are no sound: 4 KB of every byte value for each word. Raises Refusal."""
    text = prompt.body.get("input")
    if not isinstance(text, str) or not text:
        raise invalid("'input' must be a text.", "input", "invalid_type")
    return plain(_BINARY * min(len(text.split()) or 1, 256), count(text), 0, b"audio/mpeg")


def model_list(names: list[str]) -> Draft:
    return plain(orjson.dumps({"object": "list", "data": [_model(name) for name in names]}))


def model(name: str) -> Draft:
    """Every name is a model but `404`. Raises Refusal."""
    if name.removeprefix("mock/") == "404":
        raise Refusal(404, f"The model '{name}' does not exist.", param="model", code="model_not_found")
    return plain(orjson.dumps(_model(name)))


def _model(name: str) -> Json:
    return {"id": name, "object": "model", "created": 1_790_000_000, "owned_by": "mock"}


def file_content() -> Draft:
    return plain(_BINARY, content_type=b"application/octet-stream")


def upload(content_type: bytes, body: bytes) -> Draft:
    """`POST /v1/files`: says how many bytes of the file came, keeps none of them. Raises Refusal."""
    parts = _multipart(content_type, body)
    if "file" not in parts:
        raise invalid("A form field 'file' is required.", "file", "missing_required_parameter")
    filename, data = parts["file"]
    digest = hashlib.blake2b(data, digest_size=12).hexdigest()
    answer = {
        "id": "file-" + digest,
        "object": "file",
        "bytes": len(data),
        "created_at": 1_790_000_000,
        "filename": filename or "upload",
        "purpose": parts.get("purpose", ("", b"user_data"))[1].decode("utf-8", "replace"),
        "status": "processed",
    }
    return plain(orjson.dumps(answer))


def _multipart(content_type: bytes, body: bytes) -> dict[str, tuple[str, bytes]]:
    """name -> (file name or "", content). Raises Refusal."""
    kind, _, parameters = content_type.partition(b";")
    boundary = _parameter(parameters, b"boundary")
    if kind.strip().lower() != b"multipart/form-data" or not boundary:
        raise invalid("The body must be multipart/form-data with a boundary.")
    sections = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if len(sections) < 2 or not sections[-1].startswith(b"--"):
        raise invalid("The multipart body does not end with its boundary.")
    parts = {}
    for section in sections[1:-1]:
        head, found, data = section.partition(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if found and name.lower() == b"content-disposition":
                key = _parameter(value, b"name").decode("utf-8", "replace")
                parts[key] = (_parameter(value, b"filename").decode("utf-8", "replace"), data)
    return parts


def _parameter(value: bytes, name: bytes) -> bytes:
    """One parameter of a header value; b"" if it is not there."""
    for item in value.split(b";"):
        key, _, found = item.strip().partition(b"=")
        if key.lower() == name:
            return found.strip(b'"')
    return b""
