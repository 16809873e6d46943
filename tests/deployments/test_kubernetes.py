"""The Kubernetes recipe: rendered by kubectl, checked against the schemas, and its commands run as processes here."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deployments.certificates import main as make_certificates
from flows.server import prefect_server
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
VERSIONS = ("1.29", kubernetes_validate.latest_version())
"""The oldest Kubernetes that has no part of this behind a feature gate of alpha quality, and the newest known here."""
SCHEDULER = "shard-embed-scheduler:8786"

Resources = dict[str, dict[str, Any]]


def kustomize() -> str:
    """The path of a kubectl that renders the recipe; skips the test if there is none."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    said = subprocess.run([kubectl, "version", "--client"], capture_output=True, text=True).stdout
    if not re.search(r"Kustomize Version: v[45]", said):
        pytest.skip("kubectl has a kustomize older than 4")
    return kubectl


def render(folder: Path, changes: dict[str, str]) -> Resources:
    """The resources of a copy of the example in which some texts are replaced, by kind and name."""
    shutil.copytree(ROOT / "deployments/kubernetes", folder)
    make_certificates([str(folder / "example/tls")])
    for file in ("kustomization.yaml", "namespace.yaml", "size.yaml"):
        path = folder / "example" / file
        text = path.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
    command = [kustomize(), "kustomize", str(folder / "example")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    documents = list(yaml.safe_load_all(done.stdout))
    found = {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}
    assert len(found) == len(documents)
    return found


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    """What `kubectl apply -k` would send of the example as it is."""
    return render(tmp_path_factory.mktemp("kubernetes") / "recipe", {})


def strict(schema: Any) -> Any:
    """A schema that refuses unknown fields, which the API server would drop without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def dask_cluster_schema() -> Any:
    """The Dask operator's schema of a DaskCluster."""
    schema = strict(json.loads(Path(__file__).with_name("daskcluster_schema.json").read_text()))
    schema["properties"] |= {"apiVersion": {"const": "kubernetes.dask.org/v1"}, "kind": {}, "metadata": {}}
    return schema


def pods(resources: Resources) -> dict[str, dict[str, Any]]:
    """The specifications of all pods, by what makes them."""
    found: dict[str, dict[str, Any]] = {}
    for name, resource in resources.items():
        if resource["kind"] == "DaskCluster":
            found |= {f"{name}/{role}": resource["spec"][role]["spec"] for role in ("worker", "scheduler")}
        elif "template" in resource.get("spec", {}):
            found[name] = resource["spec"]["template"]["spec"]
    return found


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The containers of a pod, those that come first too."""
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(example: Resources, version: str) -> None:
    core = [resource for resource in example.values() if resource["kind"] != "DaskCluster"]
    assert len(core) == 10
    for resource in core:
        kubernetes_validate.validate(resource, version, strict=True)
    for name, spec in pods(example).items():
        if name.startswith("DaskCluster/"):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, version, strict=True)
    wrong = copy.deepcopy(example["Job/shard-embed"])
    wrong["spec"]["template"]["spec"]["containers"][0]["volumesMounts"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_dask_operator_knows_every_field(example: Resources, dask_cluster_schema: Any) -> None:
    cluster = example["DaskCluster/shard-embed"]
    jsonschema.validate(cluster, dask_cluster_schema)
    for path, value in ((("worker", "replica"), 2), (("scheduler", "spec", "containers"), "none")):
        wrong = copy.deepcopy(cluster)
        *parents, last = path
        place = wrong["spec"]
        for parent in parents:
            place = place[parent]
        place[last] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, dask_cluster_schema)


def test_the_operator_finds_the_scheduler(example: Resources) -> None:
    """It labels the scheduler's pod and looks for ports by these names; its own address would be tcp://."""
    scheduler = example["DaskCluster/shard-embed"]["spec"]["scheduler"]
    assert scheduler["service"]["selector"] == {
        "dask.org/cluster-name": "shard-embed",
        "dask.org/component": "scheduler",
    }
    named = {port["name"]: port["containerPort"] for port in scheduler["spec"]["containers"][0]["ports"]}
    assert named == {"tcp-comm": 8786, "http-dashboard": 8787}
    assert {port["targetPort"] for port in scheduler["service"]["ports"]} == named.keys()
    for spec in pods(example).values():
        for container in containers(spec):
            address = environment(container, example).get("DASK_SCHEDULER_ADDRESS", f"tls://{SCHEDULER}")
            assert address == f"tls://{SCHEDULER}"


def test_what_pods_refer_to_exists(example: Resources) -> None:
    """Secrets, ConfigMaps, volumes and claims are there under the names that the pods use."""
    for name, spec in pods(example).items():
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            claim, secret = volume.get("persistentVolumeClaim"), volume.get("secret")
            kind = f"PersistentVolumeClaim/{claim['claimName']}" if claim else f"Secret/{secret['secretName']}"
            assert kind in example, name
        for container in containers(spec):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys()
            environment(container, example)  # raises KeyError for what is missing
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["enableServiceLinks"] is False
    assert sorted(example["Secret/shard-embed-tls"]["data"]) == ["ca.crt", "tls.crt", "tls.key"]


def environment(container: dict[str, Any], resources: Resources) -> dict[str, str]:
    """The variables that a container gets, from ConfigMaps and Secrets too."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= resources[f"ConfigMap/{source['configMapRef']['name']}"]["data"]
        else:
            found |= secret(resources, source["secretRef"]["name"])
    for variable in container.get("env", []):
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        value = variable.get("value")
        found[variable["name"]] = secret(resources, reference["name"])[reference["key"]] if reference else value
    return found


def secret(resources: Resources, name: str) -> dict[str, str]:
    """What a Secret holds."""
    return {key: base64.b64decode(value).decode() for key, value in resources[f"Secret/{name}"]["data"].items()}


class Pods:
    """Runs the containers of the recipe as processes, without a GPU and under other names than in a cluster."""

    def __init__(self, resources: Resources, certificates: Path, log: Path) -> None:
        self.resources, self.certificates, self.log = resources, certificates, log
        self.port, self.health = free_port(), free_port()

    @contextlib.contextmanager
    def running(self, container: dict[str, Any], *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start what a container starts."""
        variables = {n: self._here(v) for n, v in environment(container, self.resources).items()}
        variables |= {"DASK_WORKER_NAME": "worker"} | {"PYTHONPATH": str(ROOT)}
        words = [*container.get("command", ["python", "-m"]), *container["args"]]
        words = [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word) for word in words]
        words = [{"python": sys.executable, "dask_cuda.cli": "distributed.cli.dask_worker"}.get(w, w) for w in words]
        if "--device-memory-limit" in words:
            place = words.index("--device-memory-limit")
            del words[place : place + 2]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
        with self.log.open("ab") as log:
            process = subprocess.Popen([*words, *options], env=kept | variables, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _here(self, value: str) -> str:
        return value.replace(SCHEDULER, f"127.0.0.1:{self.port}").replace("/tls/", f"{self.certificates}/")

    def page(self, path: str) -> int:
        """The status with which the scheduler answers to a browser."""
        try:
            return int(urllib.request.urlopen(f"http://127.0.0.1:{self.health}{path}", timeout=10).status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.mark.deployed
def test_its_commands_embed_a_dataset(demo_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits for a scheduler and workers that come later, over TLS; all parameters are in one file."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    with prefect_server():
        password = os.environ["PREFECT_API_AUTH_STRING"]
        changes = {
            "namespace: shard-embed": "namespace: mine",
            "registry.example.com/shard-embed": "localhost:5000/embed",
            '"0.1.0"': '"2"',
            "s3://crawl": str(demo_dataset),
            "s3://vectors": str(tmp_path / "out"),
            "http://prefect-server:4200/api": os.environ["PREFECT_API_URL"],
            "envs: [prefect-credentials.env]": f'literals: ["PREFECT_API_AUTH_STRING={password}"]',
            "--model-name=resnet50.a1_in1k": "--embedder=tests.faulty:Faulty",
            "replicas: 8": "replicas: 1",
        }
        resources = render(tmp_path / "recipe", changes)
        cluster = resources["DaskCluster/shard-embed"]
        assert cluster["spec"]["worker"]["replicas"] == 1
        assert {r["metadata"].get("namespace", "mine") for r in resources.values()} == {"mine"}
        job = resources["Job/shard-embed"]["spec"]["template"]["spec"]
        images = {container["image"] for spec in pods(resources).values() for container in containers(spec)}
        assert images == {"localhost:5000/embed:2", "prefecthq/prefect:3.8.8-python3.12"}
        here = Pods(resources, tmp_path / "recipe/example/tls", tmp_path / "log")
        (worker,), (scheduler,) = (cluster["spec"][role]["spec"]["containers"] for role in ("worker", "scheduler"))
        where = ("--port", str(here.port), "--dashboard-address", f"127.0.0.1:{here.health}")
        with here.running(job["initContainers"][0]) as waiting, here.running(scheduler, *where):
            wait(here, lambda: here.log.exists() and b"Scheduler at:" in here.log.read_bytes())
            assert waiting.poll() is None
            assert [here.page(path) for path in ("/health", "/status", "/info/main/workers.html")] == [200, 404, 404]
            with here.running(worker):
                assert waiting.wait(120) == 0, here.log.read_text()
                with here.running(job["containers"][0]) as client:
                    assert client.wait(240) == 0, here.log.read_text()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["samples"], manifest["embedded"], manifest["quarantined"]) == (256, 254, 2)


def wait(here: Pods, ready: Callable[[], bool]) -> None:
    """Wait until something is so."""
    until = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < until, here.log.read_text()
        time.sleep(0.1)
