"""The cost model: recovers known seconds, reports its errors, refuses what settles nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from gearshift.files import write_json
from gearshift.placement import Placement, PlacementSpace
from gearshift.search.cost import CostError, CostModel, MeasuredStep, fit_costs, load_costs, save_costs


def _fit(made_up, rows) -> CostModel:
    (model,) = fit_costs(rows, made_up.space).values()
    return model


def test_recovers_the_true_seconds(made_up):
    rows = made_up.bench([*made_up.uniform, *made_up.draw(8)[1:]])
    model = _fit(made_up, rows)
    assert (model.context_length, model.batch_size, model.hardware) == (256, 1, "a processor, 2 cores")
    # The cheapest mixer, GDN, counts 0 and its 12 layers of 0.1 ms are part of the base.
    assert model.base_seconds == pytest.approx(1e-3 + 12 * 1e-4)
    assert model.mixer_seconds == pytest.approx(
        {
            "full_attention": 4e-4 * 1.25 - 1e-4,
            "sliding_attention": 1e-4,
            "gated_delta_net": 0.0,
            "kimi_delta_attention": 0.5e-4,
        },
        abs=1e-12,
    )
    assert np.abs(model.relative_errors(model.measured)).max() < 1e-9


def test_predicts_placements_it_has_not_seen(made_up):
    model = _fit(made_up, made_up.bench([*made_up.uniform, *made_up.draw(12)[1:]], noise=0.02))
    unseen = made_up.bench(made_up.draw(60, seed=3)[1:])
    steps = [
        MeasuredStep(Placement.parse(row["placement"]), row["seconds_per_step"], 256, 1) for row in unseen
    ]
    assert np.abs(model.relative_errors(steps)).max() < 0.08
    assert model.speed_up(made_up.uniform[0]) == 1.0
    assert model.speed_up(made_up.uniform[2]) == pytest.approx(
        (1e-3 + 12 * 5e-4) / (1e-3 + 12 * 1e-4), rel=0.05
    )


def test_fit_has_the_least_relative_errors(made_up):
    """Against ordinary least squares of the relative errors, which has no bounds and here needs none."""
    rows = made_up.bench(made_up.draw(20), noise=0.1)
    seconds = np.array([row["seconds_per_step"] for row in rows])
    counts = np.array(
        [
            [Placement.parse(row["placement"]).mixers.count(mixer) for mixer in made_up.space.mixers]
            for row in rows
        ]
    )
    expected = counts @ np.linalg.lstsq(counts / seconds[:, None], np.ones(20), rcond=None)[0] / seconds - 1
    model = _fit(made_up, rows)
    assert model.relative_errors(model.measured) == pytest.approx(expected, abs=1e-9)


def test_layer_costs_and_base_add_up_to_the_seconds(made_up):
    model = _fit(made_up, made_up.bench(made_up.uniform))
    space = PlacementSpace(12, ("kda", "fa"))
    costs = model.layer_costs(space)
    assert costs.shape == (12, 2)
    placement = Placement.parse("kda*5 fa*7")
    by_layer = sum(costs[layer, space.mixers.index(mixer)] for layer, mixer in enumerate(placement))
    assert model.seconds(placement) == pytest.approx(model.base_seconds + by_layer)


def test_one_model_for_each_context_and_batch(made_up):
    rows = made_up.bench(made_up.uniform, 256) + made_up.bench(made_up.uniform, 2048)
    rows += [{**row, "batch_size": 8} for row in made_up.bench(made_up.uniform, 256)]
    models = fit_costs(rows, made_up.space)
    assert list(models) == [(256, 1), (256, 8), (2048, 1)]
    fastest = made_up.uniform[2]
    assert models[2048, 1].speed_up(fastest) > models[256, 1].speed_up(fastest)


def test_no_cost_is_negative(made_up):
    """A placement measured slower although it has fewer slow layers must not make a mixer gain time."""
    rows = made_up.bench(made_up.uniform)
    rows[2]["seconds_per_step"] = 1e-9
    model = _fit(made_up, rows)
    assert model.base_seconds >= 0
    assert min(model.mixer_seconds.values()) == 0


def test_errors_are_in_the_text(made_up):
    rows = made_up.bench(made_up.draw(20), noise=0.1)
    model = _fit(made_up, rows)
    errors = np.abs([model.seconds(step.placement) / step.seconds - 1 for step in model.measured])
    assert f"median {np.median(errors):.1%}, worst {errors.max():.1%}" in str(model)
    assert "cost at context 256, batch 1" in str(model)
    assert "gdn 0" in str(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seconds_per_step": math.nan}, "measurement 2 (swa*12): seconds_per_step = nan"),
        ({"seconds_per_step": 0}, "seconds_per_step = 0; expected a finite number above 0"),
        ({"seconds_per_step": None}, "seconds_per_step = None"),
        ({"placement": "fa*3"}, "measurement 2 (fa*3): the placement 'fa*3' has 3 layers; expected 12"),
        ({"context_length": 0}, "context_length and batch_size are (0, 1)"),
        ({"hardware": "another"}, "measurement 2 is of 'another', those before of 'a processor, 2 cores'"),
    ],
)
def test_wrong_rows_are_named(made_up, change, says):
    rows = made_up.bench(made_up.uniform)
    rows[1].update(change)
    with pytest.raises(CostError) as caught:
        fit_costs(rows, made_up.space)
    assert says in str(caught.value)


def test_missing_keys_and_rows_are_refused(made_up):
    with pytest.raises(CostError, match="there are no measurements"):
        fit_costs([], made_up.space)
    rows = made_up.bench(made_up.uniform)
    del rows[3]["seconds_per_step"]
    with pytest.raises(CostError, match="measurement 4 has no 'seconds_per_step'"):
        fit_costs(rows, made_up.space)


def test_measurements_that_settle_too_little_are_refused(made_up):
    texts = ["fa*12", "fa*6 swa*6", "swa*12", "gdn*6 kda*6", "kda*6 gdn*6"]
    rows = made_up.bench([Placement.parse(text) for text in texts])
    with pytest.raises(CostError, match=r"do not settle .*such as fa\*12, swa\*12, gdn\*12, kda\*12"):
        fit_costs(rows, made_up.space)


def test_mixers_that_never_compete_need_not_be_told_apart(made_up):
    """Layers 0 to 5 choose between FA and SWA, the others between GDN and KDA: two differences and a sum."""
    space = PlacementSpace(12, layer_mixers=(*[("fa", "swa")] * 6, *[("gdn", "kda")] * 6))
    texts = ["fa*6 gdn*6", "swa*6 gdn*6", "fa*6 kda*6"]
    (model,) = fit_costs(made_up.bench([Placement.parse(text) for text in texts]), space).values()
    unseen = made_up.bench([Placement.parse("fa*2 swa*4 gdn*3 kda*3"), Placement.parse("swa*6 kda*6")])
    steps = [
        MeasuredStep(Placement.parse(row["placement"]), row["seconds_per_step"], 256, 1) for row in unseen
    ]
    assert np.abs(model.relative_errors(steps)).max() < 1e-9
    with pytest.raises(CostError, match=r"such as fa\*6 gdn\*6, swa\*6 gdn\*6, fa\*6 kda\*6"):
        fit_costs(made_up.bench([Placement.parse(text) for text in texts[:2]]), space)


def test_a_mixer_that_was_not_measured_has_no_cost(made_up):
    space = PlacementSpace(12, ("fa", "swa"))
    (model,) = fit_costs(made_up.bench(made_up.uniform[:2]), space).values()
    with pytest.raises(CostError, match="no cost of gated_delta_net at context 256, batch 1"):
        model.seconds(Placement.parse("fa*11 gdn"))


def test_saved_and_loaded_models_are_equal(made_up, tmp_path):
    rows = made_up.bench(made_up.uniform, 256) + made_up.bench(made_up.uniform, 512)
    models = fit_costs(rows, made_up.space)
    save_costs(models.values(), tmp_path / "cost.json")
    assert load_costs(tmp_path / "cost.json") == models


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("steps"),
        lambda content: content.pop("hardware"),
        lambda content: content.update(mixers=["mamba"]),
        lambda content: content.update(engine=[1.0]),
        lambda content: content["steps"][0].update(placement="mamba"),
        lambda content: content["steps"][0].update(placement="fa*3"),
        lambda content: content["steps"][0].update(seconds=0),
        lambda content: content["steps"][0].update(context_length=0),
        lambda content: content.update(steps=[]),
        lambda content: content.update(steps=[3]),
    ],
)
def test_damaged_files_are_refused(made_up, tmp_path, damage):
    path = tmp_path / "cost.json"
    save_costs(fit_costs(made_up.bench(made_up.uniform), made_up.space).values(), path)
    content = json.loads(path.read_text(encoding="utf-8"))
    damage(content)
    write_json(path, content)
    with pytest.raises(CostError, match="cost.json is damaged"):
        load_costs(path)


def test_other_json_is_refused(tmp_path):
    write_json(tmp_path / "x.json", [])
    with pytest.raises(CostError, match="x.json holds no cost model"):
        load_costs(tmp_path / "x.json")
