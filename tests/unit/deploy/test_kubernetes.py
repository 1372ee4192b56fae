"""The manifests as kustomize renders them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sentinel_limits_sync.settings import Settings as LimitsSyncSettings
from sentinel_proxy.settings import Settings as ProxySettings
from sentinel_shared.settings import CommonSettings
from sentinel_usage_worker.settings import Settings as UsageWorkerSettings
from tests.unit.deploy import promql

KUBERNETES = Path(__file__).parents[3] / "deploy/kubernetes"
OVERLAYS = ("dev", "production")
VERSIONS = ("1.30", "1.37")
SETTINGS: dict[str, type[CommonSettings]] = {
    "sentinel-proxy": ProxySettings,
    "sentinel-usage-worker": UsageWorkerSettings,
    "sentinel-limits-sync": LimitsSyncSettings,
}
OF_OPERATORS = {"PodMonitor", "PrometheusRule", "ScaledObject"}  # their schemas are not Kubernetes' own
BEYOND_GRACE_S = 15  # what the proxy takes at most, beyond its grace, to settle and to end its processes


def render(folder: Path) -> list[dict[str, Any]]:
    kubectl, kustomize = shutil.which("kubectl"), shutil.which("kustomize")
    if kubectl is None and kustomize is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    command = [kubectl, "kustomize"] if kubectl else [str(kustomize), "build"]
    told = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    return list(yaml.safe_load_all(told.stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request):
    return render(KUBERNETES / "overlays" / request.param)


@pytest.fixture(scope="module")
def production():
    return render(KUBERNETES / "overlays/production")


def of_kind(manifests, *kinds):
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] in kinds}


def pods(manifests):
    return {name: one["spec"]["template"] for name, one in of_kind(manifests, "Deployment", "StatefulSet").items()}


def services_pods(manifests):
    return {name: template for name, template in pods(manifests).items() if name in SETTINGS}


def config(manifests):
    return next(
        m["data"] for name, m in of_kind(manifests, "ConfigMap").items() if re.fullmatch(r"sentinel-\w{10}", name)
    )


def with_components(tmp_path, *components):
    """The base with components, as an overlay would have them; kustomize takes no absolute path."""
    copied = tmp_path / "deploy"
    shutil.copytree(KUBERNETES.parent, copied, ignore=shutil.ignore_patterns("dev"), dirs_exist_ok=True)
    overlay = copied / "kubernetes/overlays/tried"
    overlay.mkdir(parents=True)
    told = {"resources": ["../../base"], "components": [f"../../components/{name}" for name in components]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    return render(overlay)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(manifests, version):
    for manifest in manifests:
        if manifest["kind"] not in OF_OPERATORS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_every_container_is_as_confined_as_the_strictest_pod_security_standard(manifests):
    for name, template in pods(manifests).items():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in spec["containers"]:
            told = container["securityContext"]
            assert told["readOnlyRootFilesystem"] is True, name
            assert told["allowPrivilegeEscalation"] is False, name
            assert told["capabilities"] == {"drop": ["ALL"]}, name


def test_every_container_says_what_it_needs(manifests):
    for name, template in pods(manifests).items():
        for container in template["spec"]["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name


def test_probes_ask_what_the_services_answer(manifests):
    for name, template in services_pods(manifests).items():
        [container] = template["spec"]["containers"]
        paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
        assert paths == {"startup": "/health/live", "liveness": "/health/live", "readiness": "/health/ready"}, name
        port = next(int(v.default) for v in SETTINGS[name].describe() if v.name == "SENTINEL_PORT")
        assert container["ports"] == [{"name": "http", "containerPort": port}]


def test_a_pod_is_given_the_time_that_its_drain_takes(manifests):
    grace_s = int(config(manifests)["SHUTDOWN_GRACE_SECONDS"])
    for name, template in services_pods(manifests).items():
        hook = template["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        needed_s = hook.get("seconds", 0) + grace_s + BEYOND_GRACE_S
        assert template["spec"]["terminationGracePeriodSeconds"] >= needed_s, name
    proxy = services_pods(manifests)["sentinel-proxy"]["spec"]["containers"][0]
    assert proxy["lifecycle"]["preStop"]["sleep"]["seconds"] >= 5


def test_services_are_told_what_they_need_and_nothing_that_nobody_reads(manifests):
    read: set[str] = set()
    for name, template in services_pods(manifests).items():
        [container] = template["spec"]["containers"]
        variables = {variable.name: variable for variable in SETTINGS[name].describe()}
        told = {entry["name"] for entry in container["env"]}
        assert told <= variables.keys(), name
        required = {variable.name for variable in variables.values() if variable.required}
        assert required <= told | config(manifests).keys(), name
        read |= variables.keys()
    assert config(manifests).keys() <= read


def test_every_setting_can_be_set_in_one_place_and_every_certificate_be_brought(manifests):
    maps = of_kind(manifests, "ConfigMap").items()
    [name] = [name for name, told in maps if told["data"] == config(manifests)]
    for service, template in services_pods(manifests).items():
        [container] = template["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": name}}], service
        assert {"name": "ca", "mountPath": "/etc/sentinel/ca", "readOnly": True} in container["volumeMounts"]
        [volume] = [volume for volume in template["spec"]["volumes"] if volume["name"] == "ca"]
        assert volume["secret"] == {"secretName": "sentinel-ca", "optional": True}


def test_keys_come_from_the_secret_and_never_from_the_configuration(manifests):
    keys = {"REDIS_URL", "ARQ_REDIS_URL", "OTEL_EXPORTER_OTLP_HEADERS"}
    for name, template in services_pods(manifests).items():
        [container] = template["spec"]["containers"]
        read = {variable.name for variable in SETTINGS[name].describe()}
        keys |= {variable for variable in read if variable.endswith(("_API_KEY", "_SECRET"))}
        assert {entry["name"] for entry in container["env"]} == keys & read, name
    assert not keys & config(manifests).keys()


def test_values_of_the_configuration_are_ones_that_the_services_take(manifests):
    for name, settings in SETTINGS.items():
        keys = {"ZION_API_KEY": "k", "VERCEL_AI_GATEWAY_API_KEY": "k", "REDIS_URL": "redis://redis:6379"}
        read = settings.from_env({**config(manifests), **keys})  # raises what it does not take
        assert read.zion_api_url == config(manifests)["ZION_API_URL"], name


def test_a_service_called_sentinel_cannot_set_a_port(manifests):
    for name, template in services_pods(manifests).items():
        assert template["spec"]["enableServiceLinks"] is False, name


def test_secrets_are_only_referred_to(production):
    assert not of_kind(production, "Secret")
    for name, template in services_pods(production).items():
        for entry in template["spec"]["containers"][0]["env"]:
            assert set(entry) == {"name", "valueFrom"}, name
            assert entry["valueFrom"]["secretKeyRef"]["name"] == "sentinel"


def test_the_secret_of_the_dev_overlay_has_every_key_that_is_needed():
    manifests = render(KUBERNETES / "overlays/dev")
    [secret] = of_kind(manifests, "Secret").values()
    for template in services_pods(manifests).values():
        for entry in template["spec"]["containers"][0]["env"]:
            reference = entry["valueFrom"]["secretKeyRef"]
            assert reference["name"] == secret["metadata"]["name"]
            assert reference["key"] in secret["data"] or reference.get("optional")


def test_selectors_find_their_pods(manifests):
    labels = [template["metadata"]["labels"] for template in pods(manifests).values()]
    for name, manifest in of_kind(manifests, "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor").items():
        spec = manifest["spec"]
        selector = spec.get("selector", spec.get("podSelector", {}))
        wanted = selector if manifest["kind"] == "Service" else selector.get("matchLabels", {})
        assert any(wanted.items() <= found.items() for found in labels), name


def test_every_deployment_spreads_and_is_never_taken_away_at_once(manifests):
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for name, template in services_pods(manifests).items():
        assert {rule["topologyKey"] for rule in template["spec"]["topologySpreadConstraints"]} == {
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        }
        assert budgets[name]["spec"]["maxUnavailable"] == 1


def test_whatever_is_scaled_by_itself_has_no_number_of_replicas(production):
    deployments = of_kind(production, "Deployment")
    scalers = of_kind(production, "HorizontalPodAutoscaler", "ScaledObject").values()
    scaled = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers}
    assert scaled == {"sentinel-proxy", "sentinel-usage-worker"}
    assert {name for name, one in deployments.items() if "replicas" not in one["spec"]} == scaled
    assert deployments["sentinel-limits-sync"]["spec"]["replicas"] == 2


def test_scaling_goes_by_metrics_that_are_served(production):
    known = promql.served()
    [scaler] = of_kind(production, "ScaledObject").values()
    for trigger in scaler["spec"]["triggers"]:
        assert not promql.unknown(trigger["metadata"]["query"], known)
    [hpa] = of_kind(production, "HorizontalPodAutoscaler").values()
    assert [metric["pods"]["metric"]["name"] in known for metric in hpa["spec"]["metrics"] if "pods" in metric] == [
        True
    ]


def test_the_worker_can_be_scaled_without_keda(tmp_path):
    manifests = with_components(tmp_path, "worker-hpa")
    assert not of_kind(manifests, "ScaledObject")
    scalers = of_kind(manifests, "HorizontalPodAutoscaler")
    assert set(scalers) == {"sentinel-proxy", "sentinel-usage-worker"}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_the_spool_can_outlive_a_pod(tmp_path):
    manifests = with_components(tmp_path, "durable-spool")
    [claim] = of_kind(manifests, "PersistentVolumeClaim")
    spec = pods(manifests)["sentinel-proxy"]["spec"]
    [volume] = [volume for volume in spec["volumes"] if volume["name"] == "spool"]
    assert volume == {"name": "spool", "persistentVolumeClaim": {"claimName": claim}}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_the_operators_rules_are_prometheus_rules_word_for_word(production, rules):
    [rule] = of_kind(production, "PrometheusRule").values()
    assert {group["name"]: group["rules"] for group in rule["spec"]["groups"]} == rules


def test_scrapes_find_the_port_and_name_the_jobs_that_alerts_go_by(production, rules):
    [monitor] = of_kind(production, "PodMonitor").values()
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    label = monitor["spec"]["jobLabel"]
    jobs = {template["metadata"]["labels"][label] for template in services_pods(production).values()}
    text = " ".join(rule["expr"] for group in rules.values() for rule in group)
    assert jobs == set(re.findall(r'job="([\w-]+)"', text))


def test_all_dashboards_are_brought_along(production, repo):
    boards = of_kind(production, "ConfigMap")["sentinel-dashboards"]
    assert set(boards["data"]) == {path.name for path in (repo / "deploy/grafana/dashboards").glob("*.json")}


def test_nothing_is_reached_that_no_policy_names(manifests):
    policies = of_kind(manifests, "NetworkPolicy")
    assert policies["sentinel-nothing-else"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_the_outside_world_reaches_the_api_and_the_webhook_alone(production):
    [ingress] = of_kind(production, "Ingress").values()
    paths = [path["path"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert paths == ["/v1", "/internal/invalidate"]
