r"""Supernets in lm-eval, under the name ``gearshift``; needs the extra ``eval``.

    python -m gearshift.evaluate.lm_eval run --model gearshift \
        --model_args pretrained=runs/demo/distilled/supernet,preset=fast --tasks hellaswag

Everything behind the module's name goes to lm-eval's own command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports] - the extra eval
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from gearshift.errors import GearshiftError
from gearshift.evaluate.continuations import Continuation, cut_to, score_continuations
from gearshift.placement import Placement
from gearshift.presets import named_preset, read_presets
from gearshift.progress import show_progress
from gearshift.supernet import load_supernet
from gearshift.train.device import choose_device, precision
from gearshift.train.tokens import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

# Of an answer, where a task says nothing.
NEW_TOKENS = 256


class LmEvalError(GearshiftError):
    """A model is asked for in a way that says nothing, or too much."""


@register_model("gearshift")
class GearshiftLM(TemplateLM):
    """One placement of a supernet.

    Args:
        pretrained: a supernet directory.
        preset: one of its presets.
        placement: or a placement, blanks or ``+`` between its runs, since ``--model_args`` keeps commas.
        device: ``auto``, ``cpu`` or ``cuda``.
        batch_size: sequences at a time.
        max_length: tokens of a sequence at most; 0 for the model's own context.

    Raises:
        LmEvalError: neither preset nor placement is given, or both.
        GearshiftError: the directory, preset or placement is not what it should be.
    """

    def __init__(
        self,
        pretrained: str,
        preset: str = "",
        placement: str = "",
        device: str | None = "auto",
        batch_size: int | str = 8,
        max_length: int = 0,
        **_: Any,  # noqa: ANN401 - lm-eval passes its own settings to every model
    ) -> None:
        super().__init__()
        if bool(preset) == bool(placement):
            raise LmEvalError("give preset=NAME or placement=RUNS in --model_args, and not both")
        directory = Path(pretrained)
        self.model = load_supernet(directory, device=choose_device(device or "auto")).eval()
        self.tokenizer = load_tokenizer(directory)
        space = self.model.placement_space
        if preset:
            self.placement = named_preset(read_presets(directory, space), preset).placement
        else:
            self.placement = space.check(Placement.parse(placement.replace("+", " "), space.num_layers))
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.max_length = int(max_length) or int(self.model.config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.tokenizer.eos_token_id
        return int(token) if isinstance(token, int) else 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ANN401
        """The tokens of a text; special ones only if asked for."""
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens), verbose=False))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,  # noqa: ANN401
    ) -> list[tuple[float, bool]]:
        given = [
            cut_to(Continuation(tuple(context), tuple(tokens)), self.max_length)
            for _, context, tokens in requests
        ]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(given)
        passes = score_continuations(self.model, self.placement, given, self.batch_size)
        with (
            precision(self.model.device),
            show_progress("score", len(given), enabled=not disable_tqdm) as report,
        ):
            for done, (index, score) in enumerate(passes, start=1):
                found[index] = (score.log_likelihood, score.greedy)
                report(done, "")
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length - 1, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The most likely continuation of each text, up to where the task wants it to stop."""
        answers = []
        with show_progress("generate", len(requests), enabled=not disable_tqdm) as report:
            for done, request in enumerate(requests, start=1):
                answers.append(self._generate(*request.args))
                report(done, "")
        return answers

    @torch.inference_mode()
    def _generate(self, text: str, settings: dict[str, Any]) -> str:
        wanted = int(settings.get("max_gen_toks", NEW_TOKENS))
        tokens = self.tok_encode(text)[-max(self.max_length - wanted, 1) :] or [self.eot_token_id]
        ids = torch.tensor([tokens], device=self.model.device)
        model = cast(Any, self.model)  # generate's own annotations refuse every model
        made = model.generate(ids, placement=self.placement, do_sample=False, max_new_tokens=wanted)
        answer = str(self.tokenizer.decode(made[0, len(tokens) :].tolist(), skip_special_tokens=True))
        stops = settings.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            answer = answer.split(stop)[0] if stop else answer
        return answer


def main() -> None:
    """lm-eval's own command line, with supernets in its registry."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()


if __name__ == "__main__":
    main()
