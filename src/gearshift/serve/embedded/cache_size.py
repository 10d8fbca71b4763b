"""How much memory a sequence's cache takes, asked of the mixers themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.placement import Placement
from gearshift.supernet import MixerState, SupernetForCausalLM
from gearshift.supernet.cache import KeyValueState


@torch.inference_mode()
def cache_bytes(model: SupernetForCausalLM, placement: Placement, context: int) -> int:
    """Bytes that a sequence of ``context`` tokens holds, spare room in buffers left out.

    One token is run, which gives every state its shape.
    """
    cache = model.new_cache(placement)
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(token_11, past_key_values=cache, placement=placement)
    return sum(state_bytes(state, context) for state in cache.states)


def state_bytes(state: MixerState, context: int) -> int:
    """Bytes that one layer holds of a sequence of ``context`` tokens, once some token gave it its shape."""
    if isinstance(state, KeyValueState):
        # Of a buffer only the part that a token fills counts, as often as tokens are kept.
        tokens = context if state.window is None else min(state.window, context)
        return tokens * sum(tensor[:, :, :1].nbytes for tensor in _tensors(state))
    return sum(tensor.nbytes for tensor in _tensors(state))


def _tensors(state: MixerState) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    state.map_tensors(note)
    return found
