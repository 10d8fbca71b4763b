from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gearshift.train.recipe import DistillRecipe, RecipeError, describe_changes, load_recipe, write_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
GOOD = """\
supernet: in       # line 1
out: run
data:
  - a.jsonl
  - b.txt
steps: 100
weights:
  forward_kl: 0.5
learning_rate: 2.0e-3
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_reads_values_and_fills_in_defaults(write):
    recipe = load_recipe(write(GOOD))
    assert recipe.data == [Path("a.jsonl"), Path("b.txt")]
    assert (recipe.steps, recipe.learning_rate, recipe.weights.forward_kl) == (100, 2e-3, 0.5)
    assert (recipe.weights.activation, recipe.sampling, recipe.device) == (1.0, "uniform", "auto")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path).steps > 0


def test_there_are_shipped_recipes():
    assert {"smoke.yaml", "demo.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize(
    ("wrong", "line", "told"),
    [
        ("learning_rat: 1", "line 10", "did you mean 'learning_rate'?"),
        ("colour: red", "line 10", "expected one of supernet, out, data, steps"),
        ("batch_size: many", "line 10", "batch_size: given 'many'; input should be a valid integer"),
        ("batch_size: 0", "line 10", "batch_size: given 0; input should be greater than 0"),
        ("warmup_steps: -1", "line 10", "greater than or equal to 0"),
        ("gradient_clip: .nan", "line 10", "finite"),
        ("sampling: lottery", "line 10", "input should be 'uniform' or 'composition'"),
        ("steps: 5", "line 10", "steps was already given on line 6"),
        ("save_every: [1]", "line 10", "save_every: given [1]"),
        ("device: {cpu: 1}", "line 10", "'auto', 'cpu' or 'cuda'"),
        ("warmup_steps: 100", "recipe.yaml", "warmup_steps is 100 of 100 steps; expected fewer"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_line(write, wrong, line, told):
    message = refusal(write(GOOD + wrong + "\n"))
    assert "recipe.yaml" in message
    assert line in message
    assert told in message


def test_wrong_nested_keys_and_items_have_their_own_line(write):
    text = GOOD.replace("forward_kl: 0.5", "forward_kl: 0.5\n  reverse: 1").replace("- b.txt", "- 7")
    message = refusal(write(text))
    assert "line 5: data.1: given 7" in message
    assert "line 9: unknown key 'weights.reverse'; expected one of forward_kl, activation" in message


def test_every_mistake_is_named_at_once(write):
    message = refusal(write("supernet: in\nsteps: x\nfoo: 1\n"))
    assert len(message.splitlines()) == 4
    assert "the key 'out' is missing: the run directory to write" in message
    assert "the key 'data' is missing" in message


def test_weights_of_zero_leave_nothing_to_minimise(write):
    message = refusal(write(GOOD.replace("forward_kl: 0.5", "forward_kl: 0\n  activation: 0")))
    assert "line 7: forward_kl and activation are both 0" in message


@pytest.mark.parametrize(
    "text", ["", "just text", "- a\n- list", "a: [", "a: !!python/object:os.x {}", "\x00"]
)
def test_what_is_no_recipe_is_refused(write, text):
    assert "recipe.yaml" in refusal(write(text))


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.yaml is missing" in refusal(tmp_path / "nowhere.yaml")


@given(st.text(max_size=80))
def test_any_text_is_a_recipe_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_overrides_win(write):
    changed = (
        "learning_rate=1e-3",
        "weights.forward_kl=1",
        "data=[c.txt]",
        "device=cpu",
        "weights.activation=0",
    )
    recipe = load_recipe(write(GOOD), changed)
    assert (recipe.learning_rate, recipe.weights.forward_kl, recipe.weights.activation) == (1e-3, 1, 0)
    assert (recipe.data, recipe.device) == ([Path("c.txt")], "cpu")


def test_an_override_can_add_a_section(write):
    text = GOOD.replace("weights:\n  forward_kl: 0.5\n", "")
    assert load_recipe(write(text), ["weights.activation=3"]).weights.activation == 3


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("steps=few", "the override 'steps=few': steps: given 'few'"),
        ("stepz=1", "did you mean 'steps'?"),
        ("steps.more=1", "'steps' has no keys below it"),
        ("weights.kl=1", "unknown key 'weights.kl'"),
        ("data=[", "is not a YAML value"),
    ],
)
def test_a_wrong_override_is_named(write, override, told):
    assert told in refusal(write(GOOD), override)


def test_a_written_recipe_reads_back_the_same(write, tmp_path):
    recipe = load_recipe(write(GOOD))
    write_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert set(yaml.safe_load((tmp_path / "again.yaml").read_text())) == set(DistillRecipe.model_fields)


def test_changes_that_matter_for_the_result_are_described(write):
    recipe = load_recipe(write(GOOD))
    harmless = load_recipe(write(GOOD), ["out=x", "save_every=7", "device=cpu", "supernet=moved"])
    harmful = load_recipe(write(GOOD), ["seed=1", "weights.forward_kl=2"])
    assert describe_changes(recipe, harmless) == []
    assert [line.split(":")[0] for line in describe_changes(recipe, harmful)] == ["weights", "seed"]


def test_a_wrong_recipe_is_refused_without_importing_torch(write):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gearshift.train.recipe import RecipeError, load_recipe\n"
        "try:\n    load_recipe(Path(sys.argv[1]))\n"
        "except RecipeError:\n    sys.exit(3 if 'torch' not in sys.modules else 4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write("steps: x"))], env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 3


def test_no_more_align_steps_than_steps(write):
    assert "align_steps is 101 of 100 steps" in refusal(write(GOOD + "align_steps: 101\n"))
    assert load_recipe(write(GOOD + "align_steps: 100\n")).align_steps == 100
