"""Render the mixin: Prometheus rules and Grafana dashboards from the jsonnet sources beside this file.

`python -m mixin.render` writes the files that `render` names; with --check it writes nothing and exits 1 if they are
out of step.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import _jsonnet
import yaml

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
PROMETHEUS_RULE = "deploy/kubernetes/overlays/prometheus-operator/prometheusrule.yaml"
"""Kustomize reads nothing outside its own folder, so the rules lie there once more."""
DO_NOT_EDIT = "# Rendered from mixin/*.libsonnet by `make docs`; change those.\n"


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stay what they are."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def evaluate(settings: Mapping[str, object] | None = None) -> dict[str, Any]:
    """prometheusRules, prometheusAlerts and grafanaDashboards, with `settings` over those of config.libsonnet."""
    source = f"""
        local mixin = (import 'mixin.libsonnet') + {{ _config+:: {json.dumps(dict(settings or {}))} }};
        {{ [name]: mixin[name] for name in ['prometheusRules', 'prometheusAlerts', 'grafanaDashboards'] }}
    """
    document: dict[str, Any] = json.loads(_jsonnet.evaluate_snippet("render", source, import_callback=_read))
    return document


def _read(folder: str, path: str) -> tuple[str, bytes]:
    # The snippet itself stands in no folder.
    file = (pathlib.Path(folder) if folder else HERE) / path
    return str(file), file.read_bytes()


def render(settings: Mapping[str, object] | None = None) -> dict[str, str]:
    """Path in the repository → content of each rendered file."""
    mixin = evaluate(settings)
    rules, alerts = mixin["prometheusRules"], mixin["prometheusAlerts"]
    files = {
        "mixin/prometheus/rules.yml": _yaml(rules),
        "mixin/prometheus/alerts.yml": _yaml(alerts),
        PROMETHEUS_RULE: _yaml(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "PrometheusRule",
                "metadata": {"name": "blueking-exporter"},
                "spec": {"groups": rules["groups"] + alerts["groups"]},
            }
        ),
    }
    for name, dashboard in mixin["grafanaDashboards"].items():
        files[f"mixin/grafana/{name}"] = json.dumps(dashboard, ensure_ascii=False, indent=2) + "\n"
    return files


def _yaml(document: object) -> str:
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return DO_NOT_EDIT + text


def main() -> None:
    check = sys.argv[1:] == ["--check"]
    stale = []
    for path, content in render().items():
        file = ROOT / path
        if file.exists() and file.read_text(encoding="utf-8") == content:
            continue
        stale.append(path)
        if not check:
            file.write_text(content, encoding="utf-8")
    if check and stale:
        sys.exit("\n".join(f"{path} is out of step; run: make docs" for path in stale))


if __name__ == "__main__":
    main()
