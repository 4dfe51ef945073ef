"""The files under deploy/ and the Dockerfile are what their tools accept and what their pages promise."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.components import require
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
BIN = pathlib.Path(sys.executable).parent
KUBERNETES = "1.34"
FOLDERS = ("base", "overlays/prometheus-operator", "overlays/replicas", "overlays/shards")
OPERATOR = "monitoring.coreos.com/v1"


def run(*argv: str | pathlib.Path, **environment: str) -> str:
    """The output of a command that must succeed."""
    result = subprocess.run(
        argv, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, f"{argv}: {result.stdout}{result.stderr}"
    return result.stdout


def rendered(folder: str) -> list[dict[str, Any]]:
    """The manifests of a kustomization, as the cluster would get them."""
    # Debian's kubectl is too old for today's kustomizations; the dev group brings one where it has one.
    kubectl = BIN / "kubectl" if (BIN / "kubectl").exists() else require("kubectl")
    return list(yaml.safe_load_all(run(kubectl, "kustomize", DEPLOY / "kubernetes" / folder)))


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = [manifest for manifest in manifests if manifest["kind"] == kind]
    assert len(found) == 1
    return found[0]


@pytest.mark.component
@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_fit_the_schemas_of_kubernetes(folder: str) -> None:
    """Each manifest passes the schema of its kind, unknown fields refused; the Operator's kinds are not in there."""
    manifests = rendered(folder)
    assert len(manifests) >= 6
    for manifest in manifests:
        if manifest["apiVersion"] != OPERATOR:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.component
@pytest.mark.parametrize(("folder", "kind"), [("base", "StatefulSet"), ("overlays/replicas", "Deployment")])
def test_pod_is_restricted(folder: str, kind: str) -> None:
    """The pod asks for nothing that the restricted pod security standard forbids, and for no token."""
    pod = of_kind(rendered(folder), kind)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert {next(iter(volume.keys() - {"name"})) for volume in pod["volumes"]} <= {"configMap", "secret", "emptyDir"}


@pytest.mark.component
def test_everything_selects_the_one_pod() -> None:
    """Service, policy, budget and monitor all select the labels of the pod; probes and monitor name its port."""
    manifests = rendered("overlays/prometheus-operator")
    template = of_kind(manifests, "StatefulSet")["spec"]["template"]
    labels: Mapping[str, str] = template["metadata"]["labels"]
    service = of_kind(manifests, "Service")
    selectors = [
        of_kind(manifests, "StatefulSet")["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        of_kind(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        of_kind(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
    monitor = of_kind(manifests, "ServiceMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (port,) = template["spec"]["containers"][0]["ports"]
    assert [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]] == [port["name"]]
    assert port["containerPort"] == 10071


@pytest.mark.component
def test_rules_of_the_operator_pass_promtool(tmp_path: pathlib.Path) -> None:
    """The groups inside PrometheusRule are rules that Prometheus itself accepts, those of the mixin."""
    rule = of_kind(rendered("overlays/prometheus-operator"), "PrometheusRule")
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    run(require("promtool"), "check", "rules", file)
    files = [ROOT / "mixin/prometheus" / name for name in ("rules.yml", "alerts.yml")]
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    assert rule["spec"]["groups"] == groups


@pytest.mark.component
def test_replicas_are_scaled_and_selected_together() -> None:
    """Deployment, autoscaler, budget, policy and monitor mean the same pods; one pod goes at a time; the store and its
    sentinels can be reached; nothing of the single process is left."""
    manifests = rendered("overlays/replicas")
    deployment = of_kind(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    scaler = of_kind(manifests, "HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 8)
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert "replicas" not in deployment["spec"], "the autoscaler's business"
    spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        of_kind(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of_kind(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        of_kind(manifests, "PodMonitor")["spec"]["selector"]["matchLabels"],
        *(constraint["labelSelector"]["matchLabels"] for constraint in spread),
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert of_kind(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    out = of_kind(manifests, "NetworkPolicy")["spec"]["egress"]
    assert {6379, 26379} <= {port["port"] for rule in out for port in rule["ports"]}
    assert not {"StatefulSet", "ServiceMonitor", "Service"} & {manifest["kind"] for manifest in manifests}


@pytest.mark.component
def test_a_series_keeps_its_labels_when_its_scope_moves() -> None:
    """PodMonitor and Compose make a constant of every target label that tells pods apart, for series of scopes only."""
    (endpoint,) = of_kind(rendered("overlays/replicas"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    rules = endpoint["metricRelabelings"]
    assert {rule["targetLabel"] for rule in rules} == {"instance", "pod", "container", "endpoint", "node"}
    assert all((rule["sourceLabels"], rule["regex"]) == (["bk_scope_id"], ".+") for rule in rules)
    prometheus = yaml.safe_load((DEPLOY / "compose/prometheus-replicas.yml").read_text())
    (rule,) = prometheus["scrape_configs"][0]["metric_relabel_configs"]
    assert (rule["source_labels"], rule["target_label"]) == (["bk_scope_id"], "instance")
    alone = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text())
    del prometheus["scrape_configs"][0]["metric_relabel_configs"]
    prometheus["scrape_configs"][0]["static_configs"][0]["targets"].remove("exporter-2:10071")
    assert prometheus == alone, "beside that they are the same"


@pytest.mark.component
def test_shards_start_together_and_know_their_number() -> None:
    """A StatefulSet with parallel start, as many replicas as shards, and its ordinal in POD_NAME."""
    spec = of_kind(rendered("overlays/shards"), "StatefulSet")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["podManagementPolicy"] == "Parallel"
    assert f"--total-shards={spec['replicas']}" in container["args"]
    assert {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in [
        {**one, "valueFrom": {"fieldRef": {"fieldPath": one["valueFrom"]["fieldRef"]["fieldPath"]}}}
        for one in container["env"]
        if "valueFrom" in one
    ]


@pytest.mark.parametrize(
    "path", ["compose/config.yaml", "kubernetes/base/config.yaml", "kubernetes/overlays/replicas/config.yaml"]
)
def test_shipped_configurations_pass_check(path: str, tmp_path: pathlib.Path) -> None:
    """Each configuration under deploy/ passes `check` once its secret file exists."""
    (tmp_path / "app_secret").write_text("s3cr3t")
    (tmp_path / "redis_password").write_text("s3cr3t")
    text = (DEPLOY / path).read_text()
    config = tmp_path / "config.yaml"
    config.write_text(re.sub(r"_file: /run/secrets/(?:\S+/)?(\S+)", rf"_file: {tmp_path}/\1", text))
    run(BIN / "blueking-exporter", "check", f"--config.file={config}")


@pytest.mark.component
def test_compose_configurations_pass_their_own_tools() -> None:
    """promtool and amtool accept what Compose mounts into Prometheus and Alertmanager."""
    for name in ("prometheus.yml", "prometheus-replicas.yml"):
        run(require("promtool"), "check", "config", "--syntax-only", DEPLOY / "compose" / name)
    run(require("amtool"), "check-config", ROOT / "mixin/alertmanager.yml")


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "replicas.yaml")])
def test_compose_mounts_what_exists_and_publishes_on_loopback_only(files: tuple[str, ...]) -> None:
    """What a service mounts is in the repository, no port is open to the network, every root is read-only."""
    compose: dict[str, Any] = {"services": {}, "volumes": {}, "secrets": {}}
    for file in files:
        for part, named in yaml.safe_load((DEPLOY / "compose" / file).read_text()).items():
            for name, found in named.items() if part in compose else ():
                compose[part][name] = {**compose[part].get(name, {}), **(found or {})}
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / "compose" / source).exists(), f"{name}: {source}"
            else:
                assert source in compose["volumes"], f"{name}: {source}"
    for secret in compose["secrets"].values():
        assert (DEPLOY / "compose" / secret["file"]).exists()


def test_compose_mounts_the_mixin_where_it_is_looked_for() -> None:
    """Rules and dashboards lie where the configurations of Prometheus and Grafana say."""
    compose = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
    mounts = {
        target: (DEPLOY / "compose" / source).resolve()
        for service in compose["services"].values()
        for source, target, *_ in (volume.split(":") for volume in service.get("volumes", []))
    }
    prometheus = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text())
    assert prometheus["rule_files"] == ["rules/*.yml"]
    assert mounts["/etc/prometheus/rules"] == ROOT / "mixin/prometheus"
    provisioning = DEPLOY / "compose/grafana/provisioning/dashboards/blueking.yaml"
    (provider,) = yaml.safe_load(provisioning.read_text())["providers"]
    assert mounts[provider["options"]["path"]] == ROOT / "mixin/grafana"
    assert mounts["/etc/alertmanager/alertmanager.yml"] == ROOT / "mixin/alertmanager.yml"
