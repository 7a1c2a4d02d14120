"""Launcher YAML against the schema that Ray ships, and through what `ray up` does before it calls a cloud."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cluster.manifests.launcher import launcher
from cluster.manifests.overrides import with_overrides
from cluster.manifests.settings import ManifestError

AWS = [
    "head.instance=m7i.xlarge",
    "workers.cpu.instance=m7i.4xlarge",
    "workers.gpu.instance=g6.2xlarge",
    "workers.train.instance=p4d",
]
GCP = [
    *AWS, "launcher.provider=gcp", "launcher.project=p", "launcher.zone=us-west1-b", "launcher.machine_image=projects/x/image",
    "workers.gpu.accelerator=nvidia-l4", "launcher.instance_profile=danlu@p.iam",
]  # fmt: skip
LOCAL = ["launcher.provider=local", "launcher.head_ip=10.0.0.1", "launcher.worker_ips=[10.0.0.2, 10.0.0.3]"]


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` prepares and checks it; the schema alone first, for `ray up` also fills in."""
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text("utf-8"))
    jsonschema.validate(config, schema)
    found = dict(prepare_config(config))
    validate_config(found)
    return found


@pytest.mark.parametrize("assignments", [AWS, GCP, LOCAL, [*AWS, "launcher.docker=false", "auth=disabled"]])
def test_what_is_rendered_is_what_ray_up_takes(assignments: list[str]) -> None:
    prepared(launcher(with_overrides(assignments)))


def test_the_types_of_nodes_keep_the_kinds_of_work_apart() -> None:
    types = prepared(launcher(with_overrides(AWS)))["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0 and types["head"]["max_workers"] == 0
    assert types["head"]["resources"]["danlu_train_gpus"] == 4
    assert types["cpu"]["resources"]["danlu_cpu"] == 1 and "GPU" not in types["cpu"]["resources"]
    assert types["train"]["resources"] | {"GPU": 4, "danlu_train": 1} == types["train"]["resources"]
    spot = {name: "InstanceMarketOptions" in each["node_config"] for name, each in types.items()}
    assert spot == {"head": False, "cpu": True, "gpu": True, "train": False}
    assert types["gpu"]["docker"]["worker_image"] == "danlu:gpu"
    on_google = launcher(with_overrides(GCP))["available_node_types"]
    assert on_google["gpu"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "provisioningModel" not in on_google["train"]["node_config"]["scheduling"]


def test_ray_asks_for_a_token_and_the_dashboard_stays_on_loopback() -> None:
    config = launcher(with_overrides(AWS))
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    bare = launcher(with_overrides([*AWS, "launcher.docker=false", "env.GREETING=it's here"]))
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "export RAY_AUTH_MODE=token;" in bare[key][-1] and """export GREETING='it'"'"'s here';""" in bare[key][-1]


def test_what_a_provider_needs_is_asked_for_by_name() -> None:
    with pytest.raises(ManifestError, match=r"head\.instance"):
        launcher(with_overrides([]))
    with pytest.raises(ManifestError, match=r"launcher\.project"):
        launcher(with_overrides([*AWS, "launcher.provider=gcp"]))
    with pytest.raises(ManifestError, match=r"launcher\.head_ip"):
        launcher(with_overrides(["launcher.provider=local"]))
