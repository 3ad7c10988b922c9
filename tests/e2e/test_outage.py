"""The outage that `breakwater demo` rehearses: the commands of docs/fault-tolerance.md as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.stack import BREAKWATER
from tests.redis_server import free_port

PAGE = (Path(__file__).parents[2] / "docs" / "fault-tolerance.md").read_text()
ADMIN_KEY = "bw-admin-key-0123456789"


def commands(port: int) -> str:
    _, _, section = PAGE.partition("## See it\n")
    (found,) = re.findall(r"^```sh\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    assert isinstance(found, str)
    assert found.count(":8080") == found.count("http://")
    return found.replace(":8080", f":{port}")


def test_the_answers_of_an_outage_come_from_the_second_provider() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl, which the page uses, is not here")
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    demo = subprocess.Popen(
        [BREAKWATER, "demo", "--port", str(port)],
        env={**environment, "BREAKWATER_ADMIN__KEYS": ADMIN_KEY},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert demo.stdout is not None
        for line in demo.stdout:  # it says where it listens once it does
            if line.startswith("Requests appear below"):
                break
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands(port)],
            env={**os.environ, "ADMIN_KEY": ADMIN_KEY},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        demo.terminate()
        demo.communicate(timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("x-breakwater-provider: backup") == 7
    assert 'breakwater_circuit_state{provider="mock",model="*"} 2' in done.stdout
    assert 'breakwater_circuit_transitions_total{provider="mock",model="*",to="open"} 1' in done.stdout
    rows = json.loads(done.stdout[done.stdout.index("[{") : done.stdout.rindex("]") + 1])
    (row,) = [row for row in rows if (row["provider"], row["model"]) == ("mock", "*")]
    assert (row["state"], row["failures_in_a_row"], row["last_10_seconds"]["failed"]) == ("open", 5, 5)
    assert done.stdout.startswith('{"outage":true}')
    assert done.stdout.endswith('{"outage":false}')
