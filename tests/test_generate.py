"""Side-by-side generation: who runs, what comes out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from gearshift.generate import GenerateError, choose_placements, generate_side_by_side
from gearshift.placement import Placement, PlacementError, PlacementSpace
from gearshift.presets import Preset, PresetError
from gearshift.supernet import SupernetForCausalLM, load_supernet

SPACE = PlacementSpace(3)
PRESETS = {
    name: Preset(name, Placement.parse(text)) for name, text in {"fast": "gdn*3", "good": "fa*2 kda"}.items()
}
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def model(supernet_directory: Path) -> SupernetForCausalLM:
    return load_supernet(supernet_directory)


@pytest.fixture(scope="module")
def tokenizer(supernet_directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(supernet_directory)


def test_named_presets_come_in_the_order_asked_for():
    chosen = choose_placements(SPACE, PRESETS, names=["good", "fast"], texts=["swa fa*2"])
    assert list(chosen) == ["good", "fast", "swa fa*2"]
    assert chosen["good"] == PRESETS["good"].placement


def test_without_any_name_all_presets_run_and_without_presets_the_teacher():
    assert list(choose_placements(SPACE, PRESETS)) == ["fast", "good"]
    assert choose_placements(SPACE, {}) == {"teacher": Placement.parse("fa*3")}


def test_a_model_without_its_teacher_runs_its_default():
    space = PlacementSpace(2, ("fa", "kda"), (("fa",), ("kda",)))
    assert choose_placements(space, {}) == {"default": Placement.parse("fa kda")}


def test_a_preset_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(PresetError, match="no preset 'quick'; this supernet's presets: fast, good"):
        choose_placements(SPACE, PRESETS, names=["quick"])
    with pytest.raises(PresetError, match="presets: none yet"):
        choose_placements(SPACE, {}, names=["quick"])


def test_a_placement_of_another_length_or_mixer_is_refused():
    with pytest.raises(PlacementError, match="has 4 layers; expected 3"):
        choose_placements(SPACE, PRESETS, texts=["fa*4"])
    with pytest.raises(PlacementError, match="this model holds only fa"):
        choose_placements(PlacementSpace(3, ("full_attention",)), {}, texts=["gdn*3"])


def test_all_full_attention_writes_what_the_teacher_writes(
    model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase, teacher_directory: Path
):
    teacher = LlamaForCausalLM.from_pretrained(teacher_directory)
    prompt_1T = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = teacher.generate(prompt_1T, max_new_tokens=12, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    expected = written[0, prompt_1T.shape[1] :]
    [result] = generate_side_by_side(
        model, tokenizer, PROMPT, {"teacher": Placement.parse("fa*3")}, max_new_tokens=12
    )
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert result.tokens == len(expected)


def test_each_placement_writes_what_it_writes_alone(
    model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    placements = {text: Placement.parse(text) for text in ("fa*3", "gdn*3", "swa kda fa")}
    together = generate_side_by_side(model, tokenizer, PROMPT, placements, max_new_tokens=8)
    for result in together:
        [alone] = generate_side_by_side(
            model, tokenizer, PROMPT, {result.name: result.placement}, max_new_tokens=8
        )
        assert (alone.name, alone.text, alone.tokens) == (result.name, result.text, result.tokens)
    assert len({result.text for result in together}) > 1
    assert all(result.tokens_per_second == result.tokens / result.seconds > 0 for result in together)


def test_the_models_own_placement_stays(model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase):
    model.set_placement("kda*3")
    generate_side_by_side(model, tokenizer, PROMPT, {"fast": Placement.parse("gdn*3")}, max_new_tokens=1)
    assert model.placement == Placement.parse("kda*3")


def test_end_of_text_ends_a_generation(model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase):
    with torch.no_grad():
        kept = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()  # all logits equal: the first token, <eos>, is taken
    [result] = generate_side_by_side(
        model, tokenizer, PROMPT, {"x": Placement.parse("fa*3")}, max_new_tokens=8
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(kept)
    assert (result.tokens, result.text) == (1, "")


@pytest.mark.parametrize(
    ("prompt", "new", "said"),
    [
        ("", 4, "the prompt is empty"),
        ("x" * 120, 9, "a prompt of 120 tokens and 9 new ones; .* at most 128 together"),
        ("x", 0, "expected at least 1 new token"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(
    prompt: str, new: int, said: str, model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    with pytest.raises(GenerateError, match=said):
        generate_side_by_side(model, tokenizer, prompt, {"x": Placement.parse("fa*3")}, max_new_tokens=new)
