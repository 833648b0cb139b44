"""What requests and replies look like; nothing else is accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter

Name = Annotated[str, Field(min_length=1, max_length=128)]
# At least one character that is not white space.
Words = Annotated[str, Field(pattern=r"\S")]


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


# Tags begin with ~, so that no error names one as a field.
Messages = Annotated[list[Message], Field(min_length=1)]
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


class _Item(Strict):
    id: Name | None = None
    session: Name | None = None
    group: Name | None = None


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

    messages: Annotated[list[Message], Field(min_length=2)]


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


class ErrorReply(BaseModel):
    """A request that was refused."""

    error: str
    type: str
    request_id: str


SCORE: TypeAdapter[Any] = TypeAdapter(ScoreRequest)
