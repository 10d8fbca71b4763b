"""Plans of runs: the numbers of parameters of known models, and of what is really there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gearshift.placement import FULL_ATTENTION
from gearshift.supernet.checkpoint import read_config
from gearshift.train.flops import Flops, Sizes
from gearshift.train.plan import PlanError, TrainingPlan, plan_training
from gearshift.train.recipe_file import load_recipe
from tests.train.tools import random_batch

ROOT = Path(__file__).parents[2]
SHIPPED = ("smoke", "small", "demo", "qwen2.5-0.5b", "llama-3.1-8b", "apriel-15b")
TABLE = ROOT / "docs" / "training.md"


def planned(name: str) -> TrainingPlan:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    shape = None if recipe.shape is None else ROOT / recipe.shape
    return plan_training(recipe.model_copy(update={"shape": shape}))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    assert path.stem in SHIPPED
    assert load_recipe(path).steps > 0


@pytest.mark.parametrize(
    ("name", "teacher"),
    [("qwen2.5-0.5b", 494_032_768), ("llama-3.1-8b", 8_030_261_248), ("apriel-15b", 14_428_902_400)],
)
def test_teachers_have_the_published_number_of_parameters(name, teacher):
    plan = planned(name)
    assert plan.parameters - plan.trained == teacher
    assert plan.fits


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "demo"])
def test_the_documented_table_is_what_plans_say(name):
    """Each line of the table: recipe, stage, GPUs, trained parameters, tokens, GiB of a GPU, hours."""
    plan = planned(name)
    for stage in plan.stages:
        cells = [
            name,
            stage.name,
            str(plan.gpus),
            f"{plan.trained / 1e6:,.0f} M",
            f"{stage.tokens / 1e6:,.1f} M",
        ]
        line = (
            "| "
            + " | ".join([*cells, f"{stage.peak / 2**30:.1f} GiB", f"{stage.seconds / 3600:.2f} h"])
            + " |"
        )
        assert line in TABLE.read_text(encoding="utf-8"), line


def test_two_stages_of_the_paper_have_its_tokens():
    assert [round(stage.tokens / 1e9) for stage in planned("apriel-15b").stages] == [266, 137]


def test_sizes_are_those_of_the_loaded_model(tiny_model, supernet_directory, make_trainer):
    sizes = Sizes.of(read_config(supernet_directory))
    assert sizes.total == sum(p.numel() for p in tiny_model.parameters())
    trained = make_trainer().trained
    assert sizes.trained(attention=False) == sum(p.numel() for p in trained.values())


def test_products_are_counted_as_torch_counts_them(tiny_model, supernet_directory):
    """Torch counts every key of a causal attention, so those that are not seen are added."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    sizes, length = Sizes.of(read_config(supernet_directory)), 24
    batch = random_batch(rows=2, length=length)
    plain = sdpa_kernel(SDPBackend.MATH)  # a fused kernel for CPUs would not be counted
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        tiny_model(batch.input_ids, placement="fa*3")
    config = sizes.config.mixer_config(FULL_ATTENTION, 0)
    unseen = 3 * 4 * config.num_heads * config.head_dim * (length - 1) / 2
    # Norms of a few numbers are parameters, but no products.
    expected = (Flops(sizes, length).forward([FULL_ATTENTION] * 3) + unseen) * batch.tokens
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_the_bytes_of_weights_and_optimiser_are_those_of_a_run(make_recipe, make_trainer):
    trainer = make_trainer("align", precision="bf16")
    trainer.train_step(1, [random_batch()])
    memory = plan_training(make_recipe("align")).stages[0].memory
    trained = list(trainer.trained.values())
    assert memory["trained weights"] == sum(p.nbytes for p in trained)
    assert memory["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    moments = sum(
        s[key].nbytes for s in trainer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    assert memory["optimiser"] == moments
    frozen = sum(p.nbytes for p in trainer.model.parameters() if not p.requires_grad)
    assert memory["frozen weights"] == pytest.approx(frozen, rel=0.02)  # norms stay in float32


def test_more_gpus_need_less_each_and_take_less_time(make_recipe):
    one, eight = (plan_training(make_recipe(cluster={"gpus": gpus})).stages[0] for gpus in (1, 8))
    assert eight.memory["optimiser"] == one.memory["optimiser"] // 8
    assert eight.seconds == pytest.approx(one.seconds / 8)


def test_recomputing_layers_needs_less_memory(make_recipe):
    plain, again = (
        plan_training(make_recipe(scale={"activation_checkpointing": on})).stages[0] for on in (False, True)
    )
    assert again.memory["activations"] < plain.memory["activations"]


def test_what_does_not_fit_is_said(make_recipe):
    assert plan_training(make_recipe()).fits
    assert not plan_training(make_recipe(cluster={"memory_gib": 1e-4})).fits


def test_without_a_supernet_or_a_shape_there_is_no_plan(make_recipe):
    with pytest.raises(
        PlanError, match="no supernet at nowhere to plan with; convert a teacher first, or give"
    ):
        plan_training(make_recipe(supernet="nowhere"))
