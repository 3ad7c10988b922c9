"""HTTP clients for servers of our own, which speak no TLS.

A client reads the system's authorities when it is made, and that takes 30 ms of processor time: more than what most
tests ask of it. These have none, so that they trust nobody.
"""

from __future__ import annotations

import ssl
from typing import Final

import openai

CLEAR: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For `verify=` of a client of httpx2."""


def client() -> openai.DefaultHttpxClient:
    """For `http_client=` of the SDK, which closes it; all else is as the SDK has it."""
    return openai.DefaultHttpxClient(verify=CLEAR)


def async_client() -> openai.DefaultAsyncHttpxClient:
    """The same for its async form."""
    return openai.DefaultAsyncHttpxClient(verify=CLEAR)
