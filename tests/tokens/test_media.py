"""Images, audio and files by formula: published examples, headers of every format, and bytes that are none."""

from __future__ import annotations

import json
import struct
import zlib
from base64 import b64encode
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.tokens.media import NONE, Media, dimensions, image_tokens, media_of


def b64(data: bytes) -> str:
    return b64encode(data).decode()


def png(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"x" * 9


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0" * 20


def jpeg(width: int, height: int, thumbnail: int = 3000) -> bytes:
    exif = b"\xff\xe1" + struct.pack(">H", thumbnail + 2) + b"t" * thumbnail
    tables = b"\xff\xc4" + struct.pack(">H", 4) + b"hh"
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\0" * 9
    return b"\xff\xd8" + exif + tables + frame


def webp(kind: bytes, body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 100) + b"WEBP" + kind + struct.pack("<I", len(body)) + body + b"\0" * 10


@pytest.mark.parametrize(
    "data",
    [
        png(1024, 768),
        gif(1024, 768),
        jpeg(1024, 768),
        jpeg(1024, 768, thumbnail=60_000),
        webp(b"VP8X", b"\0" * 4 + (1023).to_bytes(3, "little") + (767).to_bytes(3, "little")),
        webp(b"VP8L", b"\x2f" + (1023 | 767 << 14).to_bytes(4, "little")),
        webp(b"VP8 ", b"\0" * 6 + struct.pack("<HH", 1024, 768)),
    ],
    ids=["png", "gif", "jpeg", "jpeg behind a thumbnail", "webp extended", "webp lossless", "webp lossy"],
)
def test_dimensions_are_read_from_the_header(data: bytes) -> None:
    assert dimensions(b64(data)) == (1024, 768)
    assert dimensions(b64(data + b"x" * 200_000)) == (1024, 768)


@given(
    st.one_of(
        st.text(max_size=100),
        st.binary(max_size=200).map(b64),
        st.binary(max_size=60).map(lambda x: b64(jpeg(9, 9)[:40] + x)),
    )
)
def test_any_text_in_place_of_an_image_is_harmless(data: str) -> None:
    size = dimensions(data)
    assert size is None or min(size) > 0


@pytest.mark.parametrize(
    ("model", "size", "low", "tokens"),
    [
        ("gpt-4o", (1024, 1024), False, 765),
        ("gpt-4o-2024-08-06", (2048, 4096), False, 1105),
        ("gpt-4o", (4096, 8192), True, 85),
        ("openai/gpt-4o", (512, 512), False, 255),
        ("gpt-4o", (1, 1), False, 255),
        ("gpt-4o", None, False, 85 + 8 * 170),
        ("gpt-4.1-mini", (1024, 1024), False, 1659),
        ("gpt-4.1-mini", (8192, 8192), False, 2489),
        ("gpt-6", (1024, 1024), False, 1229),
        ("claude-haiku-4-5", (280, 280), False, 100),
        ("claude-haiku-4-5", (281, 280), False, 110),
        ("gemini-2.5-pro", (10, 10), False, 1290),
        ("nobody-knows", (1024, 1024), False, 765),
    ],
)
def test_published_figures(model: str, size: tuple[int, int] | None, low: bool, tokens: int) -> None:
    assert image_tokens(model, size, low=low) == tokens


@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.sampled_from(["gpt-4o", "gpt-4.1-mini", "gpt-6", "claude-x", "o3"]),
)
def test_an_image_nobody_saw_counts_as_much_as_any_can(width: int, height: int, model: str) -> None:
    assert 0 < image_tokens(model, (width, height)) <= image_tokens(model, None)


def fields(**members: Any) -> dict[str, bytes]:
    return {name: json.dumps(value).encode() for name, value in members.items()}


def test_parts_of_a_chat() -> None:
    picture = b64(png(1024, 1024))
    messages = [
        {"role": "user", "content": "plain"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture}},
                {"type": "image_url", "image_url": {"url": "https://example.com/x.png", "detail": "low"}},
            ],
        },
    ]
    assert media_of("chat", fields(messages=messages), "gpt-4o") == Media(765 + 85, len(picture))


def test_parts_of_a_response() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_image", "image_url": "https://example.com/x.png"}]},
        {"type": "function_call_output", "output": [{"type": "input_image", "file_id": "f", "detail": "low"}]},
    ]
    assert media_of("responses", fields(input=items), "gpt-4o") == Media(1445 + 85, 0, 1445 - 255)


def test_audio_by_its_length() -> None:
    rate = 48_000
    wav = (
        b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0"
        + struct.pack("<II", 24_000, rate)
        + b"\x02\0\x10\0data"
        + b"\0" * rate * 3
    )
    content = [{"type": "input_audio", "input_audio": {"data": b64(wav), "format": "wav"}}]
    tokens = media_of("chat", fields(messages=[{"role": "user", "content": content}]), "gpt-4o-audio-preview").tokens
    assert tokens in (30, 31)
    content = [{"type": "input_audio", "input_audio": {"data": b64(b"\xff" * 30_000), "format": "mp3"}}]
    assert media_of("chat", fields(messages=[{"role": "user", "content": content}]), "x").tokens == 300


def test_files() -> None:
    data = b64(b"%PDF" * 3000)
    content = [
        {"type": "file", "file": {"file_data": "data:application/pdf;base64," + data}},
        {"type": "file", "file": {"file_id": "file-1"}},
    ]
    found = media_of("chat", fields(messages=[{"role": "user", "content": content}]), "gpt-4o")
    assert found == Media(6000 + 16_384, len(data), 6000 + 16_384)


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[", b'["image_url"', b'[{"content": [{"type": "image_url"', b'"image_url"', b"{}"]
)
def test_what_has_not_the_shape_counts_as_nothing(raw: bytes) -> None:
    assert media_of("chat", {"messages": raw}, "gpt-4o") == NONE


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=20)
    | st.sampled_from(["image_url", "input_audio", "file"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "content", "image_url", "url", "input_audio", "file", "data", "detail"]), inner
        )
    ),
    max_leaves=30,
)


@given(st.lists(json_values, max_size=4))
def test_any_json_gives_an_answer(messages: list[Any]) -> None:
    raw = msgspec.Raw(json.dumps([*messages, 'image_url"'], ensure_ascii=False).encode("utf-8", "replace"))
    found = media_of("chat", {"messages": raw}, "gpt-4o")
    assert found.tokens >= 0
    assert found.bytes >= 0
