"""The manifests: against the published schemas, and everything in them that can be run without a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.scene import ENV, check, keeps_what_it_is_told, redis_of, runs, variables
from tests.deploy.schemas import KUBERNETES_VERSIONS, kubernetes_errors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/kubernetes"
FILES = sorted(FOLDER.rglob("*.yaml"))
OBJECTS: list[tuple[str, dict[str, Any]]] = [
    (str(file.relative_to(FOLDER)), one) for file in FILES for one in yaml.safe_load_all(file.read_text())
]
NAMED = {(one["kind"], one["metadata"]["name"]): one for _, one in OBJECTS}
PODS = {name: one["spec"]["template"] for (_, name), one in NAMED.items() if "template" in one.get("spec", ())}
GATEWAY, SIDECAR, REDIS = PODS["breakwater"], PODS["agent"], PODS["breakwater-redis"]


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every container that we wrote: a name, its pod, itself."""
    for name, pod in PODS.items():
        for one in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            yield f"{name}/{one['name']}", pod["spec"], one


def ours(pod: dict[str, Any]) -> dict[str, Any]:
    every = (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"])
    return next(one for one in every if one["image"] == "breakwater:local")


def config_of(pod: dict[str, Any]) -> str:
    """The configuration that our container of a pod reads, by the way it is mounted."""
    container = ours(pod)
    file = Path(container["args"][container["args"].index("-c") + 1])
    mount = next(one for one in container["volumeMounts"] if one["mountPath"] == str(file.parent))
    volume = next(one for one in pod["spec"]["volumes"] if one["name"] == mount["name"])
    text: str = NAMED["ConfigMap", volume["configMap"]["name"]]["data"][file.name]
    return text


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize(("file", "document"), OBJECTS, ids=lambda one: one if isinstance(one, str) else one["kind"])
def test_every_object_fits_the_published_schema(file: str, document: dict[str, Any], version: str) -> None:
    assert kubernetes_errors(document, version) == []


def test_the_schema_finds_what_is_wrong() -> None:
    wrong = {**GATEWAY["spec"], "terminationGracePeriod": 5}
    deployment = {**NAMED["Deployment", "breakwater"]}
    deployment["spec"] = {**deployment["spec"], "template": {**GATEWAY, "spec": wrong}}
    assert len(kubernetes_errors(deployment, KUBERNETES_VERSIONS[0])) == 1


def test_no_name_is_taken_twice_and_none_is_a_secret() -> None:
    assert len(NAMED) == len(OBJECTS)
    assert not [name for kind, name in NAMED if kind == "Secret"]


@pytest.mark.parametrize(
    ("name", "pod", "container"), [*containers()], ids=lambda one: one if isinstance(one, str) else ""
)
def test_no_container_can_do_more_than_it_must(name: str, pod: dict[str, Any], container: dict[str, Any]) -> None:
    own = container["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "a service's name would bring variables that look like ours"
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    if not name.endswith("/agent"):  # which is not ours
        assert own["readOnlyRootFilesystem"] is True
        assert {**pod["securityContext"], **own}["runAsUser"] > 0
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


def test_our_containers_run_as_the_user_of_the_image() -> None:
    user = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.M)[-1]
    for pod in (GATEWAY, SIDECAR):
        context = {**pod["spec"]["securityContext"], **ours(pod)["securityContext"]}
        assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user


@pytest.mark.parametrize("pod", [GATEWAY, SIDECAR], ids=["gateway", "sidecar"])
def test_a_secret_comes_by_reference_and_its_name_stands_in_the_comment(pod: dict[str, Any]) -> None:
    text = "".join(file.read_text() for file in FILES)
    env = ours(pod)["env"]
    for one in env:
        reference = one["valueFrom"]["secretKeyRef"]
        assert f"--from-literal={reference['key']}=" in text
        assert f"create secret generic {reference['name']} " in text
    assert {one["name"] for one in env} == variables(config_of(pod))


@pytest.mark.parametrize("pod", [GATEWAY, SIDECAR], ids=["gateway", "sidecar"])
def test_the_time_to_end_is_more_than_a_drain_takes(pod: dict[str, Any]) -> None:
    listen = yaml.safe_load(config_of(pod))["listen"]
    seconds = pod["spec"]["terminationGracePeriodSeconds"]
    assert seconds * 1000 >= listen["drain_ms"] + listen["grace_ms"] + 5000
    readiness = ours(pod).get("readinessProbe")
    if readiness is not None:
        noticed = (readiness["periodSeconds"] + readiness["timeoutSeconds"]) * readiness["failureThreshold"]
        assert noticed * 1000 < listen["drain_ms"]


def test_the_gateway_is_probed_where_it_listens() -> None:
    container, listen = ours(GATEWAY), yaml.safe_load(config_of(GATEWAY))["listen"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": listen["port"], "admin": listen["admin_port"]}
    asked = {name: one["httpGet"] for name, one in container.items() if name.endswith("Probe")}
    assert {name: one["path"] for name, one in asked.items()} == {
        "startupProbe": "/livez",
        "readinessProbe": "/readyz",
        "livenessProbe": "/livez",
    }
    assert {one["port"] for one in asked.values()} == {"http"}
    (service,) = NAMED["Service", "breakwater"]["spec"]["ports"]
    assert service["targetPort"] == "http"


def test_the_sidecar_is_asked_from_within_and_reached_by_the_application() -> None:
    container, listen = ours(SIDECAR), yaml.safe_load(config_of(SIDECAR))["listen"]
    assert (listen["host"], listen["port"]) == ("127.0.0.1", 8080), "where `breakwater health` asks by itself"
    assert container["restartPolicy"] == "Always"
    assert container["startupProbe"]["exec"]["command"] == ["breakwater", "health"]
    assert container["livenessProbe"]["exec"]["command"] == ["breakwater", "health"]
    (application,) = SIDECAR["spec"]["containers"]
    assert {"name": "OPENAI_BASE_URL", "value": "http://127.0.0.1:8080/v1"} in application["env"]


def test_every_selector_finds_its_pods() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in PODS.items()}
    for (kind, name), one in NAMED.items():
        if kind == "ConfigMap":
            continue
        spec = one["spec"]
        selector = spec["selector"] if "selector" in spec else spec["podSelector"]
        wanted = selector.get("matchLabels", selector)
        assert wanted.items() <= labels[name].items(), f"{kind} {name}"
    (peer,) = NAMED["NetworkPolicy", "breakwater-redis"]["spec"]["ingress"][0]["from"]
    allowed = peer["podSelector"]["matchLabels"].items()
    assert [name for name in labels if allowed <= labels[name].items()] == ["breakwater", "agent"]


@pytest.mark.parametrize("pod", [GATEWAY, SIDECAR], ids=["gateway", "sidecar"])
def test_the_configuration_is_valid(pod: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "breakwater.yaml"
    file.write_text(config_of(pod))
    assert check(file, ENV) == (0, f"{file}: valid\n")
    assert "@breakwater-redis:6379/" in config_of(pod), "the service's name"


def test_redis_and_breakwater_run_as_written(tmp_path: Path, redis_binary: Path) -> None:
    (container,) = REDIS["spec"]["containers"]
    shell, option, script = container["command"]
    assert (shell, option) == ("sh", "-c")
    folder = tmp_path / "data"
    folder.mkdir()
    with redis_of(script, folder) as port:
        keeps_what_it_is_told(port)
        for name, pod in {"gateway": GATEWAY, "sidecar": SIDECAR}.items():
            file = tmp_path / f"{name}.yaml"
            file.write_text(config_of(pod))
            runs(file, port)
