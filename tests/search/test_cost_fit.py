"""The engine's cost model on a made-up GPU: unseen placements, error bars, published costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gearshift.placement import Placement
from gearshift.search.cost import CostModel, load_engine_cost, save_costs
from gearshift.search.cost_engine import CostError, Engine
from gearshift.search.cost_fit import EngineCost, fit_engine_cost
from gearshift.search.cost_report import PUBLISHED_COSTS, judge_costs, published_speed_up
from gearshift.search.cost_rows import MeasuredStep, read_cost_rows
from gearshift.workload import Workload
from tests.search.cost_scene import CONTEXTS, MEMORY, draw, made_up_engine, make_rows, true_seconds

NOISE = 0.015


@pytest.fixture(scope="module")
def engine() -> Engine:
    return made_up_engine()


@pytest.fixture(scope="module")
def unseen(engine) -> tuple[MeasuredStep, ...]:
    return read_cost_rows(make_rows(engine, draw(engine, 25, seed=9), NOISE, seed=9)).steps


@pytest.fixture(scope="module")
def cost(engine) -> EngineCost:
    uniform = [Placement.uniform(mixer, 48) for mixer in engine.space.mixers]
    fitted = [*uniform, *draw(engine, 10, seed=1)]
    return fit_engine_cost(read_cost_rows(make_rows(engine, fitted, NOISE)))


def test_unseen_placements_are_predicted_within_the_bar_and_better_than_by_published_costs(cost, unseen):
    report = judge_costs(cost, unseen)
    assert report.held_out is not None and report.left_out is not None
    assert report.held_out.median < 0.03
    assert report.held_out.worst < 0.12
    assert report.left_out.median == pytest.approx(report.held_out.median, abs=0.01)
    assert report.warnings == []
    speed_ups = report.speed_ups.errors()
    for name in PUBLISHED_COSTS:
        assert speed_ups[name].median > 3 * speed_ups["this model"].median
    assert "held out: median" in str(report) and "published Reg" in str(report)
    written = report.to_json()
    assert written["held_out"]["rows"] == len(unseen)
    by_workload = written["speed_ups"]["by_workload"]
    counted = [workload["errors"]["this model"]["rows"] for workload in by_workload]
    assert len(counted) > 10 and sum(counted) == speed_ups["this model"].rows


def test_the_knee_is_found_where_products_take_longer_than_weights(cost):
    assert cost.knee is not None and 70 < cost.knee < 280  # the truth is 140 sequences


def test_intervals_cover_new_measurements(cost, unseen):
    inside = []
    for step in unseen:
        found = cost.predict(step.placement, Workload(step.context_length, concurrency=step.batch_size))
        inside.append(found.step_seconds.low <= step.seconds <= found.step_seconds.high)
    assert 0.8 < np.mean(inside) < 0.99


def test_fixed_batches_are_sums_over_layers_exactly(cost, engine):
    for context, batch in ((4096, 1), (20000, 17), (131072, 4)):
        workload = Workload(context, concurrency=batch)
        model = CostModel.of(cost, workload)
        assert model.additive_error(draw(engine, 10, seed=2)) < 1e-9
        placement = draw(engine, 1, seed=5)[0]
        truth = true_seconds(engine, placement, context, batch)
        assert model.seconds(placement) == pytest.approx(truth, rel=0.05)


def test_as_many_as_fit_is_nearly_a_sum_over_layers(cost, engine):
    for context in CONTEXTS[1:]:
        workload = Workload(context, memory_bytes=MEMORY)
        model = CostModel.of(cost, workload)
        costs = model.layer_costs(engine.space)
        assert (costs >= 0).all() and (costs.min(axis=1) == 0).all()
        for placement in draw(engine, 12, seed=context):
            batch = engine.largest_batch(placement, context, MEMORY)
            if batch >= 8:  # with few sequences, rounding down to whole ones is much
                token = true_seconds(engine, placement, context, batch) / batch
                assert model.seconds(placement) == pytest.approx(token, rel=0.15)


def test_speed_and_memory_of_a_workload(cost, engine):
    placement = Placement.parse("fa*3 swa*25 kda*4 gdn*16")
    found = cost.predict(placement, Workload(32768, memory_bytes=MEMORY))
    assert found.batch_size == engine.largest_batch(placement, 32768, MEMORY)
    assert found.cache_bytes == found.batch_size * engine.sequence_bytes(placement, 32768) <= MEMORY
    assert found.weight_bytes == engine.weight_bytes()
    rate = found.tokens_per_second
    assert rate.value == pytest.approx(found.batch_size / found.step_seconds.value)
    assert rate.low < rate.value < rate.high
    assert found.seconds_per_token.value == pytest.approx(1 / rate.value)
    assert found.first_token_seconds is None
    capped = cost.predict(placement, Workload(32768, concurrency=5, memory_bytes=MEMORY))
    assert capped.batch_size == 5


def test_prompts_are_fitted_where_they_were_measured(engine):
    rng = np.random.default_rng(0)

    def prefill(placement: Placement, tokens: int) -> float:
        read = sum(layer[m].pairs_read(tokens) for layer, m in zip(engine.layers, placement, strict=True))
        return (0.01 + 3e-5 * tokens + 2e-11 * read) * float(np.exp(0.01 * rng.normal()))

    rows = list(make_rows(engine, draw(engine, 12, seed=1), NOISE))
    for row in rows:
        row["prefill_seconds"] = prefill(Placement.parse(row["placement"]), row["context_length"])
    cost = fit_engine_cost(read_cost_rows(rows))
    for placement in draw(engine, 5, seed=7):
        found = cost.predict(placement, Workload(65536, 20000, 0, concurrency=1)).first_token_seconds
        assert found is not None
        assert found.value == pytest.approx(prefill(placement, 20000), rel=0.05)
        assert found.low <= found.value <= found.high


def test_what_measurements_do_not_say_is_refused(cost, engine):
    placement = engine.space.default
    with pytest.raises(CostError, match="neither a concurrency nor a memory"):
        cost.predict(placement, Workload(4096))
    one_batch = tuple(step for step in cost.rows.steps if step.batch_size == 1)
    narrow = EngineCost(replace(cost.rows, steps=one_batch))
    narrow.predict(placement, Workload(9999, concurrency=1))
    with pytest.raises(CostError, match="context 4096 with batch 2 cannot be predicted"):
        narrow.predict(placement, Workload(4096, concurrency=2))
    one_context = tuple(step for step in cost.rows.steps if step.context_length == 4096)
    narrow = EngineCost(replace(cost.rows, steps=one_context))
    narrow.predict(placement, Workload(4096, concurrency=7))
    with pytest.raises(CostError, match="do not settle the cost of every mixer"):
        CostModel.of(narrow, Workload(9999, concurrency=1))


def test_without_a_description_memory_is_not_predicted(engine):
    rows = [{**row, "engine": None} for row in make_rows(engine, draw(engine, 12, seed=1), NOISE)]
    cost = fit_engine_cost(read_cost_rows(rows, engine.space))
    assert cost.predict(engine.space.default, Workload(32768, concurrency=4)).cache_bytes is None
    with pytest.raises(CostError, match="do not say how the engine keeps caches"):
        cost.predict(engine.space.default, Workload(32768, memory_bytes=MEMORY))


def test_rows_of_two_engines_are_refused(engine):
    rows = list(make_rows(engine, draw(engine, 2, seed=1), NOISE))
    rows[3]["engine"] = replace(engine, in_flight=7).to_json()
    with pytest.raises(CostError, match="measurement 4 is of .* expected one engine"):
        read_cost_rows(rows)


def test_a_bad_fit_is_announced(engine):
    rows = list(make_rows(engine, draw(engine, 12, seed=1), 0.5))
    assert "exceed 5% (median) or 15% (worst)" in str(judge_costs(fit_engine_cost(read_cost_rows(rows))))


def test_saved_models_predict_the_same(cost, engine, tmp_path):
    save_costs(cost, tmp_path / "costs.json")
    loaded = load_engine_cost(tmp_path / "costs.json")
    assert loaded == cost
    workload = Workload(16384, memory_bytes=MEMORY)
    placement = draw(engine, 1, seed=4)[0]
    assert loaded.predict(placement, workload) == cost.predict(placement, workload)


def test_published_costs_are_one_number_for_each_mixer():
    reg = PUBLISHED_COSTS["published Reg"]
    assert published_speed_up(Placement.uniform("gdn", 48), reg) == pytest.approx(1 / 0.14)
    expected = 48 / (3 + 25 * 0.48 + 4 * 0.21 + 16 * 0.14)
    assert published_speed_up(Placement.parse("fa*3 swa*25 kda*4 gdn*16"), reg) == pytest.approx(expected)
