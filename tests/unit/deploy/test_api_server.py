"""The manifests before a real Kubernetes API server: its schemas, defaults and admission. Nothing there runs pods.

Needs etcd and kube-apiserver, on the PATH or where KUBEBUILDER_ASSETS says. Other operators' objects are tried as well
where SENTINEL_TEST_CRDS names a folder with the definitions of their kinds.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.redis_server import free_port
from tests.support.system import Process, bare_environ, eventually
from tests.unit.deploy.test_kubernetes import KUBERNETES, OF_OPERATORS, OVERLAYS, render, with_components

pytestmark = [pytest.mark.slow]


def program(name):
    """The program's path; where it is not here the test is skipped, and says so."""
    found = shutil.which(name, path=os.environ.get("KUBEBUILDER_ASSETS")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory):
    """Runs kubectl against a server of its own, as its administrator; objects are read from stdin."""
    etcd, server, client = program("etcd"), program("kube-apiserver"), program("kubectl")
    folder = tmp_path_factory.mktemp("kubernetes")
    store, peer, port = free_port(), free_port(), free_port()
    key, tokens = folder / "sa.key", folder / "tokens.csv"
    tokens.write_text("the-token,admin,1,system:masters\n", encoding="utf-8")
    openssl = [program("openssl"), "genrsa", "-out", str(key), "2048"]
    subprocess.run(openssl, check=True, capture_output=True, timeout=30)
    own = f"http://127.0.0.1:{store}"
    among = f"http://127.0.0.1:{peer}"
    stores = [
        etcd,
        *(f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync"),
        *(f"--listen-client-urls={own}", f"--advertise-client-urls={own}"),
        *(
            f"--listen-peer-urls={among}",
            f"--initial-advertise-peer-urls={among}",
            f"--initial-cluster=default={among}",
        ),
    ]
    serves = [
        server,
        *(f"--etcd-servers={own}", "--bind-address=127.0.0.1", f"--secure-port={port}", f"--cert-dir={folder}"),
        *(f"--token-auth-file={tokens}", "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount"),
        *("--service-account-issuer=https://kubernetes.default", f"--service-account-key-file={key}"),
        *(f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.0.0.0/24"),
    ]
    running = [Process(Path(one[0]).name, one, bare_environ(), folder) for one in (stores, serves)]
    url = f"https://127.0.0.1:{port}"

    def ready():
        assert running[1].code is None, running[1].said[-2000:]
        try:
            return httpx.get(f"{url}/readyz", headers=bearer, verify=trust, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def run(*arguments, objects):
        command = [
            client,
            f"--server={url}",
            "--insecure-skip-tls-verify",
            "--token=the-token",
            f"--cache-dir={folder}",
        ]
        told = yaml.safe_dump_all(objects)
        command += [*arguments, "-f", "-"]
        return subprocess.run(command, input=told, capture_output=True, text=True, timeout=120, check=False)

    bearer = {"authorization": "Bearer the-token"}
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    try:
        eventually(ready, within_s=120)
        yield run
    finally:
        for one in reversed(running):
            one.kill()


@pytest.fixture(scope="module")
def kinds(kubectl):
    """The kinds of other operators that the server was taught."""
    crds = os.environ.get("SENTINEL_TEST_CRDS")
    told = (
        [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(Path(crds).glob("*.yaml"))] if crds else []
    )
    if told:
        taught = kubectl("apply", "--server-side", objects=told)
        assert taught.returncode == 0, taught.stderr
    return {one["spec"]["names"]["kind"] for one in told}


def refused(kubectl, manifests, kinds):
    """What the server has against the manifests: errors and warnings. Namespaces are made, all else is only tried."""
    spaces = [one for one in manifests if one["kind"] == "Namespace"]
    if spaces:
        kubectl("apply", "--server-side", objects=spaces)
    known = [one for one in manifests if one["kind"] not in OF_OPERATORS - kinds]
    told = kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", objects=known)
    applied = told.stdout.count("serverside-applied")
    missing = [] if applied == len(known) else [f"{applied} of {len(known)} objects applied"]
    return told.stderr.splitlines() + missing


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_takes_every_object_of_an_overlay(kubectl, kinds, overlay):
    def asked():
        return refused(kubectl, render(KUBERNETES / "overlays" / overlay), kinds)

    eventually(
        asked, within_s=30, until=lambda complaints: not complaints
    )  # kinds are learnt a moment after they are told


@pytest.mark.parametrize("component", ["worker-hpa", "durable-spool"])
def test_the_server_takes_every_object_of_a_component(kubectl, kinds, tmp_path, component):
    assert not refused(kubectl, with_components(tmp_path, component), kinds)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_may_run_in_the_namespace_that_is_made_for_them(kubectl, overlay):
    """Pod security is enforced on pods, not on what makes them; so the pods themselves are tried."""
    manifests = render(KUBERNETES / "overlays" / overlay)
    [space] = [one for one in manifests if one["kind"] == "Namespace"]
    kubectl("apply", "--server-side", objects=[space])
    tried = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**one["spec"]["template"]["metadata"], "name": name, "namespace": space["metadata"]["name"]},
            "spec": one["spec"]["template"]["spec"],
        }
        for name, one in ((one["metadata"]["name"], one) for one in manifests if "template" in one.get("spec", {}))
    ]
    for pod in tried:
        mounted = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        unclaimed = {
            mount["name"] for box in pod["spec"]["containers"] for mount in box.get("volumeMounts", [])
        } - mounted
        pod["spec"].setdefault("volumes", []).extend({"name": name, "emptyDir": {}} for name in sorted(unclaimed))
    assert tried
    assert not refused(kubectl, tried, set())
    rooted = tried[0] | {"spec": tried[0]["spec"] | {"hostNetwork": True}}
    assert any("violates PodSecurity" in line for line in refused(kubectl, [rooted], set()))
