"""Secrets that must never come out, and the ways in which they are written.

A canary is a text that somebody might hand to the log, and the secret in it. The secrets are made up, and stand here in
two parts, so that no scanner of repositories takes them for real.
"""

from __future__ import annotations

import base64
import json
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote

_random = random.Random(20)


def _made(length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """Always with a digit and both cases, where the alphabet has them."""
    body = "".join(_random.choices(alphabet, k=length - 3))
    return body + "".join(_random.choice([c for c in alphabet if c in part] or alphabet) for part in _KINDS)


_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
_URLSAFE = string.ascii_letters + string.digits + "-_"
_HEX = "0123456789abcdef"


@dataclass(frozen=True)
class Canary:
    name: str
    text: str
    secret: str
    """What must not appear: the text without what is public about it."""


def _shaped(name: str, prefix: str, length: int = 40, alphabet: str = _URLSAFE) -> Canary:
    secret = _made(length, alphabet).replace("-", "x", 1) if alphabet is _URLSAFE else _made(length, alphabet)
    return Canary(name, f"the key {prefix}{secret} was used", secret)


def _in(name: str, template: str, length: int = 18) -> Canary:
    secret = _made(length)
    return Canary(name, template.format(secret), secret)


SHAPED = [
    _shaped("openai project", "sk-" + "proj-", 74),
    _shaped("openai service account", "sk-" + "svcacct-", 58),
    _shaped("openai admin", "sk-" + "admin-", 58),
    _shaped("openai legacy", "sk-", 48, string.ascii_letters + string.digits),
    _shaped("openai none", "sk-" + "None-", 48),
    _shaped("anthropic", "sk-" + "ant-api03-", 93),
    _shaped("anthropic admin", "sk-" + "ant-admin01-", 93),
    _shaped("openrouter", "sk-" + "or-v1-", 64, _HEX),
    _shaped("google", "AI" + "za", 35),
    _shaped("google oauth", "ya" + "29.", 60),
    _shaped("groq", "gs" + "k_", 52, string.ascii_letters + string.digits),
    _shaped("xai", "xa" + "i-", 80, string.ascii_letters + string.digits),
    _shaped("huggingface", "h" + "f_", 34, string.ascii_letters),
    _shaped("perplexity", "pp" + "lx-", 48),
    _shaped("nvidia", "nv" + "api-", 64),
    _shaped("aws", "AK" + "IA", 16, string.ascii_uppercase + "234567"),
    _shaped("aws temporary", "AS" + "IA", 16, string.ascii_uppercase + "234567"),
    _shaped("github", "gh" + "p_", 36, string.ascii_letters + string.digits),
    _shaped("github oauth", "gh" + "o_", 36, string.ascii_letters + string.digits),
    _shaped("github fine-grained", "github" + "_pat_", 82),
    _shaped("gitlab", "gl" + "pat-", 20),
    _shaped("slack bot", "xo" + "xb-", 50),
    _shaped("slack user", "xo" + "xp-", 50),
    _shaped("slack app", "xa" + "pp-", 50),
    _shaped("stripe", "sk" + "_live_", 24, string.ascii_letters + string.digits),
    _shaped("ours", "b" + "w_", 43),
    _shaped("jwt", "ey" + "J", 90),
    _in("url userinfo", "redis://user:{}@cache.internal:6379/0"),
    _in("url password only", "connecting to rediss://:{}@10.0.0.1"),
    _in("url user only", "https://{}@sentry.example/42"),
    _in("pem", "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE{}\n-----END RSA PRIVATE KEY-----", 200),
    _in("pem cut off", "-----BEGIN " + "PRIVATE KEY-----\nMIIE{}", 100),
    _in("bearer", "curl -H 'Bearer {}'"),
    _in("basic", "Basic {}=="),
    _in("shared access signature", "https://x.example/blob?sv=1&sig={}&se=2"),
]

NAMED = [
    _in("env assignment", "OPENAI_API_KEY={}"),
    _in("json list", '"api_keys": ["{}", "x"]'),
    _in("yaml", "api_key: {}"),
    _in("json", '{{"apiKey": "{}", "n": 1}}'),
    _in("python dict", "{{'password': '{}', 'user': 'bob'}}"),
    _in("python headers", "[(b'host', b'a'), (b'authorization', b'Bearer {}')]"),
    _in("header", "X-Api-Key: {}"),
    _in("azure header", "api-key: {}"),
    _in("authorization", "authorization: Custom {}"),
    _in("digest", "Authorization: Digest username=bob, response={}"),
    _in("cookie", "Cookie: a=1; session={}; b=2"),
    _in("set-cookie", "set-cookie: session={}; HttpOnly"),
    _in("query", "GET /x?user=bob&access_token={}&page=2"),
    _in("client secret", "client_secret = '{}'"),
    _in("aws secret", "aws_secret_access_key = {}"),
    _in("password in a dsn", "host=db password={} dbname=x"),
    _in("private key id", '"privateKey":"{}"'),
    _in("passphrase", "passphrase => {}"),
    _in("quotes inside", '"secret": "a\\"{}"'),
]


def _known(name: str, secret: str, template: str) -> Canary:
    return Canary(name, template.replace("{}", secret), secret)


KNOWN = [
    _known("opaque", _made(32), "Zq8 and (nothing) {}"),
    _known("hexadecimal", _made(32, _HEX), "upstream said {}"),
    _known("short", _made(9), "pw {}!"),
    _known("punctuation", 'p/q+r=s"t\\u&v w%x<y>z#' + _made(6), "with {} in it"),
    _known("not ascii", "schlüssel-✓-𝄞-" + _made(6), "with {} in it"),
    _known("glued", _made(24), "xx{}yy"),
]

ALL = [*SHAPED, *NAMED, *KNOWN]

Encoding = Callable[[str], str]


def _as_utf16_escapes(text: str) -> str:
    units = text.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02X}" for i in range(0, len(units), 2))


ENCODINGS: dict[str, Encoding] = {
    "raw": lambda text: text,
    "json": lambda text: json.dumps(text),
    "json twice": lambda text: json.dumps(json.dumps({"error": text})),
    "json, all escaped": _as_utf16_escapes,
    "url": lambda text: quote(text, safe=""),
    "url, all escaped": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "url twice": lambda text: quote(quote(text, safe=""), safe=""),
}
"""Of a whole text: what a shape or a name must be seen through."""


def base64s(secret: str) -> Iterator[tuple[str, str]]:
    """What base64 makes of a known secret: alone, after a user name, in a longer text; in both alphabets."""
    for before in ("", "a", "ab", "user:"):
        raw = (before + secret + "|tail").encode()
        yield f"base64 after {before!r}", base64.b64encode(raw).decode()
        yield f"url-safe base64 after {before!r}", base64.urlsafe_b64encode(raw).decode()


def leaks(secret: str, output: str, size: int = 8) -> list[str]:
    """Pieces of `secret` that can be read in `output`, which is undone of escapes as far as it goes."""
    seen = [output]
    for _ in range(3):
        if "\\" in seen[-1]:
            seen.append(_unjson(seen[-1]))
        if "%" in seen[-1]:
            seen.append(unquote(seen[-1]))
    whole = "\n".join(seen)
    return [secret[i : i + size] for i in range(len(secret) - size + 1) if secret[i : i + size] in whole]


_JSON_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)


def _unjson(text: str) -> str:
    undone = _JSON_ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else match[2], text)
    return undone.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
