"""The alert rules, the dashboard and the deployment: every metric and every label they ask for is one that the server has."""

import json
import re
from dataclasses import fields
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from builders.paths import ROOT
from uni_instruct.cli import COMMANDS
from uni_instruct.serve.metrics import ServerMetrics, exposition
from uni_instruct.serve.settings import Settings, settings_from_environment, variable

FOLDER = ROOT / "docs" / "operations"


def expressions() -> list[str]:
    rules: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    return [rule["expr"] for rule in rules] + [target["expr"] for panel in panels for target in panel["targets"]]


def samples() -> dict[str, set[str]]:
    """Metric -> its labels, of a server whose every series has been made."""
    metrics = ServerMetrics()
    metrics.of_model("digits")
    metrics.requests.labels("/v1/generate", "200")
    metrics.model_ready.labels("digits")
    metrics.engine.labels("onnx-fp32", "digits")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(exposition(metrics, workers=1).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", expressions())
def test_what_is_asked_for_exists(expression: str) -> None:
    known = samples()
    names = re.findall(r"uni_instruct_\w+", expression)
    assert names
    for name in names:
        assert name in known
    labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    labels |= set(re.findall(r"(\w+)[=!]~?\"", expression))
    assert labels <= set().union(*(known[name] for name in names))


def test_every_reason_and_stage_that_is_asked_for_exists() -> None:
    text = exposition_text()
    for expression in expressions():
        for label, value in re.findall(r'(reason|outcome)="(\w+)"', expression):
            # At zero from the start: a rate does not see a series that begins with its first event.
            assert f'{label}="{value}"' in text


def exposition_text() -> str:
    metrics = ServerMetrics()
    metrics.of_model("digits")
    return exposition(metrics, workers=1).decode()


def test_the_deployment_asks_for_what_the_server_has() -> None:
    """Settings, probes and the autoscaler's metric; and the pod is given the time that stopping takes."""
    documents = {document["kind"]: document for document in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "KEY_FILE" not in entry["name"]}
    assert environment.keys() <= {variable(setting.name) for setting in fields(Settings)}
    settings = settings_from_environment(environment)
    # Prometheus finds the pods by their annotations, which hold no key; and with it the autoscaler has its metric.
    assert settings.metrics_open
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > settings.grace_s + pause_s
    assert [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")] == [
        "/readyz",
        "/readyz",
        "/livez",
    ]
    (metric,) = documents["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in samples()
    assert container["args"][1] in COMMANDS
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert documents["Service"]["spec"]["selector"] == documents["Deployment"]["spec"]["selector"]["matchLabels"] == labels


def test_kubernetes_would_take_the_deployment() -> None:
    """Against the schemas that Kubernetes publishes; a field that there is not is refused."""
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == [
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
    ]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    documents[0]["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="'replica' was unexpected"):
        kubernetes_validate.validate(documents[0], kubernetes_validate.latest_version(), strict=True)
