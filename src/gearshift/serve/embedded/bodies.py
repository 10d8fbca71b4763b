"""The bodies of requests, as OpenAI and vLLM name their fields, checked.

Fields that nobody knows are ignored, as OpenAI does. Those that would change the answer and that this engine
does not have are refused unless they say what is done anyway.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gearshift.serve.catalog import RequestError, shortened

MOST_STOPS = 16
LONGEST_STOP = 1000
# What OpenAI continues a prompt by when nothing is said.
COMPLETION_TOKENS = 16

# The field, and the values with which it says nothing.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tools": ([],),
    "use_beam_search": (False,),
}


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    placement: Any = None
    vllm_xargs: Any = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=1000)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, given: object) -> object:
        return [given] if isinstance(given, str) else given

    @field_validator("stop")
    @classmethod
    def _stops_of_sensible_size(cls, stops: list[str] | None) -> list[str] | None:
        if stops and (len(stops) > MOST_STOPS or not all(0 < len(stop) <= LONGEST_STOP for stop in stops)):
            raise ValueError(f"expected at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
        return stops

    @model_validator(mode="after")
    def _only_what_is_here(self) -> GenerationBody:
        for name, value in (self.model_extra or {}).items():
            if name in _NOT_HERE and value is not None and value not in _NOT_HERE[name]:
                raise RequestError(f"the embedded engine has no {name}; leave it out", name)
        return self

    @property
    def new_tokens(self) -> int | None:
        """How many tokens are wanted; None when nothing is said."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report with each token; None for no log-probabilities."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are reported."""
        return False


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=20)
    prompt_logprobs: int | None = None

    @field_validator("prompt")
    @classmethod
    def _texts_or_tokens(cls, given: object) -> list[Any]:
        """One prompt or several, each a text or a list of tokens."""
        prompts = given if isinstance(given, list) and not _are_tokens(given) else [given]
        if not prompts or not all(isinstance(prompt, str) or _are_tokens(prompt) for prompt in prompts):
            raise ValueError("expected a text, a list of tokens, or a list of either")
        return prompts

    @field_validator("prompt_logprobs")
    @classmethod
    def _without_alternatives(cls, given: int | None) -> int | None:
        if given:
            raise ValueError("expected 0: the prompt's own tokens are reported without alternatives")
        return given

    @model_validator(mode="after")
    def _prompts_are_scored_whole(self) -> CompletionBody:
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs in a stream; ask for the whole answer", "prompt_logprobs")
        return self

    @property
    def alternatives(self) -> int | None:
        """See :class:`GenerationBody`."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """See :class:`GenerationBody`."""
        return self.prompt_logprobs is not None


class ChatMessage(BaseModel):
    """One message; what else it has is for the template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts_as_text(cls, given: object) -> object:
        if not isinstance(given, list):
            return given
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in given):
            raise ValueError("expected a text, or a list of parts of the type text")
        return "".join(part["text"] for part in given)


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _no_scored_prompts(self) -> ChatBody:
        if (self.model_extra or {}).get("prompt_logprobs") is not None:
            raise RequestError(
                "prompt_logprobs of a chat; send the prompt to /v1/completions", "prompt_logprobs"
            )
        return self

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs without logprobs; set logprobs to true, too", "top_logprobs")
        return self

    @property
    def new_tokens(self) -> int | None:
        """See :class:`GenerationBody`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """See :class:`GenerationBody`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class PresetBody(BaseModel):
    """``POST /v1/presets``."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True)

    name: str = Field(max_length=200)
    placement: Any


BodyT = TypeVar("BodyT", bound=BaseModel)


def parse_body(kind: type[BodyT], body: bytes) -> BodyT:
    """Read a request's JSON.

    Raises:
        RequestError: it is no JSON, or a field is missing or wrong; the message names it.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise RequestError(f"the body is no JSON: {shortened(first['msg'])}")
    if not first["loc"]:
        raise RequestError("the body is no JSON object")
    field = shortened(".".join(map(str, first["loc"])))
    given = "" if first["type"] == "missing" else f"; given {shortened(repr(first['input']))}"
    raise RequestError(f"{field}: {first['msg'].removeprefix('Value error, ')}{given}", field)


def _are_tokens(given: object) -> bool:
    """Whether it is a list of whole numbers; an empty one is an empty prompt."""
    return isinstance(given, list) and all(type(token) is int for token in given)
