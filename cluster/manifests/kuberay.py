"""KubeRay custom resources (ray.io/v1): a RayCluster, or a RayJob that makes one, runs a recipe and takes it down.

Written for KubeRay 1.5.1 and later (`authOptions`), with version 2 of Ray's autoscaler.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from cluster import storage
from cluster.manifests.node import (
    DASHBOARD_PORT,
    GCS_PORT,
    METRICS_PORT,
    custom_resources,
    environment,
    heap_bytes,
    object_store_bytes,
    shared_memory_bytes,
)  # fmt: skip
from cluster.manifests.settings import Head, ManifestError, SecretKey, Settings, Toleration, Workers

Object = dict[str, Any]

_USER = 1000  # of the images in cluster/images
_RECIPE_FOLDER = "/etc/danlu"
_MOST_RECIPE_BYTES = 1_000_000
"""A ConfigMap holds a MiB."""
_GRACE_S = 120
"""A node that is taken away has so long to end its units: a cloud's notice for spot nodes."""

_SPOT = {
    "gke": ("cloud.google.com/gke-spot", "true"),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT"),
    "karpenter": ("karpenter.sh/capacity-type", "spot"),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot"),
}
"""Label and value of spot nodes; where they have a taint, it bears the same name and value."""
_ACCELERATOR = {
    "generic": "nvidia.com/gpu.product",
    "gke": "cloud.google.com/gke-accelerator",
    "eks": "k8s.amazonaws.com/accelerator",
    "karpenter": "karpenter.k8s.aws/instance-gpu-name",
    "aks": "kubernetes.azure.com/accelerator",
}

_POD_SECURITY: Object = {
    "runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER, "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
_CONTAINER_SECURITY: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""Both together are what a namespace that enforces the `restricted` standard of pod security asks for."""


@dataclass(frozen=True)
class Recipe:
    """The recipe of a job: its file's name and text, and where its runs lie."""

    file: str
    text: str
    runs: str


def job(settings: Settings, recipe: Recipe) -> list[Object]:
    """A ConfigMap with the recipe and the RayJob that runs it.

    A job that fails, or loses its head, is tried again on a fresh cluster with the same command, which goes on where it
    stopped. Raises ManifestError for runs that the pods would not see and for a recipe too large for a ConfigMap.
    """
    check_runs(settings, recipe.runs)
    if not re.fullmatch(r"[-._a-zA-Z0-9]{1,200}", recipe.file):
        raise ManifestError(f"{recipe.file}: a recipe's file name may hold letters, digits, '-', '_' and '.' alone")
    if len(recipe.text.encode()) > _MOST_RECIPE_BYTES:
        raise ManifestError(f"{recipe.file} has more than {_MOST_RECIPE_BYTES:,} bytes, too large for a ConfigMap")
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(settings, f"{settings.name}-recipe"),
        "data": {recipe.file: recipe.text},
    }
    spec: Object = {
        "entrypoint": entrypoint(settings, recipe),
        "submissionMode": "K8sJobMode",
        "backoffLimit": settings.job.retries,
        "shutdownAfterJobFinishes": not settings.job.keep_cluster,
        "submitterPodTemplate": _submitter(settings),
        "rayClusterSpec": _cluster_spec(settings, recipe),
    }
    if not settings.job.keep_cluster:
        spec["ttlSecondsAfterFinished"] = settings.job.ttl_s
    if settings.job.deadline_s:
        spec["activeDeadlineSeconds"] = settings.job.deadline_s
    ray_job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(settings, settings.name), "spec": spec}
    return [config_map, ray_job]


def cluster(settings: Settings) -> list[Object]:
    """A RayCluster that stays until it is deleted; `danlu submit` runs recipes on it."""
    return [
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": _metadata(settings, settings.name),
            "spec": _cluster_spec(settings, None),
        }
    ]


def entrypoint(settings: Settings, recipe: Recipe) -> str:
    """The job's command, each word quoted; it runs in `job.directory` wherever Ray's own processes were started."""
    words = ["env", f"--chdir={settings.job.directory}", "python", "-m", "pipelines", "run", f"{_RECIPE_FOLDER}/{recipe.file}"]
    return shlex.join([*words, "--runs", recipe.runs, "--address", "auto", "--workers", str(settings.cpu_workers())])


def check_runs(settings: Settings, runs: str) -> None:
    """Raises ManifestError unless `runs` is a URI or lies below a shared volume."""
    if storage.is_remote(runs) or any(runs == path or runs.startswith(path.rstrip("/") + "/") for path in settings.volumes):
        return
    raise ManifestError(
        f"--runs {runs}: pods do not see this folder; give a URI (s3://bucket/runs), "
        "or a folder of a shared volume (--set volumes./data=CLAIM --runs /data/runs)"
    )


def _cluster_spec(settings: Settings, recipe: Recipe | None) -> Object:
    spec: Object = {
        "rayVersion": settings.ray_version,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": settings.autoscaler.upscaling,
            "idleTimeoutSeconds": settings.autoscaler.idle_s,
            "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "2Gi"}},
            "securityContext": dict(_CONTAINER_SECURITY),
        },
        "headGroupSpec": _head_group(settings, recipe),
        "workerGroupSpecs": [_worker_group(settings, name, group) for name, group in settings.workers.items()],
    }
    if settings.auth == "token":
        secret = {"secretName": settings.auth_secret} if settings.auth_secret else {}
        spec["authOptions"] = {"mode": "token", **secret}
    else:
        spec["authOptions"] = {"mode": "disabled"}
    if settings.redis is not None:
        options: Object = {"redisAddress": settings.redis.address}
        for name, value in (("redisUsername", settings.redis.username), ("redisPassword", settings.redis.password)):
            if value is not None:
                options[name] = {"valueFrom": {"secretKeyRef": _key(value)}}
        spec["gcsFaultToleranceOptions"] = options
    return spec


def _head_group(settings: Settings, recipe: Recipe | None) -> Object:
    head = settings.head
    container = _container(settings, "ray-head", settings.image, head, head=True)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": GCS_PORT},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
        {"name": "metrics", "containerPort": METRICS_PORT},
    ]
    spec = _pod(settings, container, head, head.tolerations)
    _keep_off_spot(settings, spec)
    if recipe is not None:
        container["volumeMounts"].append({"name": "recipe", "mountPath": _RECIPE_FOLDER, "readOnly": True})
        spec["volumes"].append({"name": "recipe", "configMap": {"name": f"{settings.name}-recipe"}})
    parameters = {
        "num-cpus": "0",  # no task beside the control process and the driver
        "num-gpus": "0",
        "dashboard-host": "0.0.0.0",  # within the pod network alone: the operator submits the job there, with the token
        **_parameters(settings, head, None),
    }
    return {"serviceType": "ClusterIP", "rayStartParams": parameters, "template": _template(settings, "head", spec)}


def _worker_group(settings: Settings, name: str, group: Workers) -> Object:
    container = _container(settings, "ray-worker", settings.image_of(group), group, head=False)
    tolerations, spot = list(group.tolerations), is_spot(settings, name, group)
    if group.gpus:
        container["resources"]["limits"][group.gpu_resource] = str(group.gpus)
        container["resources"]["requests"][group.gpu_resource] = str(group.gpus)
        tolerations.append(Toleration(key=group.gpu_resource, effect="NoSchedule"))
    spec = _pod(settings, container, group, tolerations)
    selector = dict(group.node_selector)
    if group.accelerator:
        selector[_ACCELERATOR[settings.platform]] = group.accelerator
    if spot:
        label, value = _SPOT[settings.platform]
        selector[label] = value
        toleration = {"key": label, "operator": "Equal", "value": value, "effect": "NoSchedule"}
        spec["tolerations"] = [*spec.get("tolerations", []), toleration]
    else:
        _keep_off_spot(settings, spec)
    if selector:
        spec["nodeSelector"] = selector
    spec["automountServiceAccountToken"] = False  # workers have no business with the Kubernetes API
    spec["terminationGracePeriodSeconds"] = _GRACE_S
    found: Object = {
        "groupName": name,
        "replicas": group.min,
        "minReplicas": group.min,
        "maxReplicas": group.max,
        "rayStartParams": {"num-cpus": str(group.cpus), "num-gpus": str(group.gpus), **_parameters(settings, group, group)},
        "template": _template(settings, name, spec),
    }
    if group.idle_s is not None:
        found["idleTimeoutSeconds"] = group.idle_s
    return found


def is_spot(settings: Settings, name: str, group: Workers) -> bool:
    """Whether a group's nodes may be taken away. Raises ManifestError where the platform names no such nodes."""
    if group.spot and settings.platform not in _SPOT:
        raise ManifestError(
            f"workers.{name}.spot: platform {settings.platform!r} has no label of spot nodes; set platform to one of "
            f"{', '.join(sorted(_SPOT))}, or spot=false with the group's node_selector and tolerations"
        )
    return group.restartable and settings.platform in _SPOT if group.spot is None else group.spot


def _submitter(settings: Settings) -> Object:
    """The pod that hands the job to the head and follows its output; the operator adds the command."""
    container = {
        "name": "ray-job-submitter",
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": dict(_CONTAINER_SECURITY),
    }
    spec: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": dict(_POD_SECURITY),
        "containers": [container],
    }
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return _template(settings, "submitter", spec)


def _parameters(settings: Settings, node: Head | Workers, group: Workers | None) -> dict[str, str]:
    """The arguments of `ray start` that head and workers share. KubeRay writes them into a shell command: the quotes around
    the resources are the shell's, and the form is the one that the operator, Ray's autoscaler and the shell all read alike."""
    resources = json.dumps(custom_resources(settings, group), separators=(",", ":"))
    return {
        "memory": str(heap_bytes(node)),
        "object-store-memory": str(object_store_bytes(node)),
        "metrics-export-port": str(METRICS_PORT),
        "resources": f"'{resources}'",
    }


def _container(settings: Settings, name: str, image: str, node: Head | Workers, head: bool) -> Object:
    amounts = {"cpu": str(node.cpus), "memory": _mebibytes(node.memory_gib)}
    if node.disk_gib:
        amounts["ephemeral-storage"] = _mebibytes(node.disk_gib)
    container: Object = {
        "name": name,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": [{"name": key, "value": value} for key, value in environment(settings, head).items()],
        "resources": {"limits": dict(amounts), "requests": dict(amounts)},
        "securityContext": dict(_CONTAINER_SECURITY),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "ray", "mountPath": "/tmp/ray"}],
    }
    for variable, value in settings.credentials.items():
        container["env"].append({"name": variable, "valueFrom": {"secretKeyRef": _key(value)}})
    if settings.credentials_secret:
        container["envFrom"] = [{"secretRef": {"name": settings.credentials_secret}}]
    for number, path in enumerate(settings.volumes):
        container["volumeMounts"].append({"name": f"shared-{number}", "mountPath": path})
    return container


def _pod(settings: Settings, container: Object, node: Head | Workers, tolerations: list[Toleration]) -> Object:
    disk = {"sizeLimit": _mebibytes(node.disk_gib)} if node.disk_gib else {}
    spec: Object = {
        "restartPolicy": "Never",  # version 2 of the autoscaler replaces pods; a restarted one would be taken for the old node
        "securityContext": dict(_POD_SECURITY),
        "containers": [container],
        "volumes": [
            # memory-backed, or Ray puts its objects on disk; used pages count as the pod's memory
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{-(-shared_memory_bytes(node) // (1 << 20))}Mi"}},
            {"name": "ray", "emptyDir": disk},  # logs and spilled objects
        ],
    }
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    for number, claim in enumerate(settings.volumes.values()):
        spec["volumes"].append({"name": f"shared-{number}", "persistentVolumeClaim": {"claimName": claim}})
    if node.node_selector:
        spec["nodeSelector"] = dict(node.node_selector)
    if tolerations:
        spec["tolerations"] = [_toleration(each) for each in tolerations]
    return spec


def _keep_off_spot(settings: Settings, spec: Object) -> None:
    """For pods that must not be taken away; nothing to say on a platform without a label for such nodes."""
    if settings.platform in _SPOT:
        label, value = _SPOT[settings.platform]
        terms = [{"matchExpressions": [{"key": label, "operator": "NotIn", "values": [value]}]}]
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _template(settings: Settings, group: str, spec: Object) -> Object:
    return {"metadata": {"labels": {**_labels(settings), "danlu/group": group}}, "spec": spec}


def _metadata(settings: Settings, name: str) -> Object:
    return {"name": name, "namespace": settings.namespace, "labels": _labels(settings)}


def _labels(settings: Settings) -> dict[str, str]:
    return {"app.kubernetes.io/name": "danlu", "app.kubernetes.io/instance": settings.name}


def _toleration(given: Toleration) -> dict[str, str]:
    return {key: value for key, value in given.model_dump().items() if value}


def _key(value: SecretKey) -> dict[str, str]:
    return {"name": value.secret, "key": value.key}


def _mebibytes(gib: float) -> str:
    return f"{round(gib * 1024)}Mi"
