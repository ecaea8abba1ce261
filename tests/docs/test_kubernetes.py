"""The Kubernetes manifests keep the schema, and speak of options, ports, paths and metrics that the server has."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import click
import kubernetes_validate
import pytest
import yaml
from answers import STORED
from live_server import listening, served

from unipinrec.cli import main

DEPLOY = Path(__file__).resolve().parents[2] / "docs/deploy"
FILES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
OBJECTS: list[dict[str, Any]] = [one for file in FILES for one in yaml.safe_load_all(file.read_text())]
VERSIONS = ("1.31", "1.34", "1.37")
CLOSING_S = 5


def named(kind: str) -> dict[str, Any]:
    return next(one for one in OBJECTS if one["kind"] == kind)


POD: dict[str, Any] = named("Deployment")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def command() -> list[str]:
    """The words of the container, with the values of the ConfigMap."""
    values = named("ConfigMap")["data"]
    words = [*CONTAINER["command"], *CONTAINER["args"]]
    return [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in words]


def options() -> dict[str, Any]:
    """What `unipinrec serve` understands of them; defaults where they say nothing."""
    serve = main.commands["serve"]
    assert command()[:2] == ["unipinrec", "serve"]
    given = serve.make_parser(click.Context(serve)).parse_args(command()[2:])[0]
    return {option.name: given.get(option.name, option.default) for option in serve.params if option.name}


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_keep_the_schema(version: str) -> None:
    assert len(OBJECTS) == 8
    for one in OBJECTS:
        kubernetes_validate.validate(one, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="replicaz"):
        kubernetes_validate.validate({**named("Deployment"), "replicaz": 2}, version, strict=True)


def test_the_command_is_one_that_the_server_understands() -> None:
    found = options()
    (port,) = CONTAINER["ports"]
    assert int(found["port"]) == port["containerPort"] == 8000
    assert found["host"] == "0.0.0.0"
    annotations = named("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == "8000"
    for service in (one for one in OBJECTS if one["kind"] == "Service"):
        assert service["spec"]["ports"][0]["targetPort"] == port["name"]


def test_a_pod_is_given_the_time_to_drain() -> None:
    found = options()
    needed = float(found["drain_delay_s"]) + float(found["drain_s"]) + CLOSING_S
    assert POD["terminationGracePeriodSeconds"] >= needed
    ready = CONTAINER["readinessProbe"]
    assert float(found["drain_delay_s"]) > ready["periodSeconds"] * ready["failureThreshold"]


def test_probes_and_scrapes_have_paths_that_answer() -> None:
    annotations = named("Deployment")["spec"]["template"]["metadata"]["annotations"]
    probes = [CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["port"] for probe in probes} == {"http"}
    metric = named("HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    with served(STORED) as app, listening(app) as port:
        for path in {probe["path"] for probe in probes}:
            with urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                assert answer.status == 200
        with urlopen(f"http://127.0.0.1:{port}{annotations['prometheus.io/path']}") as answer:
            text = answer.read().decode()
    assert f"# TYPE {metric} gauge" in text
    assert metric in (DEPLOY / "kubernetes.md").read_text()


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


def test_names_lead_to_objects_and_labels_to_pods() -> None:
    labels = named("Deployment")["spec"]["template"]["metadata"]["labels"]
    names = {(one["kind"], one["metadata"]["name"]) for one in OBJECTS}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert ("PersistentVolumeClaim", volumes["bundles"]["persistentVolumeClaim"]["claimName"]) in names
    assert ("Secret", volumes["secret"]["secret"]["secretName"]) in names
    assert ("ConfigMap", CONTAINER["envFrom"][0]["configMapRef"]["name"]) in names
    target = named("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in names
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounts) == set(volumes)
    found = options()
    assert found["bundles"] == mounts["bundles"]
    folder, _, key = found["admin_token_file"].rpartition("/")
    assert folder == mounts["secret"]
    assert key in named("Secret")["stringData"]
    assert named("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert named("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert all(one["spec"]["selector"] == labels for one in OBJECTS if one["kind"] == "Service")
    used = {match for word in strings(CONTAINER) for match in re.findall(r"\$\((\w+)\)", word)}
    assert used == set(named("ConfigMap")["data"])


def test_the_token_of_the_example_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(named("Secret")["stringData"]["admin-token"])
    words = [sys.executable, "-m", "unipinrec", "serve", str(STORED), "--port", "0", "--admin-token-file", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "16" in done.stderr
