from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pydantic
import pytest

from cluster.manifests.overrides import with_overrides
from cluster.manifests.settings import ManifestError, Settings


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("workers.gpu.maxx=8", "--set workers.gpu.maxx: workers.gpu has no setting 'maxx'; did you mean 'max'?"),
        ("workers.gpy.max=8", "--set workers.gpy.max: there is no 'gpy'; did you mean 'gpu'?"),
        ("worker.gpu.max=8", "--set worker.gpu.max: manifest has no setting 'worker'; did you mean 'workers'?"),
        ("redis.adress=redis:6379", "did you mean 'address'?"),
        ("workers.big={kinds: [cpu], gpuss: 1}", "no setting 'gpuss'; did you mean 'gpus'?"),
        ("workers.gpu.max=eight", "workers.gpu.max: Input should be a valid integer"),
        ("workers.gpu.max=2.5", "workers.gpu.max: Input should be a valid integer"),
        ("workers.gpu.min=9", "workers.gpu: min (9) is above max (2)"),
        ("workers.gpu.kinds=[gpu]", "workers.gpu.kinds.0: Input should be 'cpu', 'generate' or 'train'"),
        ("workers.gpu.shm_gib=40", "more than half"),
        ("workers.gpu.max", "write it as PATH=VALUE"),
        ("workers.gpu.max={", "is no YAML value"),
        ("name.x=1", "name is a single value"),
        ("name=Danlu", "name: must be at most 40 of a-z"),
        ("workers.none=null", "there is no 'none'"),
        ("workers={}", "there is no group of workers"),
        ("volumes./tmp=claim", "no folder to mount at"),
    ],
)
def test_a_wrong_setting_is_told_with_its_path_and_the_nearest_valid_one(assignment: str, complaint: str) -> None:
    with pytest.raises(ManifestError) as told:
        with_overrides([assignment])
    assert complaint in str(told.value)


@pytest.mark.parametrize("assignment", ["env.AWS_SECRET_ACCESS_KEY=hunter2", "credentials.AWS_SECRET_ACCESS_KEY=hunter2"])
def test_the_value_of_a_secret_is_refused_and_not_repeated(assignment: str) -> None:
    with pytest.raises(ManifestError, match="SECRET/KEY") as told:
        with_overrides([assignment])
    assert "hunter2" not in str(told.value)


def test_values_are_read_by_the_type_of_their_setting() -> None:
    chosen = with_overrides(
        [
            "image=007", "workers.gpu.max=8", "workers.gpu.spot=false", "workers.cpu.kinds=[cpu, generate]",
            "workers.gpu.node_selector.example.com/disk=fast", "redis.address=redis:6379", "redis.password=redis/pw",
            "workers.big={kinds: [train], gpus: 8, memory_gib: 900}", "workers.train=null",
            "head.memory_gib=1.5", "head.object_store_gib=0.5",
        ]
    )  # fmt: skip
    assert chosen.image == "007"
    assert chosen.workers["gpu"].max == 8 and chosen.workers["gpu"].spot is False
    assert chosen.workers["gpu"].node_selector == {"example.com/disk": "fast"}
    assert chosen.workers["cpu"].kinds == ["cpu", "generate"]
    assert chosen.redis is not None and chosen.redis.password is not None and chosen.redis.password.key == "pw"
    assert list(chosen.workers) == ["cpu", "gpu", "big"]
    assert with_overrides(["redis=null"]).redis is None


def leaves(model: type[pydantic.BaseModel], values: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    for name, field in model.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, pydantic.BaseModel):
            yield from leaves(type(value), value, f"{path}{name}.")
        elif name == "workers":
            for group, inner in value.items():
                yield from leaves(type(inner), inner, f"{path}workers.{group}.")
        else:
            yield f"{path}{name}", field.annotation, value


def test_every_setting_can_be_set_to_the_value_it_has() -> None:
    """What `danlu manifest settings` prints is what --set takes: each path is found, each default passes its own checks."""
    defaults = Settings()
    for path, annotation, value in leaves(Settings, defaults, ""):
        text = value if annotation is str or typing.get_origin(annotation) is Literal else "null" if value is None else repr(value)
        text = {"True": "true", "False": "false"}.get(text, text)
        if value is None and type(None) not in typing.get_args(annotation):
            assert isinstance(annotation, types.UnionType)
        assert with_overrides([f"{path}={text}"]) == defaults, path
