"""What requests and replies look like; nothing else is accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, WithJsonSchema

Name = Annotated[str, Field(min_length=1, max_length=128)]
# Not white space alone, which the guard's own rule for prompts decides.
WORDS = r"\S"
Words = Annotated[str, WithJsonSchema({"type": "string", "pattern": WORDS})]


def _off(value: bool) -> bool:
    if value:
        raise ValueError("only false is served")
    return value


Off = Annotated[bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})]


class Strict(BaseModel):
    """No unknown fields, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextBlock(Strict):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(Strict):
    """One turn of a dialogue."""

    role: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    content: str | list[TextBlock] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Name | None = None


# To find the words of all turns in a dialogue's text takes a time that grows with the square of their number.
MOST_TURNS = 256
# Tags begin with ~, so that no error names one as a field.
Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_TURNS)]
OneMessage = Annotated[list[Message], Field(min_length=1, max_length=1)]


def _kind(value: Any) -> str:
    return "~text" if isinstance(value, str) else "~messages"


Prompt = Annotated[
    Annotated[Words, Tag("~text")] | Annotated[Messages, Tag("~messages")],
    Discriminator(_kind, custom_error_type="text_or_messages", custom_error_message="expected a string or messages"),
]
Response = Annotated[
    Annotated[str, Tag("~text")] | Annotated[OneMessage, Tag("~messages")],
    Discriminator(_kind, custom_error_type="text_or_messages", custom_error_message="expected a string or a message"),
]


# What a prompt's chat template renders beside its messages; the names of a row of data. Their text counts as a text's.
Keyword = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]


class _Item(Strict):
    id: Name | None = None
    session: Name | None = None
    group: Name | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    chat_template_kwargs: Annotated[dict[Keyword, Any], Field(max_length=32)] | None = None


class PromptResponse(_Item):
    """One prompt and one response."""

    prompt: Prompt
    response: Response


class PromptResponses(_Item):
    """One prompt and several responses."""

    prompt: Prompt
    responses: Annotated[list[Response], Field(min_length=1)]


class Conversation(_Item):
    """Messages whose last one, of the assistant, is the response."""

    messages: Annotated[list[Message], Field(min_length=2, max_length=MOST_TURNS)]


def _shape(value: Any) -> str:
    if not isinstance(value, dict):
        return "~one"
    return next((f"~{name}" for name in ("items", "messages", "responses") if name in value), "~one")


Shape = Annotated[PromptResponse, Tag("~one")] | Annotated[PromptResponses, Tag("~responses")]
AnyItem = Annotated[Shape | Annotated[Conversation, Tag("~messages")], Discriminator(_shape)]


class Batch(Strict):
    """Several items."""

    items: Annotated[list[AnyItem], Field(min_length=1)]


ScoreRequest = Annotated[
    Shape | Annotated[Conversation, Tag("~messages")] | Annotated[Batch, Tag("~items")], Discriminator(_shape)
]


class RewardRequest(Strict):
    """OpenRLHF's request: whole texts, and the prompts that they begin with."""

    query: Annotated[list[str], Field(min_length=1)]
    prompts: Annotated[list[str], Field(min_length=1)]
    labels: list[Any] | None = None


class _Classify(Strict):
    model: Name | None = None
    # Rewards are raw, never squeezed by a sigmoid.
    use_activation: Off | None = None
    add_special_tokens: bool | None = None


class ClassifyTexts(_Classify):
    """vLLM's request on whole texts."""

    input: str | Annotated[list[str], Field(min_length=1)]


class ClassifyMessages(_Classify):
    """vLLM's request on messages whose last one, of the assistant, is the response."""

    messages: Annotated[list[Message], Field(min_length=2, max_length=MOST_TURNS)]
    add_generation_prompt: Off | None = None
    continue_final_message: Off | None = None


def _asked(value: Any) -> str:
    return "~messages" if isinstance(value, dict) and "messages" in value else "~input"


ClassifyRequest = Annotated[
    Annotated[ClassifyTexts, Tag("~input")] | Annotated[ClassifyMessages, Tag("~messages")], Discriminator(_asked)
]


class ChannelRow(BaseModel):
    """One channel of an axis."""

    score: float | None
    ood_score: float | None
    p_value: float | None
    class_scores: list[float | None] | None


class AxisRow(BaseModel):
    """One axis of a verdict."""

    ood_score: float | None
    p_value: float | None
    is_ood: bool
    channels: dict[str, ChannelRow]


class Row(BaseModel):
    """A row as `rm-ood check` writes it."""

    id: str
    reward: float | None
    is_ood: bool
    p_value: float | None
    axes: dict[str, AxisRow]
    nearest_class: str | None
    class_log_odds: float | None
    reasons: list[str]
    truncated: bool


class MonitorRow(BaseModel):
    """Where the traffic monitor stands."""

    alarm: bool
    e_value: float
    threshold: float
    recurring_alarms: int
    requests: int
    counted: int
    flag_rate: float | None
    message: str | None


class ScoreReply(BaseModel):
    """Rows in the order of the request; several answers to one prompt one after the other."""

    results: list[Row]
    monitor: MonitorRow | None
    mode: Literal["shadow", "warn", "enforce"]
    guard: str
    request_id: str


class RewardReply(BaseModel):
    """OpenRLHF's reply; `scores` are the rewards."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class ClassifyRow(BaseModel):
    """One item: `probs` are whether it is flagged (0 or 1), its p-value, and last its reward."""

    index: int
    label: Literal["in", "ood"]
    probs: Annotated[list[float], Field(min_length=3, max_length=3)]
    num_classes: Literal[3]


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0]


class ClassifyReply(BaseModel):
    """vLLM's reply."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassifyRow]
    usage: Usage


class CardReply(BaseModel):
    """The guard card, and the digest of the guard."""

    model_config = ConfigDict(extra="allow")

    digest: str


class LiveReply(BaseModel):
    """The process answers."""

    live: Literal[True]


class ReadyReply(BaseModel):
    """Whether to send requests here, and if not, why."""

    ready: bool
    reasons: list[str]


class ErrorReply(BaseModel):
    """A request that was refused."""

    error: str
    type: str
    request_id: str


SCORE: TypeAdapter[Any] = TypeAdapter(ScoreRequest)
REWARD: TypeAdapter[RewardRequest] = TypeAdapter(RewardRequest)
CLASSIFY: TypeAdapter[Any] = TypeAdapter(ClassifyRequest)
