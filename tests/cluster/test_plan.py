"""The arithmetic of a plan: durations, fits and warnings of plain estimates on described clusters."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import fit, plan
from cluster.fit import Generation, Layout, Model, Training
from cluster.machines import PROFILES, Cluster, Gpu, NodeGroup, Storage
from cluster.plan import Estimate, Phase
from cluster.rates import DEFAULT, Rates

SEVEN = Model(6.7e9, 6.6e9, 32, 4096, 4096, 32, 32)
L20 = Gpu(name="L20", memory_gb=48, bf16_tflops=119.5, memory_gb_s=864)
A100 = Gpu(name="A100 SXM", memory_gb=80, bf16_tflops=312, memory_gb_s=2039)


def rates(**changed: object) -> Rates:
    known = yaml.safe_load(DEFAULT.read_text())
    started = dict.fromkeys(("ray_start_s", "first_task_s", "stage_s", "train_start_s", "engine_start_s", "task_s"), 0.0)
    return Rates.model_validate({**known, **started, **changed})


def nodes(count: int = 1, **changed: object) -> Cluster:
    values: dict[str, object] = {"count": count, "cpus": 8, "memory_gb": 64, "disk_gb": 1000, "network_gbit": 100, **changed}
    shared = Storage(kind="shared", free_gb=1e6) if count > 1 else Storage(kind="local")
    return Cluster(name="test", nodes=[NodeGroup.model_validate(values)], storage=shared)


def stage(*phases: Phase, **changed: object) -> Estimate:
    return dataclasses.replace(Estimate("rows", "corpus", "cpu", phases=phases), **changed)  # type: ignore[arg-type]


def codes(laid: plan.Plan) -> list[str]:
    return [warned.code for warned in [*laid.warnings, *(each for stage in laid.stages for each in stage.warnings)]]


def training(**changed: object) -> Training:
    values: dict[str, object] = {"model": SEVEN, "flops": 1e20, "steps": 1000, "batch": 64, "length": 4096, "micro": 1, **changed}
    return Training(**values)  # type: ignore[arg-type]


def train_stage(**changed: object) -> Estimate:
    return Estimate("base", "pretrain", "train", training=training(**changed))


phases = st.builds(
    Phase, st.just("units"), st.integers(1, 10_000), st.floats(0.1, 1e6), st.floats(0, 60e9), st.just(1.0), st.just(0.0),
    st.floats(0, 1e6),
)  # fmt: skip


@given(st.integers(64, 4096), st.floats(1, 1e6), st.integers(1, 4), st.floats(0, 1e12))
@settings(max_examples=60, deadline=None)
def test_twice_the_input_at_the_same_rates_takes_twice_as_long(units: int, seconds: float, count: int, moved: float) -> None:
    once = stage(Phase("units", units, seconds, 1e9), read_bytes=moved)
    twice = stage(Phase("units", 2 * units, 2 * seconds, 1e9), read_bytes=2 * moved)
    one, two = (plan.plan([each], nodes(count), rates()).seconds for each in (once, twice))
    assert two == pytest.approx(2 * one)


@given(st.lists(phases, min_size=1, max_size=3), st.integers(1, 32), st.integers(1, 32), st.floats(0, 1e12))
@settings(max_examples=100, deadline=None)
def test_more_nodes_never_make_rows_slower(found: list[Phase], count: int, more: int, moved: float) -> None:
    each = stage(*found, shuffled_bytes=moved)
    shared = [Cluster(name="x", nodes=[NodeGroup(count=n, cpus=8, memory_gb=64, disk_gb=100)], storage=Storage(kind="shared"))
              for n in (count, count + more)]  # fmt: skip
    few, many = (plan.plan([each], cluster, rates()).seconds for cluster in shared)
    assert many <= few * (1 + 1e-9)


@given(
    st.integers(1, 512), st.floats(1e15, 1e22), st.integers(1, 16), st.integers(1, 16), st.sampled_from(["ddp", "fsdp2"]),
    st.sampled_from([1, 2, 4]), st.integers(0, 8), st.floats(1, 400),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_more_nodes_never_make_training_slower(
    batch: int, flops: float, count: int, more: int, sharding: str, tensor: int, gpus: int, network: float
) -> None:
    each = training(batch=batch, flops=flops, sharding=sharding, tensor=tensor, model=dataclasses.replace(SEVEN, parameters=1e8))
    changed = {"gpus": gpus, "gpu": A100 if gpus else None, "memory_gb": 1000, "network_gbit": network}
    few, many = (fit.train_speed(each, nodes(n, **changed), rates()) for n in (count, count + more))
    if few.fits:  # where it does not, more GPUs may make it possible, and no slower than what is not
        assert many.fits
        assert many.seconds <= few.seconds * (1 + 1e-9)
    assert many.devices <= many.available


@given(st.floats(1, 1e9), st.floats(1, 1e9), st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_more_nodes_never_make_generation_slower(prompts: float, made: float, replicas: int, count: int, more: int) -> None:
    each = Generation(SEVEN, prompts, made, 64, 4096, replicas=replicas)
    few, many = (fit.generate_speed(each, nodes(n, gpus=2, gpu=A100), rates()).seconds for n in (count, count + more))
    assert many <= few * (1 + 1e-9)


def test_a_model_that_does_not_fit_is_told_with_the_layout_that_does() -> None:
    laid = plan.plan([train_stage()], nodes(gpus=8, gpu=A100, memory_gb=1000), rates())
    assert codes(laid) == ["model_too_large"]
    facts = laid.stages[0].warnings[0].facts
    assert facts["fits"] == "{sharding: fsdp2}"
    assert facts["gpus"] == 8
    assert facts["needs"] > SEVEN.parameters * 16


def test_the_layout_that_is_named_fits() -> None:
    each = training()
    layout, workers = next(fit.fitting(each, 8, A100, 34.0))
    assert fit.training_bytes(each, layout, workers, 34.0) <= 80e9
    assert "model_too_large" not in codes(plan.plan([train_stage(sharding=layout.sharding)], nodes(gpus=8, gpu=A100), rates()))


def test_a_model_that_fits_nowhere_is_told_so() -> None:
    seventy = dataclasses.replace(SEVEN, parameters=7e10, active=7e10, layers=80, hidden=8192)
    assert codes(plan.plan([train_stage(model=seventy)], nodes(gpus=4, gpu=L20), rates())) == ["model_fits_nowhere"]


def test_weights_gradients_and_moments_are_sixteen_bytes_a_parameter_cut_by_the_layout() -> None:
    each = training(length=0)
    whole, cut = (fit.training_bytes(each, Layout(kind, 1, "none"), 8, 34.0) for kind in ("ddp", "fsdp2"))
    assert whole == pytest.approx(SEVEN.parameters * 16)
    assert cut == pytest.approx(SEVEN.parameters * 16 / 8 + SEVEN.parameters / 32 * 8)
    lora = training(length=0, trained=4e7, frozen_bytes=4.0)
    assert fit.training_bytes(lora, Layout("ddp", 1, "none"), 8, 34.0) == pytest.approx(SEVEN.parameters * 4 + 4e7 * 16)


def test_a_batch_that_does_not_divide_among_all_gpus_is_told_with_the_number_that_works() -> None:
    small = dataclasses.replace(SEVEN, parameters=1e8, active=1e8)
    laid = plan.plan([train_stage(model=small, batch=6)], nodes(gpus=8, gpu=A100), rates())
    assert codes(laid) == ["idle_gpus"]
    assert laid.train_workers == 6


def test_scoring_is_dealt_out_to_all_gpus_whatever_a_batch_is() -> None:
    small = dataclasses.replace(SEVEN, parameters=1e8, active=1e8)
    laid = plan.plan([train_stage(model=small, batch=6, trained=0.0, spread=True)], nodes(gpus=8, gpu=A100), rates())
    assert (codes(laid), laid.train_workers) == ([], 8)


def test_a_slow_network_is_told_and_nodes_are_left_out() -> None:
    cluster = nodes(4, gpus=8, gpu=A100, network_gbit=1, memory_gb=1000)
    laid = plan.plan([train_stage(sharding="fsdp2", flops=1e18, batch=32)], cluster, rates())
    assert codes(laid) == ["network_leaves_out"]
    assert laid.train_workers == 8


def test_an_engine_too_large_for_one_gpu_is_told_how_many_it_takes() -> None:
    big = dataclasses.replace(SEVEN, parameters=3.2e10, active=3.2e10, heads=64)
    each = Estimate("tasks", "generate", "generate", generation=Generation(big, 1e6, 1e6, 64, 4096))
    laid = plan.plan([each], nodes(gpus=4, gpu=L20), rates())
    assert codes(laid) == ["engine_too_large"]
    assert laid.stages[0].warnings[0].facts["fits"] == 2


def test_the_last_step_of_deduplication_that_outgrows_a_node_is_told() -> None:
    each = stage(Phase("map", 100, 100, 1e9), Phase("resolve", 1, 10, 495e9))
    assert "last_step" in codes(plan.plan([each], nodes(4), rates()))


def test_fewer_units_than_cores_are_told() -> None:
    assert "few_units" in codes(plan.plan([stage(Phase("units", 3, 1000, 1e9))], nodes(4), rates()))


def test_memory_bounds_how_many_tasks_run_at_once() -> None:
    laid = plan.plan([stage(Phase("units", 100, 1000, 20e9))], nodes(), rates())
    assert laid.stages[0].at_once == 1
    assert codes(laid) == ["memory_limits"]


def test_a_full_disk_and_runs_that_other_nodes_do_not_see_are_told() -> None:
    two = Cluster(name="x", nodes=[NodeGroup(count=2, cpus=4, memory_gb=64, disk_gb=1)], storage=Storage(kind="local"))
    assert codes(plan.plan([stage(Phase("units", 100, 10, 1e9), written_bytes=2e9)], two, rates())) == ["disk", "runs_local"]


def test_a_stage_that_needs_a_gpu_is_told_on_a_cluster_without() -> None:
    phase = Phase("encode", 10, 100, 1e9, gpus=1.0)
    found = [stage(phase), train_stage(needs_gpu=True, flops=1e12, model=dataclasses.replace(SEVEN, parameters=1e8))]
    assert codes(plan.plan(found, nodes(), rates())) == ["needs_gpu", "needs_gpu"]


def test_stages_of_one_resource_follow_each_other_and_others_run_beside_them() -> None:
    first = stage(Phase("units", 8, 80, 1e9))
    second = dataclasses.replace(first, name="more")
    beside = train_stage(flops=1e12, model=dataclasses.replace(SEVEN, parameters=1e8))
    laid = plan.plan([first, second, beside], nodes(), rates())
    begins = {each.estimate.name: each.begins for each in laid.stages}
    assert begins["rows"] == begins["base"] == 0
    assert begins["more"] == pytest.approx(10)
    assert laid.seconds == pytest.approx(20)


def test_what_is_unknown_is_named_and_not_counted() -> None:
    laid = plan.plan(
        [stage(unknown="input"), dataclasses.replace(stage(Phase("units", 8, 80, 1e9)), name="more")], nodes(), rates()
    )
    assert laid.unknown == ("rows",)
    assert laid.stages[0].seconds is None
    assert laid.seconds == pytest.approx(10)


def test_a_stage_that_has_finished_takes_no_time_and_no_more_disk() -> None:
    laid = plan.plan([stage(Phase("units", 8, 80, 1e9), done=True, seconds_taken=12.0, written_bytes=5e9)], nodes(), rates())
    assert (laid.seconds, laid.written_bytes) == (0.0, 0)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_describes_a_cluster_under_its_own_name(path) -> None:  # type: ignore[no-untyped-def]
    found = Cluster.model_validate(yaml.safe_load(path.read_text()))
    assert found.name == path.stem
    assert all(found.task_memory(group) > 0.5 * group.memory_gb * 1e9 for group in found.nodes)
