"""The model of the seconds of a trial, and its uses: chunk sizes and the time left."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from stores import SPEC, made_up_store
from test_sweep_run import fake as fake  # a fixture

from moejax.sweep import commands, load
from moejax.sweep.plan.costs import CostModel, TrialShape
from moejax.sweep.plan.plan import CHUNK_SECONDS, MAX_CHUNK, make_plan, set_measured_chunk_sizes
from moejax.sweep.report.status import read_status
from moejax.sweep.spec.parse import parse_spec
from moejax.sweep.store.costs import read_costs
from moejax.sweep.store.read import load_chunks
from moejax.sweep.store.schema import STORE_NAME

FACTORS = {"spectral": 2e-7, "joint_em": 3e-6, "multistart": 4e-4}


def true_seconds(shape: TrialShape) -> float:
    """Methods differ by orders of magnitude, and in how their time grows with d."""
    growth = {"spectral": 2.0, "joint_em": 1.0, "multistart": 1.3}[shape.method]
    slope = 1.5 if shape.channel == "relu" else 1.0
    return FACTORS[shape.method] * slope * shape.num_samples * shape.num_experts * (shape.dim / 10) ** growth


def shapes(sizes, dims, methods=tuple(FACTORS)):
    for method, activation, n, d in itertools.product(methods, ("linear", "relu"), sizes, dims):
        yield TrialShape(method, activation, n, d, 3)


def test_measured_shapes_are_their_means_and_others_follow_the_method():
    costs, random = CostModel(), np.random.default_rng(0)
    assert costs.seconds(TrialShape("spectral", "linear", 1024, 10, 3)) is None
    for shape in shapes((512, 2048, 8192), (10, 20, 40)):
        costs.add(shape, 8 * true_seconds(shape) * np.exp(0.1 * random.normal()), 8)
    for shape in shapes((1024, 32768), (15, 80)):
        assert np.log(costs.seconds(shape) / true_seconds(shape)) == pytest.approx(0, abs=0.3)
    measured = TrialShape("spectral", "linear", 2048, 10, 3)
    mean = costs.seconds(measured)
    costs.add(measured, 5.0, 2)
    assert costs.seconds(measured) == pytest.approx((8 * mean + 5.0) / 10)


def test_one_small_trial_of_each_method_gives_the_order_of_large_ones():
    """After a pilot the exponents are those of the work, and the constants those of the methods."""
    costs = CostModel()
    for shape in shapes((1024,), (10,)):
        costs.add(shape, true_seconds(shape), 1)
    for shape in shapes((65536,), (10,)):
        assert costs.seconds(shape) == pytest.approx(true_seconds(shape), rel=0.4)
    other = costs.seconds(TrialShape("another", "linear", 1024, 10, 3))
    assert FACTORS["spectral"] * 3072 < other < FACTORS["multistart"] * 3072


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_changes_nothing(seconds):
    costs, shape = CostModel(), TrialShape("spectral", "linear", 1024, 10, 3)
    costs.add(shape, seconds, 4)
    assert costs.seconds(shape) is None


def test_chunks_of_slow_methods_are_small():
    spec = 'methods = ["spectral", "joint_em"]\ntrials = 1000\nnum_samples = 1000\n'
    plan = make_plan(parse_spec(spec))
    before = [bucket.chunk_size for bucket in plan.buckets]
    set_measured_chunk_sizes(plan, CostModel(), {})
    assert [bucket.chunk_size for bucket in plan.buckets] == before
    costs = CostModel()
    costs.add(plan.buckets[0].shape, 1e-4, 1)
    costs.add(plan.buckets[1].shape, 0.2, 1)
    set_measured_chunk_sizes(plan, costs, {})
    assert plan.buckets[0].chunk_size > MAX_CHUNK - 5
    assert plan.buckets[1].chunk_size == CHUNK_SECONDS / 0.2
    set_measured_chunk_sizes(plan, costs, {plan.buckets[1].label: (17, 1)})
    assert plan.buckets[1].chunk_size == 17  # compiled already


def test_a_store_has_the_costs_of_its_programs(tmp_path):
    _, folder, plan = made_up_store(tmp_path)
    programs = read_costs(folder / STORE_NAME)
    assert set(programs) == {bucket.label for bucket in plan.buckets}
    for bucket in plan.buckets:
        cost = programs[bucket.label]
        assert cost.shape == bucket.shape
        assert (cost.trials, cost.chunk_size, cost.vmap_width) == (12, 6, 1)
        assert cost.seconds == pytest.approx(0.8)
    assert read_costs(tmp_path / "nowhere") == {}


def test_the_time_of_a_program_that_has_not_run_is_predicted(tmp_path):
    """From a program of its method with half the samples: twice its time."""
    from stores import add

    from moejax.sweep.execution.provenance import collect_provenance
    from moejax.sweep.spec.parse import read_spec
    from moejax.sweep.store.store import Store

    toml = tmp_path / "spec.toml"
    toml.write_text(SPEC.replace("num_samples = 100\n", "") + "[grid]\nnum_samples = [256, 512]\n")
    plan = make_plan(read_spec(toml))
    with Store(tmp_path / "run") as store:
        store.begin_run(plan, collect_provenance(plan, (), "nobody"))
        for position, cell in enumerate(plan.cells):
            if cell.data.num_samples == 256:
                add(store, plan, position, 0)
    state = read_status(tmp_path / "run")
    times = {bucket.label.rpartition("<=")[2]: bucket.trial_seconds for bucket in state.buckets}
    assert times["512"] == pytest.approx(2 * times["256"], rel=0.1)
    assert state.seconds_left == pytest.approx(2 * (6 * times["256"] + 12 * times["512"]), rel=1e-6)


def test_a_pilot_sets_the_chunks_and_a_resumed_sweep_keeps_them(fake, tmp_path, monkeypatch, capsys):
    toml, plugin = fake
    # a trial of a fifth of a second: five of them make a chunk
    monkeypatch.setenv("FAKE_CORE_SLEEP", "0.0")
    options = {"plugin": [plugin], "workers": 1, "set": ["num_samples=[40]", "noise_std=[0.1]"]}
    commands.sweep(toml, out=tmp_path / "plain", quiet=True, **options)
    slow = CostModel()
    monkeypatch.setattr("moejax.sweep.execution.pilot.CostModel", lambda: slow)
    monkeypatch.setattr(slow, "seconds", lambda shape: CHUNK_SECONDS / 5)
    commands.sweep(toml, out=tmp_path / "run", quiet=True, pilot=True, **options)
    notes = capsys.readouterr().err
    assert notes.count("ms/trial") == 2
    assert set(load_chunks(tmp_path / "plain")["size"]) == {30}
    assert set(load_chunks(tmp_path / "run")["size"]) == {5}
    options["set"] = [*options["set"], "trials=60"]
    resumed = commands.sweep(toml, out=tmp_path / "run", quiet=True, **options)
    assert resumed["trials_run"] == 60
    assert set(load_chunks(tmp_path / "run")["size"]) == {5}
    assert resumed["compilations"] == 0
    commands.sweep(toml, out=tmp_path / "plain", quiet=True, **options)
    ours, theirs = load(tmp_path / "run"), load(tmp_path / "plain")
    np.testing.assert_allclose(ours["recovery_error"], theirs["recovery_error"], rtol=1e-6)
