"""The output projection of a mixer in closed form: ridge regression towards what it was.

Shape letters: N tokens, F inputs of the projection, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gearshift.supernet import SequenceContext
from gearshift.supernet.mixers import Mixer
from gearshift.train.losses import SMALLEST_NORM

OUTPUT_PROJECTIONS = ("o_proj", "out_proj")
# More tokens than so many for each input of the projection change its weights little.
TOKENS_PER_INPUT = 64


class NormalEquations:
    """Least squares over tokens that come batch by batch, in float64.

    Minimises sum over tokens of weight^2 |W f - y|^2, plus lambda |W - W0|^2.

    Args:
        prior_DF: W0, the weights to stay near to.
    """

    def __init__(self, prior_DF: Tensor) -> None:
        self.prior_DF = prior_DF.double()
        inputs = prior_DF.shape[1]
        self.gram_FF = self.prior_DF.new_zeros(inputs, inputs)
        self.residual_FD = self.prior_DF.new_zeros(inputs, prior_DF.shape[0])

    def add(self, inputs_NF: Tensor, targets_ND: Tensor, weights_N: Tensor) -> None:
        """Add a batch of tokens."""
        f_NF = inputs_NF.double() * weights_N.double()[:, None]
        y_ND = targets_ND.double() * weights_N.double()[:, None]
        self.gram_FF += f_NF.T @ f_NF
        self.residual_FD += f_NF.T @ (y_ND - f_NF @ self.prior_DF.T)

    def solve(self, ridge: float) -> Tensor:
        """Find the best weights, (D, F).

        Args:
            ridge: lambda, in parts of the mean square of an input, summed over tokens; positive.

        Returns:
            The best weights; the prior where inputs are all zero or not finite, or too little is added to the
            diagonal for a solution.
        """
        scale = self.gram_FF.diagonal().mean()
        if not (scale.isfinite() and scale > 0):
            return self.prior_DF
        damped_FF = self.gram_FF + ridge * scale * torch.eye(len(self.gram_FF)).to(self.gram_FF)
        factor_FF, failed = torch.linalg.cholesky_ex(damped_FF)
        if failed:
            return self.prior_DF
        return self.prior_DF + torch.cholesky_solve(self.residual_FD, factor_FF).T


def output_projection(mixer: Mixer) -> nn.Linear | None:
    """The linear map at the end of a mixer; None for one that has none by a name known here."""
    found = [child for name, child in mixer.named_children() if name in OUTPUT_PROJECTIONS]
    return found[0] if len(found) == 1 and isinstance(found[0], nn.Linear) else None


@torch.no_grad()
def fit_output_projection(
    mixer: Mixer, batches: Iterable[tuple[Tensor, SequenceContext, Tensor]], ridge: float
) -> bool:
    """Replace the weights of a mixer's output projection by those that fit the targets best.

    Each token counts by the inverse of its target's norm, so that relative errors are minimised.

    Args:
        mixer: the mixer.
        batches: normed inputs, context and targets of its outputs.
        ridge: see :meth:`NormalEquations.solve`.

    Returns:
        Whether it has an output projection.
    """
    projection = output_projection(mixer)
    if projection is None:
        return False
    equations = NormalEquations(projection.weight)
    given: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    try:
        for x_BTD, context, targets_BTD in batches:
            mixer(x_BTD, context, None)
            inputs_NF, targets_ND = given.pop().flatten(0, 1), targets_BTD.flatten(0, 1).double()
            norms_N = torch.linalg.vector_norm(targets_ND, dim=1).clamp_min(SMALLEST_NORM)
            if projection.bias is not None:
                targets_ND = targets_ND - projection.bias.double()
            equations.add(inputs_NF, targets_ND, 1 / norms_N)
    finally:
        hook.remove()
    projection.weight.copy_(equations.solve(ridge))
    return True
