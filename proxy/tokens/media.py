"""Tokens of images, audio and files in a prompt, by formula. Pure, and tolerant: any JSON gives an answer.

    family                              image
    tiles (gpt-4o, o1, o3, gpt-5 …)     fit into 2048 x 2048, shorter side to 768: base + per 512 x 512 tile
    patches (…-mini, …-nano, gpt-5.5+)  32 x 32 patches, scaled down to a cap, times a factor
    Claude                              28 x 28 patches, capped
    Gemini                              flat

Width and height are read from the first bytes of a data URL. What cannot be seen (a link, an id, a broken header)
counts as much as an image can. Audio is ten tokens a second: a WAV header says how long it is, any other format is
taken for the lowest bit rate that speech is sent in. A file counts a token for every two of its bytes.

These are the vendors' published rules where there are any, and measured figures elsewhere. They serve to reserve;
what is charged in the end is the provider's own count. How much of a figure may be too much is told with it: nothing
is refused or removed for tokens that may not be there.
"""

from __future__ import annotations

import math
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec

from proxy.types import Dialect

Raw = bytes | msgspec.Raw


class Media(NamedTuple):
    """What a prompt holds beside text."""

    tokens: int = 0
    bytes: int = 0
    """Of the encoded data, which is no text."""
    guessed: int = 0
    """Of the tokens, those beyond what it has at least, as far as that can be seen from here."""


NONE: Final = Media()

_MEMBERS: Final[Mapping[str, str]] = {"chat": "messages", "responses": "input"}
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_HEAD_CHARS: Final = 87_380
"""Base64 of the first 64 KB: a JPEG's size stands behind its thumbnail."""

AUDIO_TOKENS_PER_SECOND: Final = 10
_SLOWEST_AUDIO: Final = 1000
"""Bytes a second of compressed speech at 8 kbit/s."""
_FASTEST_AUDIO: Final = 40_000
"""And of compressed music at 320 kbit/s."""
_SMALLEST: Final = (1, 1)
"""What an image that cannot be seen has at least: width and height."""
_BYTES_PER_FILE_TOKEN: Final = 2
_UNSEEN_FILE: Final = 16_384

LOW_DETAIL: Final = 85
_CLAUDE: Final = "claude"
_CLAUDE_CAP: Final = 4096
_GEMINI: Final = "gemini"
_GEMINI_IMAGE: Final = 1290
_TILES: Final = {
    "gpt-4o-mini": (2833, 5667),
    "gpt-4o": (85, 170),
    "gpt-4.": (85, 170),
    "gpt-4-": (85, 170),
    "gpt-5": (70, 140),
    "o1": (75, 150),
    "o3": (75, 150),
}
_PATCHES: Final = {
    "gpt-4.1-mini": (1536, 1.62),
    "gpt-4.1-nano": (1536, 2.46),
    "gpt-5-mini": (1536, 1.62),
    "gpt-5-nano": (1536, 2.46),
    "gpt-5.5": (10_000, 1.2),
    "gpt-6": (10_000, 1.2),
    "o4-mini": (1536, 1.72),
}
_BY_LENGTH: Final = sorted((*_TILES, *_PATCHES), key=lambda prefix: -len(prefix))


def media_of(dialect: Dialect, fields: Mapping[str, Raw], model: str) -> Media:
    """Of a request body, given the raw members of its top level. `model` is the provider's name of it."""
    raw = fields.get(_MEMBERS.get(dialect, ""))
    if raw is None or not marked(body := bytes(raw)):
        return NONE  # text alone, as nearly always
    try:
        entries = msgspec.json.decode(body)
    except _NOT_JSON:
        return NONE
    family = family_of(model)
    return total(media_in(entry, family) for entry in (entries if isinstance(entries, list) else ()))


def standing_in(dialect: Dialect, fields: Mapping[str, Raw]) -> bool:
    """Media may stand in the prompt. False is certain; a scan takes 0.6 ms a megabyte, or 2 ms where tools are used."""
    raw = fields.get(_MEMBERS.get(dialect, ""))
    return raw is not None and marked(bytes(raw))


def marked(body: bytes) -> bool:
    """The bytes of a message, or of several, name a kind of part that is no text. Without it there are no media."""
    return b'"type"' in body and (
        b'"image_url"' in body
        or (b'file"' in body and (b'"file"' in body or b'"input_file"' in body))
        or (b'"input_' in body and (b'"input_image"' in body or b'"input_audio"' in body))
    )


def total(found: Iterable[Media]) -> Media:
    """The sum."""
    tokens = size = guessed = 0
    for media in found:
        tokens += media.tokens
        size += media.bytes
        guessed += media.guessed
    return Media(tokens, size, guessed)


def media_in(entry: object, family: str) -> Media:
    """Of one message or item, decoded. `family` is the model's, by `family_of`."""
    return total(_part(part, family) for part in _parts(entry))


def _parts(entry: object) -> Iterator[Mapping[str, Any]]:
    """Parts of a message, or of the result of a tool in the Responses API."""
    if isinstance(entry, dict):
        for member in ("content", "output"):
            content = entry.get(member)
            if isinstance(content, list):
                yield from (part for part in content if isinstance(part, dict))


def _part(part: Mapping[str, Any], family: str) -> Media:
    kind = part.get("type")
    if kind in ("image_url", "input_image"):
        image: Any = part.get("image_url")
        detail = part.get("detail")
        if isinstance(image, dict):
            image, detail = image.get("url"), image.get("detail", detail)
        data = _data(image)
        low, seen = detail == "low", dimensions(data)
        most = _image(family, seen, low=low)
        return Media(most, len(data), most - _image(family, seen or _SMALLEST, low=low))
    if kind == "input_audio":
        audio = part.get("input_audio")
        sound = audio.get("data") if isinstance(audio, dict) else None
        return _audio(sound if isinstance(sound, str) else "")
    if kind in ("file", "input_file"):
        inner: Any = part.get("file") if kind == "file" else part
        data = _data(inner.get("file_data") if isinstance(inner, dict) else None)
        size = len(data) * 3 // 4
        most = -(-size // _BYTES_PER_FILE_TOKEN) if size else _UNSEEN_FILE
        return Media(most, len(data), most)  # of a scanned page, nearly all bytes are its picture
    return NONE


def _data(url: Any) -> str:
    """The base64 of a data URL; empty for what is only a link."""
    if not isinstance(url, str) or not url.startswith("data:"):
        return ""
    return url.partition(",")[2]


def _head(data: str) -> bytes:
    text = data[:_HEAD_CHARS]
    try:
        return b64decode(text[: len(text) // 4 * 4] if len(data) > _HEAD_CHARS else text)
    except (NotBase64, ValueError):
        return b""


def _audio(data: str) -> Media:
    head = _head(data[:1024])
    size = len(data) * 3 // 4
    rate, fastest = _SLOWEST_AUDIO, _FASTEST_AUDIO
    if head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt ":
        rate = fastest = max(int.from_bytes(head[28:32], "little"), rate)
    most, least = (-(-size * AUDIO_TOKENS_PER_SECOND // one) for one in (rate, fastest))
    return Media(most, len(data), most - least)


def image_tokens(model: str, size: tuple[int, int] | None, *, low: bool = False) -> int:
    """Tokens of one image of (width, height) pixels; None: not known, so the most that one can have."""
    return _image(family_of(model), size, low=low)


@lru_cache(1024)
def family_of(model: str) -> str:
    """Which formula counts the images of a model: two models of one family count every part alike."""
    name = model.rpartition("/")[2].lower()
    for vendor in (_CLAUDE, _GEMINI):
        if vendor in name:
            return vendor
    return next((one for one in _BY_LENGTH if name.startswith(one)), "gpt-4o")


def _image(family: str, size: tuple[int, int] | None, *, low: bool) -> int:
    if family == _CLAUDE:
        return _CLAUDE_CAP if size is None else min(-(-size[0] // 28) * -(-size[1] // 28), _CLAUDE_CAP)
    if family == _GEMINI:
        return _GEMINI_IMAGE
    if family in _PATCHES:
        return _by_patches(size, *_PATCHES[family])
    base, tile = _TILES[family]
    return base if low else base + tile * _tiles(size)


def _tiles(size: tuple[int, int] | None) -> int:
    if size is None:
        return 8  # 768 x 2048
    width, height = size
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return max(math.ceil(width * scale / 512), 1) * max(math.ceil(height * scale / 512), 1)


def _by_patches(size: tuple[int, int] | None, cap: int, factor: float) -> int:
    patches = cap if size is None else min(-(-size[0] // 32) * -(-size[1] // 32), cap)
    return math.ceil(patches * factor)


def dimensions(data: str) -> tuple[int, int] | None:
    """Width and height of a PNG, GIF, WebP or JPEG in base64, from its first bytes; None if they do not say."""
    head = _head(data)
    size = None
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
        size = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    elif head[:4] == b"GIF8":
        size = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        size = _webp(head)
    elif head[:2] == b"\xff\xd8":
        size = _jpeg(head)
    return size if size is not None and size[0] and size[1] else None


def _webp(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return None


def _jpeg(head: bytes) -> tuple[int, int] | None:
    """Walks the segments to the frame header (SOF0 to SOF15, without the tables among them)."""
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(head[at + 7 : at + 9], "big"), int.from_bytes(head[at + 5 : at + 7], "big")
        at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return None
