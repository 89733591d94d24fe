"""The alert rules and the dashboard: every metric and every label they ask for is one that the server has."""

import json
import re
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from builders.paths import ROOT
from uni_instruct.serve.metrics import ServerMetrics, exposition

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
    metrics.reloads.labels("digits", "loaded")
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
        for reason in re.findall(r'reason="(\w+)"', expression):
            assert f'reason="{reason}"' in text


def exposition_text() -> str:
    metrics = ServerMetrics()
    metrics.of_model("digits")
    return exposition(metrics, workers=1).decode()
