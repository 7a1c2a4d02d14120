"""KubeRay manifests against the schemas of KubeRay and Kubernetes, and as Ray's own autoscaler reads them."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.manifests import kuberay
from cluster.manifests.overrides import with_overrides
from cluster.manifests.settings import ManifestError, Settings, Workers

SCHEMA = json.loads((Path(__file__).parent / "kuberay_v1.schema.json").read_text("utf-8"))
RECIPE = kuberay.Recipe("my-domain.yaml", "name: my-domain\nstages: {}\n", "s3://bucket/runs")
KUBERNETES = ("1.29", "1.33")

EVERYTHING = [
    "platform=gke", "namespace=ml", "image=registry/danlu:cpu", "image_pull_secrets=[pull]", "service_account=danlu",
    "credentials.AWS_ACCESS_KEY_ID=storage/id", "credentials_secret=more", "env.AWS_ENDPOINT_URL_S3=http://store:8333",
    "volumes./data=shared", "redis.address=redis:6379", "redis.password=redis/password", "auth_secret=ray-token",
    "workers.gpu.accelerator=nvidia-l4", "workers.gpu.idle_s=900", "workers.cpu.disk_gib=100", "job.deadline_s=86400",
    "workers.train.node_selector.pool=a100", "head.tolerations=[{key: dedicated, operator: Equal, value: head}]",
]  # fmt: skip

needs_schemas = pytest.mark.skipif(
    importlib.util.find_spec("kubernetes_validate") is None, reason="the dev extra's kubernetes-validate carries the schemas"
)


def valid(found: dict[str, Any]) -> None:
    """Raises unless a resource is one that its API takes, the templates of its pods included."""
    import kubernetes_validate

    if found["apiVersion"] == "v1":
        for version in KUBERNETES:
            kubernetes_validate.validate(found, version, strict=True)
        return
    jsonschema.validate(found, SCHEMA)
    for template in templates(found):
        for version in KUBERNETES:
            kubernetes_validate.validate(
                {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}, version, strict=True
            )


def cluster_spec(found: dict[str, Any]) -> dict[str, Any]:
    return dict(found["spec"].get("rayClusterSpec", found["spec"]))


def templates(found: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(found)
    submitter = found["spec"].get("submitterPodTemplate")
    groups = [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return [*groups, *([submitter] if submitter else [])]


def worker(spec: dict[str, Any], name: str) -> dict[str, Any]:
    return next(group for group in spec["workerGroupSpecs"] if group["groupName"] == name)


@needs_schemas
@pytest.mark.parametrize("assignments", [[], EVERYTHING, ["platform=karpenter"], ["auth=disabled", "job.keep_cluster=true"]])
def test_what_is_rendered_is_what_the_apis_take(assignments: list[str]) -> None:
    chosen = with_overrides(assignments)
    for found in [*kuberay.job(chosen, RECIPE), *kuberay.cluster(chosen)]:
        valid(found)


@needs_schemas
def test_the_schemas_refuse_a_misspelt_field_and_a_number_among_the_start_parameters() -> None:
    good = kuberay.cluster(Settings())[0]
    for path, key, value in (
        (("spec",), "workerGroups", []),
        (("spec", "headGroupSpec", "rayStartParams"), "num-cpus", 0),
        (("spec", "headGroupSpec", "template", "spec"), "tolerationz", []),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0), "ports", [{"containerPort": "8265"}]),
    ):
        bad: Any = copy.deepcopy(good)
        target = bad
        for step in path:
            target = target[step]
        target[key] = value
        with pytest.raises(Exception, match=key if key != "ports" else "8265"):
            valid(bad)


GROUPS = st.dictionaries(
    st.sampled_from(["a", "pool-1", "big"]),
    st.builds(
        Workers,
        kinds=st.lists(st.sampled_from(["cpu", "generate", "train"]), min_size=1, max_size=3, unique=True),
        max=st.integers(1, 500),
        cpus=st.integers(1, 192),
        memory_gib=st.floats(8, 2000, width=32),
        gpus=st.integers(0, 8),
        shm_gib=st.floats(0, 1.5, width=32),
        object_store_gib=st.floats(0.125, 2, width=32),
        disk_gib=st.floats(0, 4000, width=32),
    ),
    min_size=1,
)


@settings(max_examples=15, deadline=None)
@given(workers=GROUPS, platform=st.sampled_from(["generic", "gke", "eks", "karpenter", "aks"]))
def test_any_groups_of_workers_give_a_manifest_that_the_autoscaler_reads_back(workers: dict[str, Workers], platform: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    chosen = Settings.model_validate({"platform": platform, "workers": {name: each.model_dump() for name, each in workers.items()}})
    found = kuberay.cluster(chosen)[0]
    jsonschema.validate(found, SCHEMA)
    types = _derive_autoscaling_config_from_ray_cr(found)["available_node_types"]
    for name, group in workers.items():
        read = types[name]
        assert (read["min_workers"], read["max_workers"]) == (group.min, group.max)
        assert (read["resources"]["CPU"], read["resources"].get("GPU", 0)) == (group.cpus, group.gpus)
        assert {key: value for key, value in read["resources"].items() if key.startswith("danlu_")} == {
            f"danlu_{kind}": 1 for kind in group.kinds
        }
    assert types["headgroup"]["resources"]["CPU"] == 0
    most = sum(group.max for group in workers.values() if "train" in group.kinds)
    assert types["headgroup"]["resources"].get("danlu_train_nodes", 0) == most


def test_the_shell_that_starts_ray_sees_the_custom_resources_as_json() -> None:
    """The operator writes `--KEY=VALUE` into a line for bash."""
    group = worker(cluster_spec(kuberay.cluster(Settings())[0]), "gpu")
    line = " ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items())
    seen = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout.splitlines()
    resources = next(word for word in seen if word.startswith("--resources=")).partition("=")[2]
    assert json.loads(resources) == {"danlu_generate": 1}
    # the newest operator strips quotes and reads JSON from what is left
    assert json.loads(group["rayStartParams"]["resources"].strip("'\"` ")) == {"danlu_generate": 1}


def test_ray_start_accepts_every_parameter() -> None:
    import ray

    source = (Path(ray.__file__).parent / "scripts" / "scripts.py").read_text("utf-8")  # importing it takes seconds
    known = set(re.findall(r'"--([a-z0-9-]+)"', source[: source.index("def start(")]))
    assert "num-cpus" in known
    spec = cluster_spec(kuberay.cluster(with_overrides(EVERYTHING))[0])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known


def test_shared_memory_holds_the_object_store_and_what_is_asked_besides_and_tasks_get_the_rest() -> None:
    spec = cluster_spec(kuberay.cluster(Settings())[0])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volume = next(each for each in pod["volumes"] if each["name"] == "shm")["emptyDir"]
        assert volume["medium"] == "Memory"
        shared = int(volume["sizeLimit"].removesuffix("Mi")) << 20
        limit = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Mi")) << 20
        store, heap = int(group["rayStartParams"]["object-store-memory"]), int(group["rayStartParams"]["memory"])
        assert store < shared <= limit / 2 + (1 << 30)
        assert limit - (1 << 20) <= heap + shared <= limit + (1 << 20)
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    gpu = next(each for each in worker(spec, "gpu")["template"]["spec"]["volumes"] if each["name"] == "shm")["emptyDir"]
    assert int(gpu["sizeLimit"].removesuffix("Mi")) >= (8 + 2) * 1024


def test_what_can_be_done_again_runs_on_spot_nodes_and_training_and_the_head_do_not() -> None:
    spec = cluster_spec(kuberay.cluster(with_overrides(["platform=gke"]))[0])
    label = "cloud.google.com/gke-spot"
    for name in ("cpu", "gpu"):
        pod = worker(spec, name)["template"]["spec"]
        assert pod["nodeSelector"][label] == "true"
        assert any(each.get("key") == label for each in pod["tolerations"])
    for pod in (worker(spec, "train")["template"]["spec"], spec["headGroupSpec"]["template"]["spec"]):
        assert label not in pod.get("nodeSelector", {})
        terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert terms == [{"matchExpressions": [{"key": label, "operator": "NotIn", "values": ["true"]}]}]
        assert all(each.get("key") != label for each in pod.get("tolerations", []))
    with pytest.raises(ManifestError, match=r"workers\.train: training does not run on spot nodes"):
        with_overrides(["platform=gke", "workers.train.spot=true"])
    with pytest.raises(ManifestError, match=r"workers\.cpu\.spot: platform 'generic' has no label"):
        kuberay.cluster(with_overrides(["workers.cpu.spot=true"]))


def test_nothing_is_reachable_from_outside_and_ray_asks_for_a_token() -> None:
    spec = cluster_spec(kuberay.cluster(Settings())[0])
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP" and "enableIngress" not in spec["headGroupSpec"]
    for template in templates(kuberay.job(Settings(), RECIPE)[1]):
        security = template["spec"]["containers"][0]["securityContext"]
        assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert "hostNetwork" not in template["spec"]


def test_credentials_are_named_and_never_written() -> None:
    chosen = with_overrides(EVERYTHING)
    spec = cluster_spec(kuberay.cluster(chosen)[0])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        (entry,) = (each for each in container["env"] if each["name"] == "AWS_ACCESS_KEY_ID")
        assert entry == {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "storage", "key": "id"}}}
        assert container["envFrom"] == [{"secretRef": {"name": "more"}}]
    password = spec["gcsFaultToleranceOptions"]["redisPassword"]
    assert password == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}


def test_the_job_runs_the_recipe_from_its_config_map_and_goes_on_after_a_lost_head() -> None:
    config_map, job = kuberay.job(with_overrides(["workers.cpu.max=4", "workers.cpu.cpus=16"]), RECIPE)
    assert config_map["data"] == {"my-domain.yaml": RECIPE.text}
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:6] == ["env", "--chdir=/opt/danlu", "python", "-m", "pipelines", "run"]
    assert words[words.index("--runs") + 1] == "s3://bucket/runs" and words[words.index("--workers") + 1] == "64"
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mount = next(each for each in head["containers"][0]["volumeMounts"] if each["name"] == "recipe")
    volume = next(each for each in head["volumes"] if each["name"] == "recipe")
    assert words[6] == f"{mount['mountPath']}/my-domain.yaml"
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert job["spec"]["backoffLimit"] >= 1 and job["spec"]["shutdownAfterJobFinishes"] is True

    from pipelines.cli import _parser

    parsed = _parser().parse_args(words[5:])
    assert (parsed.recipe, parsed.address, parsed.workers) == (words[6], "auto", 64)


def test_runs_that_the_pods_would_not_see_are_refused() -> None:
    for runs in ("runs", "/mnt/runs"):
        with pytest.raises(ManifestError, match="pods do not see this folder"):
            kuberay.job(Settings(), kuberay.Recipe("a.yaml", "", runs))
    kuberay.job(with_overrides(["volumes./mnt=claim"]), kuberay.Recipe("a.yaml", "", "/mnt/runs"))
    with pytest.raises(ManifestError, match="file name"):
        kuberay.job(Settings(), kuberay.Recipe("my recipe.yaml", "", "s3://b/r"))


def test_a_recipe_decides_the_groups_and_one_without_a_group_for_it_is_refused() -> None:
    assert list(Settings().for_kinds({"cpu"}).workers) == ["cpu"]
    assert list(Settings().for_kinds({"train"}).workers) == ["cpu", "train"]
    with pytest.raises(ManifestError, match="workers for generate"):
        with_overrides(["workers.gpu=null"]).for_kinds({"cpu", "generate"})
