"""Which placement a student takes: a pure function of the seed and of where the run stands. No torch."""

from __future__ import annotations

import random

from gearshift.placement import FULL_ATTENTION, Placement, PlacementSpace

SAMPLINGS = {"uniform": PlacementSpace.sample_uniform, "composition": PlacementSpace.sample_composition}


def sample_placement(
    space: PlacementSpace, sampling: str, seed: int, step: int, micro_batch: int, draw: int = 0
) -> Placement:
    """Draw the placement of one student pass.

    The generator starts anew for every draw, so a resumed run, or another number of processes, sees the same
    placements without any saved state.

    Args:
        space: what to draw from; it must hold a mixer besides full attention.
        sampling: ``uniform`` (each layer on its own) or ``composition`` (uniform over how many layers each
            mixer gets, then shuffled).
        seed: the run's seed.
        step: the optimiser step, from 1.
        micro_batch: the micro-batch within the step, from 0.
        draw: the placement within the micro-batch, from 0.

    Returns:
        A placement that is not full attention everywhere: that one is the teacher and has nothing to train,
        so it is drawn again.
    """
    assert set(space.mixers) != {FULL_ATTENTION}, "nothing to train: the only mixer is the teacher's"
    # Seeding by text hashes it with SHA-512: the same on every platform, and close seeds share nothing.
    rng = random.Random(f"{seed}/{step}/{micro_batch}/{draw}")
    while True:
        placement = SAMPLINGS[sampling](space, rng)
        if set(placement) != {FULL_ATTENTION}:
            return placement
