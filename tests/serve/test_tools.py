"""Tools and chat-template keywords on the wire: what a row of `rm-ood check` may hold, an item may."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import preference_rows
from serving import Client, guard_scorer, serving

from rm_ood import GuardClient, OODGuard
from rm_ood.batch import check_file
from rm_ood.dialogue import Dialogue

pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::rm_ood.TokenisationWarning"),
]

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}{% if brief %}Be brief.\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
MESSAGES = [{"role": "user", "content": "name a river"}]


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    tokenizer = copy.deepcopy(decoder_tokenizer)
    tokenizer.chat_template = TEMPLATE
    guard = OODGuard(
        copy.deepcopy(shared_decoder), tokenizer, alpha=0.1, text_format="chat", channels="final", axes=("response",),
        max_length=256,
    )  # fmt: skip
    return guard.fit(preference_rows(150), calibration=0.5, progress=False)


@pytest.fixture(scope="module")
def client(guard: OODGuard) -> Iterator[Client]:
    with serving(guard_scorer(guard)) as (client, _):
        yield client


BESIDE: list[dict[str, Any]] = [
    {},
    {"tools": TOOLS},
    {"chat_template_kwargs": {"brief": True}},
    {"tools": TOOLS, "chat_template_kwargs": {"brief": True, "other": None}},
]


def test_an_item_is_scored_as_the_row_of_a_file_and_as_in_python(
    client: Client, guard: OODGuard, tmp_path: Any
) -> None:
    items = [{"id": str(i), "prompt": MESSAGES, "response": "the Elbe", **beside} for i, beside in enumerate(BESIDE)]
    rows = client.post("/v1/score", {"items": items}).json["results"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, items)))
    check_file(guard, str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl"), progress=False)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, line, beside in zip(rows, written, BESIDE, strict=True):
        here = guard.check(MESSAGES, "the Elbe", **beside)
        for other in (line, {"id": row["id"], **here.to_dict()}):
            assert row["reward"] == pytest.approx(other["reward"], abs=1e-4)
            assert {n: row[n] for n in ("id", "p_value", "is_ood", "reasons")} == {
                n: other[n] for n in ("id", "p_value", "is_ood", "reasons")
            }
    # They are read: each makes another text.
    assert len({round(row["reward"], 3) for row in rows}) == len(BESIDE)


def test_the_other_shapes_and_the_client_carry_them(client: Client, guard: OODGuard) -> None:
    expected = guard.check(MESSAGES, "the Elbe", tools=TOOLS).reward
    turns = {"messages": [*MESSAGES, {"role": "assistant", "content": "the Elbe"}], "tools": TOOLS}
    nested = {"prompt": MESSAGES, "responses": ["the Elbe"], "tools": TOOLS}
    for body in (turns, nested):
        (row,) = client.post("/v1/score", body).json["results"]
        assert row["reward"] == pytest.approx(expected, abs=1e-4)
    with GuardClient(f"http://127.0.0.1:{client.port}") as asking:
        prompts = [Dialogue(MESSAGES, tools=TOOLS), Dialogue(MESSAGES, template_kwargs={"brief": True}), MESSAGES]
        found = asking.check(prompts, ["the Elbe"] * 3)
        assert found.rewards == pytest.approx(guard.check(prompts, ["the Elbe"] * 3).rewards, abs=1e-4)
        assert len(set(found.prompt_index)) == 3


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"tools": "[]"}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{}] * 129}, "tools: List should have at most 128"),
        ({"tools": [{"description": "x" * 20_001}]}, "tools: 20022 characters"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"sekret words": 1}}, "chat_template_kwargs: String should match pattern"),
        ({"chat_template_kwargs": {"brief": "x" * 20_001}}, "characters; the limit is max_chars=20000"),
        ({"chat_template_kwargs": {"tokenize": True}}, "['tokenize'] are the tokenizer's own"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "['chat_template'] are the tokenizer's own"),
        ({"chat_template_kwargs": {"sanitize_control_tokens": True}}, "are the tokenizer's own"),
        ({"chat_template_kwargs": {"messages": []}}, "the chat template refused"),
        ({"chat_template_kwargs": {f"k{i}": 1 for i in range(33)}}, "at most 32"),
    ],
)
def test_what_is_beside_a_prompt_is_bounded(client: Client, beside: dict[str, Any], words: str) -> None:
    answer = client.post("/v1/score", {"items": [{"prompt": MESSAGES, "response": "the Elbe", **beside}]})
    assert answer.status == 422
    assert words in answer.json["error"]
    assert "sekret" not in answer.body.decode()


def test_a_dialogue_has_so_many_turns_at_most(client: Client) -> None:
    turns = [{"role": "user", "content": "a"}] * 256
    bodies = [
        {"prompt": [*turns, turns[0]], "response": "b"},
        {"messages": [*turns, {"role": "assistant", "content": "b"}]},
    ]
    for body in bodies:
        answer = client.post("/v1/score", body)
        assert (answer.status, "at most 256 items" in answer.json["error"]) == (422, True)
    assert client.post("/v1/score", {"prompt": turns, "response": "b"}).status == 200


@pytest.mark.parametrize(("pairs", "status"), [(128, 200), (129, 422), (300, 422)])
def test_a_text_holds_so_many_turns_at_most(client: Client, pairs: int, status: int) -> None:
    ask, end = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    rendered = f"{ask}b{end}" * (pairs - 1) + ask
    written = "\n\nHuman: a\n\nAssistant: b" * pairs
    for path, body in (
        ("/classify", {"input": [f"{rendered}b{end}"]}),
        ("/classify", {"input": written}),
        ("/get_reward", {"query": [f"{rendered}b{end}"], "prompts": [rendered]}),
        ("/v1/score", {"prompt": written, "response": "b"}),
    ):
        answer = client.post(path, body)
        assert answer.status == status, (path, answer.body)
        assert status == 200 or "at most 256" in answer.json["error"]


def test_a_template_that_does_not_render_tools_refuses_them(minilm_guard: OODGuard) -> None:
    with serving(guard_scorer(minilm_guard)) as (client, _):
        answer = client.post("/v1/score", {"prompt": "a question", "response": "b", "tools": TOOLS})
        assert (answer.status, answer.json["type"]) == (422, "invalid_text")
        assert client.post("/v1/score", {"prompt": "a question", "response": "b", "tools": []}).status == 200
