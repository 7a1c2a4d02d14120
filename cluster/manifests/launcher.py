"""YAML for Ray's cluster launcher (`ray up`): AWS, Google Cloud, or machines that are there already."""

from __future__ import annotations

import shlex
from typing import Any

from cluster.manifests.node import (
    DASHBOARD_PORT,
    GCS_PORT,
    custom_resources,
    environment,
    heap_bytes,
    object_store_bytes,
    shared_memory_bytes,
)  # fmt: skip
from cluster.manifests.settings import Head, ManifestError, Settings, Workers

Object = dict[str, Any]

_HEAD = "head"
_TOKEN = "~/.ray/auth_token"


def launcher(settings: Settings) -> Object:
    """The cluster as `ray up` reads it. Head and workers start Ray with the token in `~/.ray/auth_token` of the machine that
    calls `ray up`; the dashboard stays on the head's loopback (`ray dashboard`, or an SSH tunnel, reaches it).

    Raises ManifestError for what a provider needs and the settings lack.
    """
    chosen = settings.launcher
    config: Object = {
        "cluster_name": settings.name,
        "provider": _provider(settings),
        "auth": {"ssh_user": chosen.ssh_user},
        "idle_timeout_minutes": settings.autoscaler.idle_s / 60,
        "upscaling_speed": 1.0 if settings.autoscaler.upscaling == "Conservative" else 100.0,
        "max_workers": sum(group.max for group in settings.workers.values()),
        "file_mounts": {_TOKEN: _TOKEN} if settings.auth == "token" else {},
        "head_start_ray_commands": ["ray stop", _start(settings, head=True)],
        "worker_start_ray_commands": ["ray stop", _start(settings, head=False)],
    }
    if chosen.ssh_private_key:
        config["auth"]["ssh_private_key"] = chosen.ssh_private_key
    if chosen.docker:
        config["docker"] = _docker(settings)
    if chosen.provider == "local":
        config["max_workers"] = len(chosen.worker_ips)
        return config
    config["head_node_type"] = _HEAD
    config["available_node_types"] = {_HEAD: _node_type(settings, _HEAD, None)}
    for name, group in settings.workers.items():
        if name == _HEAD:
            raise ManifestError(f"workers.{_HEAD}: the launcher calls the head so; choose another name for the group")
        config["available_node_types"][name] = _node_type(settings, name, group)
    return config


def _provider(settings: Settings) -> Object:
    chosen = settings.launcher
    if chosen.provider == "local":
        if not chosen.head_ip:
            raise ManifestError("launcher.head_ip: the address of the head, for provider local")
        return {"type": "local", "head_ip": chosen.head_ip, "worker_ips": list(chosen.worker_ips)}
    found: Object = {"type": chosen.provider, "region": chosen.region}
    if chosen.zone:
        found["availability_zone"] = chosen.zone
    if chosen.provider == "aws":
        return {**found, "cache_stopped_nodes": False}  # spot machines cannot be stopped and started
    for name, value in (("project", chosen.project), ("zone", chosen.zone), ("machine_image", chosen.machine_image)):
        if not value:
            raise ManifestError(f"launcher.{name}: provider gcp needs it")
    return {**found, "project_id": chosen.project}


def _node_type(settings: Settings, name: str, group: Workers | None) -> Object:
    node = settings.head if group is None else group
    if not node.instance:
        where = "head" if group is None else f"workers.{name}"
        raise ManifestError(f"{where}.instance: the machine type of these nodes, for provider {settings.launcher.provider}")
    resources = {"CPU": 0 if group is None else group.cpus, **({"GPU": group.gpus} if group is not None and group.gpus else {})}
    found: Object = {
        # Ray on the node is told just these (RAY_OVERRIDE_RESOURCES)
        "resources": {
            **resources, "memory": heap_bytes(node), "object_store_memory": object_store_bytes(node),
            **custom_resources(settings, group),
        },
        "node_config": _aws(settings, group) if settings.launcher.provider == "aws" else _gcp(settings, group),
    }  # fmt: skip
    if group is None:
        return found
    found |= {"min_workers": group.min, "max_workers": group.max}
    if group.idle_s is not None:
        found["idle_timeout_s"] = group.idle_s
    if settings.launcher.docker:
        found["docker"] = {"worker_image": settings.image_of(group), "worker_run_options": [_shm(group)]}
    return found


def _spot(group: Workers | None) -> bool:
    if group is None:
        return False
    return group.restartable if group.spot is None else group.spot


def _aws(settings: Settings, group: Workers | None) -> Object:
    node, chosen = settings.head if group is None else group, settings.launcher
    disk = {"VolumeSize": chosen.disk_gib, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    found: Object = {
        "InstanceType": node.instance,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},  # 2: from within a container
    }
    if chosen.machine_image:
        found["ImageId"] = chosen.machine_image
    if chosen.instance_profile:
        found["IamInstanceProfile"] = {"Arn": chosen.instance_profile}
    if _spot(group):
        found["InstanceMarketOptions"] = {"MarketType": "spot"}
    return found


def _gcp(settings: Settings, group: Workers | None) -> Object:
    node, chosen = settings.head if group is None else group, settings.launcher
    disk = {"diskSizeGb": chosen.disk_gib, "sourceImage": chosen.machine_image}
    found: Object = {
        "machineType": node.instance,
        "disks": [{"boot": True, "autoDelete": True, "initializeParams": disk}],
    }
    scheduling: Object = {}
    if _spot(group):
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    if group is not None and group.gpus:
        scheduling["onHostMaintenance"] = "TERMINATE"  # machines with GPUs cannot be moved
        if group.accelerator:
            found["guestAccelerators"] = [{"acceleratorType": group.accelerator, "acceleratorCount": group.gpus}]
    if scheduling:
        found["scheduling"] = scheduling
    if chosen.instance_profile:
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        found["serviceAccounts"] = [{"email": chosen.instance_profile, "scopes": scopes}]
    return found


def _docker(settings: Settings) -> Object:
    options = ["--ulimit nofile=65536:65536"]
    variables = {**environment(settings, head=True), "RAY_AUTH_MODE": settings.auth}
    options += [f"--env {shlex.quote(f'{name}={value}')}" for name, value in variables.items()]
    return {
        "image": settings.image,
        "container_name": settings.name,
        "pull_before_run": settings.image_pull_policy == "Always",
        "run_options": options,
        "head_run_options": [_shm(settings.head)],
        "disable_shm_size_detection": True,  # Ray's own guess is a share of the machine, not what the object store is told
        **({"worker_run_options": [_shm(_roomiest(settings))]} if settings.launcher.provider == "local" else {}),
    }


def _roomiest(settings: Settings) -> Workers:
    """The group whose shared memory is largest: what machines without types are given, all alike."""
    return max(settings.workers.values(), key=shared_memory_bytes)


def _shm(node: Head | Workers) -> str:
    return f"--shm-size={shared_memory_bytes(node)}"


def _start(settings: Settings, head: bool) -> str:
    """The command that starts Ray. Where nodes have types the launcher itself tells Ray their resources."""
    words = ["ray", "start"]
    local = settings.launcher.provider == "local"
    if head:
        words += ["--head", f"--port={GCS_PORT}", "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD_PORT}"]
        if local:
            words += ["--num-cpus=0", "--num-gpus=0", f"--object-store-memory={object_store_bytes(settings.head)}"]
        words += ["--autoscaling-config=~/ray_bootstrap_config.yaml"]
    else:
        words += [f"--address=$RAY_HEAD_IP:{GCS_PORT}"]
        if local:
            words += [f"--object-store-memory={object_store_bytes(_roomiest(settings))}"]
    variables = {} if settings.launcher.docker else {**environment(settings, head), "RAY_AUTH_MODE": settings.auth}
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in variables.items())
    return f"ulimit -n 65536; {exports}{' '.join(words)}"
