"""Request bodies: OpenAI's fields that are served, the `length` object, and the value endpoints.

A field that is not here is refused by name. Fields that only describe the caller (user, metadata,
...) are taken and ignored; fields whose neutral value changes nothing are taken with that alone.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lenvm.guidance.request import LengthControl

MAX_CHOICES = 64
MAX_STOPS = 16
MAX_BATCH = 1024
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1, None),
    "reasoning_effort": ("none", None),
    "verbosity": ("medium", None),
    "echo": (False, None),
    "suffix": ("", None),
    "tools": ([], None),
    "functions": ([], None),
    "tool_choice": ("none", "auto", None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
}
"""Fields of OpenAI that are not served: only these values are taken."""

TokenId = Annotated[int, Field(ge=0, le=10_000_000)]
NamedTokens = Annotated[list[TokenId], Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(max_length=4_000_000)]


class Body(BaseModel):
    """Unknown fields, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class TextPart(Body):
    """A part of a message's content. Only text is served."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None

    def to_template(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content if isinstance(self.content, list) else None
        text = "\n".join(p.text for p in parts) if parts is not None else self.content or ""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": str(text)}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_BATCH)]


class StreamOptions(Body):
    """What a stream says besides its text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Generation(Body):
    """What chat and plain completions share."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=131_072)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=10_000_000)] = 0
    """0 and -1: no limit."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] = []
    ignore_eos: bool = False
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=1024)
    ] = None
    exponential_decay_length_penalty: (
        tuple[
            Annotated[int, Field(ge=0, le=131_072)],
            Annotated[float, Field(gt=0, le=100)],
        ]
        | None
    ) = None
    """[start, factor], as in transformers."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Off a token's logit for each time the answer has it. null: 0."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Off the logits of tokens that the answer has. null: 0."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    """Divides positive logits of tokens of the prompt and the answer, multiplies negative ones, as
    in vLLM. null: 1."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    length: LengthControl | None = None
    """The length asked for."""
    track_length: bool | None = None
    """Report value and predicted remaining length at every token (always, with a `length`)."""
    return_token_ids: bool = False
    """Answers that are not streamed name `prompt_token_ids` and `token_ids` of each choice, as
    vLLM's do: what `lenvm sample` trains on."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None

    @field_validator(*NEUTRAL, check_fields=False)
    @classmethod
    def _neutral(cls, value: Any, info: Any) -> Any:
        allowed = NEUTRAL[info.field_name]
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed):
            shown = " or ".join(repr(v) for v in allowed if v is not None)
            raise ValueError(f"{shown} only: this server does not have it")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(1 <= len(s) <= 256 for s in stops):
            raise ValueError(f"up to {MAX_STOPS} texts of 1 to 256 characters")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value and not all(k.isascii() and k.isdigit() and len(k) <= 8 for k in value):
            raise ValueError('token ids as text, for example {"2": -5.0}')
        return value


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=131_072)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The last message is the beginning of the answer."""
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    response_format: Any = None
    modalities: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
                    "length": {"equal_to": 120},
                }
            ]
        }
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs true")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of the assistant")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class CompletionRequest(Generation):
    """Body of /v1/completions: a text, or token ids."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Once upon a time", "length": {"at_most": 60}}]}
    )


def _in_list(value: Any) -> Any:
    """Token ids of one sequence, as of a list of them."""
    flat = isinstance(value, list) and value and not any(isinstance(v, list) for v in value)
    return [value] if flat else value


class Sequences(Body):
    """Token sequences, in one of three forms; a single one may stand without its list."""

    model: str | None = None
    token_ids: (
        Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_BATCH),
        ]
        | None
    ) = None
    text: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_BATCH)] | None = None
    """Encoded as it is, without a chat template."""
    messages: (
        Messages | Annotated[list[Messages], Field(min_length=1, max_length=MAX_BATCH)] | None
    ) = None
    """Conversations: an assistant's last turn is read as the answer so far."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(x is not None for x in (self.token_ids, self.text, self.messages)) != 1:
            raise ValueError("exactly one of token_ids, text, messages")
        return self


class ValuesRequest(Sequences):
    """Body of /v1/length/values."""

    positions: Annotated[
        Annotated[list[list[TokenId]], Field(max_length=MAX_BATCH)] | None,
        BeforeValidator(
            _in_list, json_schema_input_type=list[TokenId] | list[list[TokenId]] | None
        ),
    ] = None
    """Indices into each sequence (of a single one, also without its list); left out, all."""
    quantiles: Annotated[
        list[Annotated[float, Field(gt=0, lt=1)]] | None, Field(max_length=100)
    ] = None
    """Distribution head: these quantiles too."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "The sky is blue because", "positions": [2, 4]}]}
    )


class PredictRequest(Sequences):
    """Body of /v1/length/predict. `prompts`: texts (each one user message) or conversations."""

    prompts: Annotated[list[Text | Messages], Field(min_length=1, max_length=MAX_BATCH)] | None = (
        None
    )
    budget: Annotated[int, Field(ge=1, le=131_072)] | None = None
    """Distribution head: also P(length <= budget)."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompts": ["Name three colours.", "Tell me a story."]}]}
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = (self.token_ids, self.text, self.messages, self.prompts)
        if sum(x is not None for x in forms) != 1:
            raise ValueError("exactly one of prompts, token_ids, text, messages")
        return self


class CandidatesRequest(Sequences):
    """Body of /v1/length/candidates: values of next tokens, the likeliest or those named."""

    candidates: Annotated[
        Annotated[list[NamedTokens], Field(max_length=MAX_BATCH)] | None,
        BeforeValidator(_in_list, json_schema_input_type=NamedTokens | list[NamedTokens] | None),
    ] = None
    """Token ids for each prefix (for a single one, also without its list); left out, the
    generator's likeliest `top_k`."""
    top_k: Annotated[int, Field(ge=1, le=256)] = 10

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "The sky is", "top_k": 5}]})
