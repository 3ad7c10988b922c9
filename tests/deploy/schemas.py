"""The published schemas of Compose and of Kubernetes, for what cannot be run where these tests run.

Two packages carry them. They are fetched with pip, from whatever index pip is configured for, under their hashes; what
is needed is unpacked once into the environment, and neither is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".venv" / "schemas"
KUBERNETES_VERSIONS = ("1.29.0", "1.37.0")
"""The oldest that the manifests are for, and the newest of the package."""
KINDS = {
    "v1": {"ConfigMap": "configmap-v1", "Service": "service-v1"},
    "apps/v1": {"Deployment": "deployment-apps-v1", "StatefulSet": "statefulset-apps-v1"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudget-policy-v1"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicy-networking-v1"},
}


class Source(NamedTuple):
    requirement: str
    sha256: str
    members: tuple[str, ...]


COMPOSE = Source(
    "check-jsonschema==0.39.0",
    "14ce5c94871c551268ea948ffe21e9f1464dc48fb20bf9a4c13deeaaf756cf9b",
    ("check_jsonschema/builtin_schemas/vendor/compose-spec.json",),
)
KUBERNETES = Source(
    "kubernetes-validate==1.37.0",
    "85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9",
    tuple(
        f"kubernetes_validate/kubernetes-json-schema/v{version}-local-strict/{name}.json"
        for version in KUBERNETES_VERSIONS
        for name in ("_definitions", *(name for kinds in KINDS.values() for name in kinds.values()))
    ),
)


def unpacked(source: Source) -> Path:
    """The folder that holds the members. Skips the test where the package cannot be had."""
    folder = CACHE / source.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one run ask at the same time
        if not all((folder / member).exists() for member in source.members):
            _fetch(source, folder)
    return folder


def _fetch(source: Source, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        wanted = Path(name) / "wanted.txt"
        wanted.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--dest", name, "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=300)
        wheels = list(Path(name).glob("*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"pip could not fetch {source.requirement}, which carries the schema")
        assert hashlib.sha256(wheels[0].read_bytes()).hexdigest() == source.sha256
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in source.members:
                archive.extract(member, folder)


def errors(document: Any, source: Source, member: str) -> list[str]:
    """What the schema finds wrong, as `path: message`."""
    found = _validator(source, member).iter_errors(document)
    return [f"{'.'.join(map(str, one.instance_path))}: {one.message}" for one in found]


@cache
def _validator(source: Source, member: str) -> Any:
    file = unpacked(source) / member

    def beside(uri: str) -> Any:
        """What a schema refers to lies beside it: nothing is fetched."""
        return json.loads((file.parent / uri.rpartition("/")[2]).read_text())

    return jsonschema_rs.validator_for(json.loads(file.read_text()), retriever=beside)


def compose_errors(document: Any) -> list[str]:
    return errors(document, COMPOSE, COMPOSE.members[0])


def kubernetes_errors(document: Any, version: str) -> list[str]:
    """`document` is one object; of a kind that is not listed here, that is the error."""
    name = KINDS.get(document["apiVersion"], {}).get(document["kind"])
    if name is None:
        return [f"no schema is named here for {document['apiVersion']} {document['kind']}"]
    folder = f"kubernetes_validate/kubernetes-json-schema/v{version}-local-strict"
    return errors(document, KUBERNETES, f"{folder}/{name}.json")
