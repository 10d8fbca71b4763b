"""The same prompt through several placements of one supernet, each timed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, Placement, PlacementSpace
from gearshift.presets import Preset, named_preset

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from gearshift.supernet import SupernetForCausalLM


class GenerateError(GearshiftError, ValueError):
    """A prompt that cannot be continued."""


@dataclass(frozen=True)
class Generation:
    """One placement's continuation of a prompt.

    Attributes:
        name: the preset's name, or the placement's text.
        placement: what generated it.
        text: the new text, without the prompt.
        tokens: new tokens.
        seconds: time to generate them, the prompt's own forward pass included.
    """

    name: str
    placement: Placement
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second."""
        return self.tokens / self.seconds


def choose_placements(
    space: PlacementSpace, presets: Mapping[str, Preset], names: Iterable[str] = (), texts: Iterable[str] = ()
) -> dict[str, Placement]:
    """The placements to run, by the name to show: those asked for, else every preset, else the default.

    Args:
        space: the placements of the model.
        presets: what the supernet directory offers.
        names: presets asked for.
        texts: placements asked for, in text form.

    Raises:
        PresetError: there is no preset of that name.
        PlacementError: a placement does not fit the model.
    """
    chosen = {name: named_preset(presets, name).placement for name in names}
    for text in texts:
        placement = space.check(Placement.parse(text, space.num_layers))
        chosen[str(placement)] = placement
    if not chosen:
        chosen = {name: preset.placement for name, preset in presets.items()}
    default = space.default
    return chosen or {"teacher" if set(default) == {FULL_ATTENTION} else "default": default}


def generate_side_by_side(
    model: SupernetForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    placements: Mapping[str, Placement],
    *,
    max_new_tokens: int = 64,
) -> list[Generation]:
    """Continue ``prompt`` greedily with each placement in turn; the model's own placement stays as it was.

    Raises:
        GenerateError: the prompt is empty, or does not fit the model's context with the new tokens.
    """
    prompt_1T = _encode(model, tokenizer, prompt, max_new_tokens)
    before = model.placement
    try:
        return [
            _generate(model, tokenizer, prompt_1T, name, placement, max_new_tokens)
            for name, placement in placements.items()
        ]
    finally:
        model.set_placement(before)


def _encode(
    model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> torch.Tensor:
    prompt_1T = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens, longest = prompt_1T.shape[1], model.config.max_position_embeddings
    if tokens == 0:
        raise GenerateError("the prompt is empty; expected some text to go on from")
    if max_new_tokens < 1 or tokens + max_new_tokens > longest:
        raise GenerateError(
            f"a prompt of {tokens} tokens and {max_new_tokens} new ones; expected at least 1 new token, "
            f"and at most {longest} together, the model's context"
        )
    return prompt_1T.to(model.device)


def _generate(
    model: SupernetForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt_1T: torch.Tensor,
    name: str,
    placement: Placement,
    max_new_tokens: int,
) -> Generation:
    model.set_placement(placement)
    # The first call of a placement also sets up its kernels, which says nothing of its speed.
    _continue(model, prompt_1T, 1)
    start = time.perf_counter()
    new_T = _continue(model, prompt_1T, max_new_tokens)
    seconds = time.perf_counter() - start
    text = tokenizer.decode(new_T, skip_special_tokens=True)
    assert isinstance(text, str)
    return Generation(name, placement, text, len(new_T), seconds)


def _continue(model: SupernetForCausalLM, prompt_1T: torch.Tensor, max_new_tokens: int) -> list[int]:
    """Greedy new tokens; ends early at the end-of-text token."""
    # Transformers types `generate` for a protocol that none of its own models fits.
    output_1T = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        prompt_1T,
        attention_mask=prompt_1T.new_ones(prompt_1T.shape),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return output_1T[0, prompt_1T.shape[1] :].tolist()
