from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gearshift.train.recipe import LossWeights, PlacedStage, Recipe, SamplingPhase
from gearshift.train.recipe_file import RecipeError, describe_changes, load_recipe, write_recipe

GOOD = """\
supernet: in       # line 1
out: run
data:
  - a.jsonl
  - {dataset: books, split: all, weight: 2}
stages:
  - stage: align
    steps: 10
  - stage: distill
    steps: 100
    losses:
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


def placed(recipe: Recipe, index: int) -> PlacedStage:
    stage = recipe.stages[index]
    assert isinstance(stage, PlacedStage)
    return stage


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_reads_values_and_fills_in_defaults(write):
    recipe = load_recipe(write(GOOD))
    assert recipe.data is not None
    assert [source.name for source in recipe.data] == ["a.jsonl", "books"]
    align, distill = recipe.stages[0], placed(recipe, 1)
    assert (align.stage, align.steps, recipe.steps) == ("align", 10, 110)
    assert distill.losses.model_dump(include={"forward_kl", "activation"}) == {
        "forward_kl": 0.5,
        "activation": 1,
    }
    assert distill.sampling == [SamplingPhase(uniform=1.0)]
    assert recipe.device == "auto"


def test_steps_of_the_run_are_steps_of_stages(write):
    recipe = load_recipe(write(GOOD))
    assert [recipe.stage_of(step) for step in (1, 10, 11, 110)] == [(0, 1), (0, 10), (1, 1), (1, 100)]


@pytest.mark.parametrize(
    ("wrong", "line", "told"),
    [
        ("seeed: 1", "line 14", "unknown key 'seeed'; did you mean 'seed'?"),
        ("zzz: red", "line 14", "expected one of supernet, out, stages, data"),
        ("seed: many", "line 14", "seed: given 'many'; input should be a valid integer"),
        ("save_every: 0", "line 14", "save_every: given 0; input should be greater than 0"),
        ("device: {cpu: 1}", "line 14", "'auto', 'cpu' or 'cuda'"),
        ("out: other", "line 14", "out was already given on line 2"),
        (
            "    learning_rat: 1",
            "line 14",
            "unknown key 'stages.1.learning_rat'; did you mean 'learning_rate'?",
        ),
        ("    batch_size: [1]", "line 14", "stages.1.batch_size: given [1]"),
        ("    gradient_clip: .nan", "line 14", "finite"),
        ("    sampling: lottery", "line 14", "stages.1.sampling.0: given 'lottery'"),
        (
            "    sampling: {lottery: 1}",
            "line 14",
            "unknown key 'stages.1.sampling.0.lottery'; expected one of",
        ),
        ("    sampling: {}", "line 14", "nothing is drawn; expected a weight"),
        ("    warmup_steps: 100", "line 9", "warmup_steps is 100 of 100 steps; expected fewer"),
        ("    teacher_logits: x", "line 9", "expected losses.activation: 0"),
        (
            "  - stage: destill\n    steps: 3",
            "line 14",
            "the stage is 'destill'; expected one of 'align', 'dist",
        ),
        ("  - steps: 3", "line 14", "expected 'stage': "),
        (
            "  - stage: align\n    steps: 3\n    sampling: uniform",
            "line 16",
            "unknown key 'stages.2.sampling'",
        ),
        ("  - stage: sft", "line 14", "the key 'stages.2.steps' is missing: number of steps"),
        ("  - {stage: align, steps: 3, data: [{path: x, dataset: y}]}", "line 14", "exactly one of path and"),
        ("scale: {compil: true}", "line 14", "did you mean 'compile'?"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_line(write, wrong, line, told):
    message = refusal(write(GOOD + wrong + "\n"))
    assert "recipe.yaml" in message
    assert line in message
    assert told in message


def test_wrong_nested_keys_and_items_have_their_own_line(write):
    text = GOOD.replace("forward_kl: 0.5", "forward_kl: 0.5\n      reverse: 1").replace("- a.jsonl", "- 7")
    message = refusal(write(text))
    assert "line 4: data.0: given 7" in message
    assert "line 13: unknown key 'stages.1.losses.reverse'; did you mean 'reverse_kl'?" in message


def test_every_mistake_is_named_at_once(write):
    message = refusal(write("supernet: in\nseed: x\nfoo: 1\n"))
    assert len(message.splitlines()) == 4
    assert "the key 'out' is missing: the run directory to write" in message
    assert "the key 'stages' is missing" in message


def test_stages_without_data_are_named(write):
    text = GOOD.replace("data:\n  - a.jsonl\n  - {dataset: books, split: all, weight: 2}\n", "")
    assert "the key 'data' is missing, and stages [0, 1] have none" in refusal(write(text))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"forward_kl": 0, "activation": 0}, "every weight is 0"),
        ({"mixers": {"mamba": 1.0}}, "unknown mixer 'mamba'; expected one of full_attention"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_losses_that_make_no_sense_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        LossWeights.model_validate(given)


def test_mixers_of_losses_go_by_both_names():
    weights = LossWeights(mixers={"gdn": 2.0, "kimi_delta_attention": 3.0})
    found = [
        weights.mixer_weight(n) for n in ("gated_delta_net", "kimi_delta_attention", "sliding_attention")
    ]
    assert found == [2.0, 3.0, 1.0]


def test_fine_tuning_counts_answers_alone_unless_told_otherwise(write):
    def losses(text: str) -> LossWeights:
        return placed(load_recipe(write(GOOD + f"  - stage: sft\n    steps: 1\n{text}")), 2).losses

    assert losses("").model_dump(include={"forward_kl", "activation", "cross_entropy"}) == {
        "forward_kl": 0,
        "activation": 0,
        "cross_entropy": 1,
    }
    only = losses("    losses: {reverse_kl: 1}")
    assert (only.forward_kl, only.reverse_kl, only.activation, only.cross_entropy) == (0, 1, 0, 0)


@pytest.mark.parametrize("ends", [[None, None], [5, 5, None], [5, 3, None], [5], [5, 9]])
def test_phases_that_do_not_follow_are_refused(write, ends):
    phases = ", ".join("{uniform: 1}" if end is None else f"{{uniform: 1, until: {end}}}" for end in ends)
    assert "expected rising steps and no 'until' in the last phase" in refusal(
        write(GOOD + f"    sampling: [{phases}]\n")
    )


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


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["align", "sft", "x", "uniform"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["stage", "steps", "data", "sampling", "losses", "path"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)), VALUES, min_size=1))
def test_any_values_are_a_recipe_or_refused_with_their_place(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        assert isinstance(load_recipe(path), Recipe)
    except RecipeError as error:
        assert all(str(path) in line for line in str(error).splitlines() if "values.yaml" in line)
        assert "values.yaml" in str(error)


def test_overrides_win(write):
    changed = ("seed=3", "stages.1.losses.forward_kl=1", "data=[c.txt]", "device=cpu", "stages.0.steps=7")
    recipe = load_recipe(write(GOOD), changed)
    assert recipe.data is not None
    assert (recipe.seed, placed(recipe, 1).losses.forward_kl, recipe.stages[0].steps) == (3, 1, 7)
    assert (recipe.data[0].path, recipe.device) == (Path("c.txt"), "cpu")


def test_an_override_can_add_a_section(write):
    assert load_recipe(write(GOOD), ["scale.compile=true"]).scale.compile


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed=few", "the override 'seed=few': seed: given 'few'"),
        ("seet=1", "did you mean 'seed'?"),
        ("out.more=1", "'out' has no keys below it"),
        ("stages.1.losses.kl=1", "unknown key 'stages.1.losses.kl'"),
        ("stages.2.steps=1", "'2' is no item of a list of 2; expected a number from 0 to 1"),
        ("stages.first.steps=1", "'first' is no item"),
        ("data=[", "is not a YAML value"),
    ],
)
def test_a_wrong_override_is_named(write, override, told):
    assert told in refusal(write(GOOD), override)


def test_a_written_recipe_reads_back_the_same(write, tmp_path):
    recipe = load_recipe(write(GOOD))
    write_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert set(yaml.safe_load((tmp_path / "again.yaml").read_text())) == set(Recipe.model_fields)


def test_changes_that_matter_for_the_result_are_described(write):
    recipe = load_recipe(write(GOOD))
    harmless = ["out=x", "save_every=7", "device=cpu", "supernet=moved", "data.0=moved.jsonl"]
    assert describe_changes(recipe, load_recipe(write(GOOD), harmless)) == []
    harmful = load_recipe(write(GOOD), ["seed=1", "stages.1.losses.forward_kl=2", "data.1.weight=3"])
    assert describe_changes(recipe, harmful) == [
        "stages.1.losses.forward_kl: was 0.5, now 2.0",
        "data.1.weight: was 2.0, now 3.0",
        "seed: was 0, now 1",
    ]


def test_a_wrong_recipe_is_refused_in_two_seconds_without_importing_torch(write):
    code = (
        "import sys\n"
        "from gearshift.cli import app\n"
        "try:\n    app(['train', sys.argv[1]])\n"
        "except SystemExit as end:\n    sys.exit(3 if end.code == 1 and 'torch' not in sys.modules else 4)\n"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(GOOD + "steps: x"))],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "line 14: unknown key 'steps'" in done.stderr
    # Processor time, not time on the wall: a busy machine must not fail the test.
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 2
