"""Passes of many placements over one batch, with the layers that they begin alike computed once.

Placements in sorted order walk a tree whose branches are layers: each one starts where it leaves the one
before it, from hidden states that were kept there. Only states from which a later placement still starts are
kept. What comes out is what each placement gets alone, bit for bit: the same operations on the same numbers.

Shape letters: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from gearshift.placement import Placement, PlacementSpace
from gearshift.supernet import SupernetForCausalLM

# Hidden states kept for placements to come take at most so many bytes, and one state at least.
KEPT_BYTES = 1 << 30


def in_tree_order(placements: Sequence[Placement], space: PlacementSpace) -> list[Placement]:
    """Placements sorted so that those which begin alike are neighbours; full attention comes first."""
    index = {mixer: number for number, mixer in enumerate(space.mixers)}
    return sorted(placements, key=lambda placement: [index[mixer] for mixer in placement])


def shared_prefixes(placements: Sequence[Placement]) -> list[int]:
    """How many layers each placement begins with as the one before it does; 0 for the first."""
    pairs = zip([(), *(placement.mixers for placement in placements)], placements, strict=False)
    return [_common(before, placement.mixers) for before, placement in pairs]


def layers_saved(placements: Sequence[Placement]) -> float:
    """Share of all layers that are not computed again."""
    return sum(shared_prefixes(placements)) / sum(map(len, placements)) if placements else 0.0


def hidden_states(
    model: SupernetForCausalLM, ids_BT: Tensor, placements: Sequence[Placement], kept_bytes: int = KEPT_BYTES
) -> Iterator[tuple[Placement, Tensor]]:
    """Each placement with its normed hidden states (B, T, D), in the order given.

    Args:
        model: which runs them.
        ids_BT: tokens.
        placements: best in tree order; each costs the layers that it does not share with the one before it.
        kept_bytes: for hidden states that are kept; with less memory more layers are computed again.
    """
    embeddings, context = model.begin(ids_BT)
    shared = shared_prefixes(placements)
    most = max(1, kept_bytes // embeddings.nbytes)
    kept: dict[int, Tensor] = {0: embeddings}
    for number, placement in enumerate(placements):
        wanted = _depths_to_keep(shared[number + 1 :], len(placement), most)
        start = max(depth for depth in kept if depth <= shared[number])
        hidden = kept[start]
        kept = {depth: state for depth, state in kept.items() if depth == 0 or depth in wanted}
        for depth in range(start, len(placement)):
            hidden = model.run_layer(depth, hidden, placement[depth], context)
            if depth + 1 in wanted:
                kept[depth + 1] = hidden
        yield placement, model.model.norm(hidden)


def _depths_to_keep(shared: Sequence[int], layers: int, most: int) -> set[int]:
    """Depths of the present placement from which later ones start: the deepest of them if they are too many.

    A later placement starts as deep as all between it and the present one begin alike.
    """
    depths: list[int] = []
    least = layers + 1
    for depth in shared:
        if depth < least:
            least = depth
            depths.append(depth)
        if not depth:
            break
    return set(depths[:most]) - {0}


def _common(before: Sequence[str], after: Sequence[str]) -> int:
    count = 0
    for one, other in zip(before, after, strict=False):
        if one != other:
            break
        count += 1
    return count
