"""Training recipes: what a run does, stage by stage, checked by pydantic. No torch.

A run is a list of stages, taken one after another: ``align``, ``distill``, ``sft``, and ``record``, which
writes a teacher's likeliest tokens to a folder for later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gearshift.placement import known_mixers, long_name

# What a resumed run may change without changing its result; everything else must stay as it was.
CHANGEABLE = ("out", "supernet", "save_every", "device", "trackers", "cluster")


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no infinities, and fixed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSource(Section):
    """Documents to learn from: a local file or folder, or a Hugging Face data set by name."""

    path: Path | None = Field(default=None, description="a .jsonl, .parquet, .txt or .py file, or a folder")
    dataset: str | None = Field(default=None, description="the name of a Hugging Face data set, streamed")
    config: str | None = Field(default=None, description="the data set's configuration, where it has several")
    split: str = Field(default="train", description="the data set's split")
    column: str | None = Field(
        default=None, description="where a row has its text; 'text', or 'messages' in the stage sft"
    )
    weight: float = Field(default=1.0, gt=0, description="share of the tokens, relative to other sources")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:  # noqa: ANN401 - whatever the YAML holds
        return {"path": given} if isinstance(given, str | Path) else given

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("expected exactly one of path and dataset")
        if self.path is not None and self.config is not None:
            raise ValueError("config belongs to a dataset; a path has none")
        return self

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.path if self.dataset is None else self.dataset)


class LossWeights(Section):
    """What each term counts in the loss. Terms of weight 0 are not computed."""

    forward_kl: float = Field(default=1.0, ge=0, description="weight of KL(teacher || student), in nats")
    reverse_kl: float = Field(default=0.0, ge=0, description="weight of KL(student || teacher), in nats")
    cross_entropy: float = Field(default=0.0, ge=0, description="weight of -log p(next token), in nats")
    activation: float = Field(default=1.0, ge=0, description="weight of the distance of mixer outputs")
    activation_form: Literal["relative", "norm", "squared", "relative_squared"] = Field(
        default="relative", description="how that distance is measured"
    )
    mixers: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="what the distance of a mixer counts beside the others; 1 where left out"
    )
    temperature: float = Field(default=1.0, gt=0, description="of both divergences, which it also multiplies")

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if not any((self.forward_kl, self.reverse_kl, self.cross_entropy, self.activation)):
            raise ValueError("every weight is 0; expected at least one loss greater than 0")
        known = {name for mixer in known_mixers() for name in (mixer, *_short(mixer))}
        for name in self.mixers:
            if name not in known:
                raise ValueError(f"unknown mixer {name!r}; expected one of {', '.join(known_mixers())}")
        return self

    @property
    def divergences(self) -> bool:
        """Whether the teacher's next-token distribution is needed."""
        return self.forward_kl > 0 or self.reverse_kl > 0

    def mixer_weight(self, mixer: str) -> float:
        """What the distance of a mixer counts."""
        by_name = {long_name(name): weight for name, weight in self.mixers.items()}
        return by_name.get(mixer, 1.0)


def _short(mixer: str) -> tuple[str, ...]:
    from gearshift.placement import short_name

    return (short_name(mixer),)


class SamplingPhase(Section):
    """How placements are drawn: by one way, or by several with a probability each."""

    uniform: float = Field(default=0.0, ge=0, description="weight of drawing every layer on its own")
    composition: float = Field(
        default=0.0, ge=0, description="weight of drawing how many layers each mixer gets, then shuffling"
    )
    presets: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="weights of placements, by text or by a name of the recipe's 'placements'"
    )
    until: int | None = Field(default=None, gt=0, description="the last step of the stage that it is used in")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:  # noqa: ANN401
        return {given: 1.0} if given in ("uniform", "composition") else given

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.uniform or self.composition or self.presets):
            raise ValueError("nothing is drawn; expected a weight for uniform, composition or presets")
        return self


class _Steps(Section):
    """What every stage has."""

    steps: int = Field(gt=0, description="number of steps")
    batch_size: int = Field(default=8, gt=0, description="sequences in a micro-batch")
    micro_batches: int = Field(
        default=1, gt=0, description="micro-batches in a step, shared out among the GPUs"
    )
    sequence_length: int = Field(default=256, gt=1, description="tokens in a sequence")
    packing: Literal["documents", "stream"] = Field(
        default="documents",
        description="documents: no token sees another document; stream: whatever stands before it in its row",
    )
    data: list[DataSource] | None = Field(
        default=None, min_length=1, description="documents of this stage; the recipe's where left out"
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step reads, over all GPUs."""
        return self.batch_size * self.micro_batches * self.sequence_length


class _Training(_Steps):
    """What every stage that moves weights has."""

    learning_rate: float = Field(default=1e-3, gt=0, description="learning rate after the warm-up")
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the learning rate rises linearly")
    decay: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the learning rate falls to a tenth, if it does"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay of the trained matrices")
    gradient_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of {self.steps} steps; expected fewer than steps"
            )
        return self


class AlignStage(_Training):
    """Every mixer of every layer learns from one teacher pass, each on its own."""

    stage: Literal["align"]
    activation_form: Literal["relative", "norm", "squared", "relative_squared"] = Field(
        default="relative", description="how the distance to the teacher's mixer output is measured"
    )


class _Placed(_Training):
    """What stages that train whole placements have."""

    sampling: Annotated[list[SamplingPhase], Field(min_length=1)] = Field(
        default=[SamplingPhase(uniform=1.0)], description="how placements are drawn, phase by phase"
    )
    placements_per_batch: int = Field(
        default=1, gt=0, description="student placements that share one teacher pass"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_phase(cls, given: Any) -> Any:  # noqa: ANN401
        if isinstance(given, dict) and isinstance(given.get("sampling"), str | dict):
            return given | {"sampling": [given["sampling"]]}
        return given

    @model_validator(mode="after")
    def _phases_follow(self) -> Self:
        ends = [phase.until for phase in self.sampling]
        rising = all(a is not None and (b is None or a < b) for a, b in zip(ends, ends[1:], strict=False))
        if not rising or ends[-1] is not None:
            raise ValueError(
                f"sampling has phases until {ends}; expected rising steps and no 'until' in the last phase"
            )
        return self


class DistillStage(_Placed):
    """Placements drawn at random learn from the teacher."""

    stage: Literal["distill"]
    losses: LossWeights = Field(default=LossWeights(), description="weights of the losses")
    teacher_logits: Path | None = Field(
        default=None, description="a folder that a stage 'record' wrote, in place of a running teacher"
    )

    @model_validator(mode="after")
    def _offline_teacher(self) -> Self:
        if self.teacher_logits is not None and (self.losses.activation or not self.losses.divergences):
            raise ValueError(
                "teacher_logits hold no mixer outputs; expected losses.activation: 0 and a divergence above 0"
            )
        return self


class SftStage(_Placed):
    """Chosen placements learn the answers of conversations."""

    stage: Literal["sft"]
    losses: LossWeights = Field(
        default=LossWeights(forward_kl=0.0, activation=0.0, cross_entropy=1.0),
        description="weights of the losses; on answers alone",
    )

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_given(cls, given: Any) -> Any:  # noqa: ANN401
        """A term that is not named counts nothing here, unlike in distillation."""
        if isinstance(given, dict) and isinstance(given.get("losses"), dict):
            defaults = {"forward_kl": 0.0, "activation": 0.0}
            return given | {"losses": defaults | given["losses"]}
        return given


class RecordStage(_Steps):
    """The teacher's likeliest next tokens of every place are written down, for a stage without a teacher."""

    stage: Literal["record"]
    top_k: int = Field(default=64, gt=0, description="likeliest tokens kept for every place")
    write: Path = Field(description="the folder to write")


Stage = Annotated[AlignStage | DistillStage | SftStage | RecordStage, Field(discriminator="stage")]


class HeldOutChecks(Section):
    """Quality on held-out text while the run goes on."""

    data: list[DataSource] = Field(min_length=1, description="text that is not trained on")
    placements: list[str] = Field(
        min_length=1, description="placements by text or by a name of the recipe's 'placements'"
    )
    every: int = Field(default=100, gt=0, description="steps between two checks")
    tokens: int = Field(default=4096, gt=0, description="tokens to judge on")


class Scale(Section):
    """How a run spreads over memory and GPUs; nothing here changes what is learned."""

    activation_checkpointing: bool = Field(
        default=False, description="compute layers twice in place of keeping what they computed"
    )
    compile: bool = Field(default=False, description="compile the FFNs with torch.compile")
    head_logits: int = Field(
        default=2**25, gt=0, description="logits that exist at a time; more are faster and take more memory"
    )


class Cluster(Section):
    """What the plan of --dry-run is made for; a run itself takes what torchrun gives it."""

    gpus: int = Field(default=1, gt=0, description="GPUs in all")
    memory_gib: float = Field(default=80.0, gt=0, description="memory of a GPU, in GiB")
    tflops: float = Field(default=800.0, gt=0, description="bfloat16 products a GPU can do, in TFLOP/s")
    utilisation: float = Field(default=0.4, gt=0, le=1, description="share of that which is expected")


class Recipe(Section):
    """One run. Relative paths start at the current directory."""

    supernet: Path = Field(description="the supernet directory to start from")
    out: Path = Field(description="the run directory to write")
    stages: list[Stage] = Field(min_length=1, description="what is done, one after another")
    data: list[DataSource] | None = Field(
        default=None, min_length=1, description="documents of stages without any of their own"
    )
    shape: Path | None = Field(
        default=None, description="a teacher's config.json, for plans before the supernet exists"
    )
    teacher: Path | None = Field(
        default=None, description="another supernet whose full attention teaches; the supernet's own if none"
    )
    trained: Literal["mixers", "mixers_and_attention"] = Field(
        default="mixers", description="whether full attention is trained, too; the teacher stays frozen"
    )
    placements: dict[str, str] = Field(default={}, description="names for placements")
    held_out: HeldOutChecks | None = Field(default=None, description="quality while the run goes on")
    seed: int = Field(default=0, ge=0, description="seed of the batches and of the placements")
    save_every: int = Field(default=200, gt=0, description="steps between two checkpoints")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes the GPU if there is one"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of products; auto is bf16 on a GPU and fp32 on a CPU"
    )
    trackers: list[Literal["trackio", "wandb", "tensorboard"]] = Field(
        default=[], description="where metrics go besides metrics.jsonl"
    )
    scale: Scale = Field(default=Scale(), description="memory and GPUs")
    cluster: Cluster = Field(default=Cluster(), description="what plans are made for")

    @model_validator(mode="after")
    def _every_stage_has_data(self) -> Self:
        lacking = [number for number, stage in enumerate(self.stages) if stage.data is None]
        if self.data is None and lacking:
            raise ValueError(f"the key 'data' is missing, and stages {lacking} have none of their own")
        return self

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, step: int) -> tuple[int, int]:
        """The stage that a step of the run, from 1, is in, and its number within the stage, from 1."""
        for index, stage in enumerate(self.stages):
            if step <= stage.steps:
                return index, step
            step -= stage.steps
        raise AssertionError("the step lies beyond the run")

    def sources(self, index: int) -> list[DataSource]:
        """The documents of a stage."""
        sources = self.stages[index].data or self.data
        assert sources is not None, "checked when the recipe was read"
        return sources


TrainingStage = AlignStage | DistillStage | SftStage
PlacedStage = DistillStage | SftStage
