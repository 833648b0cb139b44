"""SGLang and vLLM clients against a stand-in server that replays the documented JSON of SGLang 0.5.23 and vLLM 0.33.

The stand-in pools the very last token it gets, as both engines do, so the verdicts agree with those of the same guard on
the local model only if the client sends the right ids.
"""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from safetensors.torch import save_file
from torch import nn

from rm_ood import Decision, Decisions, EngineError, InputError, MismatchError, NotFittedError, OODGuard
from rm_ood.integrations import transport, vllm_plugin
from rm_ood.integrations.engines import SGLangScorer, VLLMScorer
from rm_ood.integrations.vllm_plugin import GuardedClassifier

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")

MESSAGES = [{"role": "user", "content": "name a river"}, {"role": "assistant", "content": "the Elbe"}]
REPLIES = {"sglang": "/v1/score", "vllm": "/classify"}


class Engine:
    """A stand-in for both engines: last-token pooling, their JSON, and a hook to spoil a reply."""

    def __init__(self, model: Any, head: Any) -> None:
        self.model, self.head = model, head
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        # Statuses to answer before the first real answer.
        self.statuses: list[int] = []
        self.spoil: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.raw: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.requests.append((self.path, body, dict(self.headers)))
                if engine.raw(self):
                    return
                status = engine.statuses.pop(0) if engine.statuses else 200
                answer = engine.answer(self.path, body) if status == 200 else {"error": {"message": str(body)}}
                self.reply(status, json.dumps(answer).encode())

            def reply(self, status: int, data: bytes, **headers: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """A client that gave up is what some tests are about."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def hidden(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.model(torch.tensor([ids])).last_hidden_state[:, -1]

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        items = [body["query"] + item for item in body["items"]] if path == REPLIES["sglang"] else body["input"]
        hidden = [self.hidden(ids) for ids in items]
        tokens = sum(map(len, items))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        with torch.inference_mode():
            rows = [self.head(h)[0].tolist() for h in hidden]
        if path == REPLIES["sglang"]:
            assert body["apply_softmax"] is body["item_first"] is False
            reply: dict[str, Any] = {"scores": rows, "model": "rm", "usage": usage, "object": "scoring"}
            reply["pooled_hidden_states"] = (
                [h[0].tolist() for h in hidden] if body["return_pooled_hidden_states"] else None
            )
        else:
            if body["use_activation"] is not False:
                rows = [torch.tensor(row).sigmoid().tolist() for row in rows]
            data = [{"index": i, "label": None, "probs": row, "num_classes": len(row)} for i, row in enumerate(rows)]
            reply = {"id": "classify-1", "object": "list", "created": 1, "model": "rm", "data": data, "usage": usage}
        return self.spoil(reply)


@pytest.fixture(scope="module")
def local(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    """The default channels on the local model; pad == eos, and every text ends in it."""
    guard = OODGuard(
        copy.deepcopy(shared_decoder), decoder_tokenizer, alpha=0.1, max_length=64, text_format="plain", append_eos=True
    )
    return guard.fit(preference_rows(400), calibration=0.5, progress=False)


@pytest.fixture(scope="module")
def folder(local: OODGuard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guard") / "guard"
    local.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def final(folder: Path, local: OODGuard, decoder_tokenizer: Any) -> OODGuard:
    """The same guard on the model, joined from `final` alone: what the engines are compared with."""
    return OODGuard.from_pretrained(folder, copy.deepcopy(local.model), decoder_tokenizer, channels="final")


@pytest.fixture(scope="module")
def vectors(folder: Path) -> OODGuard:
    """The same guard without a model."""
    return OODGuard.from_pretrained(folder)


@pytest.fixture
def engine(shared_decoder: Any) -> Iterator[Engine]:
    engine = Engine(shared_decoder, shared_decoder.score)
    yield engine
    engine.server.shutdown()
    engine.server.server_close()


@pytest.fixture
def vllm(shared_decoder: Any, engine: Engine, folder: Path) -> Engine:
    engine.head = GuardedClassifier(shared_decoder.score, str(folder))
    return engine


@pytest.fixture
def sglang(engine: Engine, vectors: OODGuard, decoder_tokenizer: Any) -> Iterator[SGLangScorer]:
    with SGLangScorer(engine.url, vectors, decoder_tokenizer, retries=0, timeout=20) as scorer:
        yield scorer


@pytest.fixture
def vllm_scorer(vllm: Engine, vectors: OODGuard, decoder_tokenizer: Any) -> Iterator[VLLMScorer]:
    with VLLMScorer(vllm.url, vectors, decoder_tokenizer, retries=0, timeout=20) as scorer:
        yield scorer


def texts() -> tuple[list[str], list[str]]:
    rows = preference_rows(30, seed=5)
    return [r["prompt"] for r in rows] + ["xk " * 200, "count"], [r["chosen"] for r in rows] + ["zqv " * 9, "{}();" * 8]


def assert_same(ours: Decisions, theirs: Decisions) -> None:
    np.testing.assert_allclose(ours.rewards, theirs.rewards, rtol=0, atol=1e-4)
    channel = ours.axis("response").channel("final")
    expected = theirs.axis("response").channel("final")
    np.testing.assert_allclose(channel.scores, expected.scores, rtol=1e-4)
    np.testing.assert_allclose(channel.class_scores, expected.class_scores, rtol=1e-4)
    np.testing.assert_allclose(ours.class_log_odds, theirs.class_log_odds, atol=1e-3)
    np.testing.assert_allclose(ours.axis("response").ood_scores, theirs.axis("response").ood_scores, atol=1e-3)
    np.testing.assert_array_equal(ours.p_values, theirs.p_values)
    np.testing.assert_array_equal(ours.is_ood, theirs.is_ood)
    np.testing.assert_array_equal(ours.nearest_class, theirs.nearest_class)
    assert ours.reasons == theirs.reasons
    np.testing.assert_array_equal(ours.truncated, theirs.truncated)
    np.testing.assert_array_equal(ours.prompt_index, theirs.prompt_index)


# -- the verdicts are the guard's own


@pytest.mark.parametrize("name", ["sglang", "vllm_scorer"])
def test_verdicts_are_those_of_the_guard_on_the_local_model(
    name: str, final: OODGuard, request: Any, engine: Engine
) -> None:
    scorer = request.getfixturevalue(name)
    scorer.batch_size = 8
    theirs = final.check(*texts())
    ours = scorer.check(*texts())
    assert_same(ours, theirs)
    assert 0 < theirs.is_ood.sum() < len(theirs)
    assert ours.truncated.tolist() == [False] * 30 + [True, False]
    assert len(engine.requests) == 4


@pytest.mark.parametrize("name", ["sglang", "vllm_scorer"])
def test_the_call_forms_are_those_of_check(name: str, final: OODGuard, request: Any) -> None:
    scorer = request.getfixturevalue(name)
    one = scorer.check("name a river", "the Elbe", progress=True)
    assert isinstance(one, Decision)
    assert one.p_value == final.check("name a river", "the Elbe").p_value
    nested = scorer.check(["name a river", "count"], [["the Elbe", "no"], ["one two"]])
    assert_same(nested, final.check(["name a river", "count"], [["the Elbe", "no"], ["one two"]]))
    assert len(scorer.check([], [])) == 0
    with pytest.raises(InputError, match=r"items\[0\].response: "):
        scorer.check(["a"], [7])


def test_chat_templates_and_unknown_groups(
    shared_decoder: Any, decoder_tokenizer: Any, engine: Engine, tmp_path: Path
) -> None:
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], **{
        k: [{"role": "assistant", "content": r[k]}] for k in ("chosen", "rejected")
    }, "source": "ab"[i % 2]} for i, r in enumerate(preference_rows(600, seed=3))]  # fmt: skip
    guard = OODGuard(
        copy.deepcopy(shared_decoder),
        decoder_tokenizer,
        alpha=0.1,
        channels="final",
        axes=("response",),
        groups="source",
    )
    guard.fit(rows, calibration=0.5, progress=False).save_pretrained(tmp_path / "guard")
    alone = OODGuard.from_pretrained(tmp_path / "guard")
    prompts, responses, groups = [MESSAGES[:1], "Human: hi\n\nAssistant:"], ["the Elbe", "hello"], ["a", "b"]
    with SGLangScorer(engine.url, alone, decoder_tokenizer, max_length=512) as scorer:
        assert_same(scorer.check(prompts, responses, groups), guard.check(prompts, responses, groups=groups))
        with pytest.raises(InputError, match="groups"):
            scorer.check(prompts, responses)
    # The model's own limit is below the tokenizer's, which the client cannot know; the guard does.
    with pytest.raises(MismatchError, match=r"another limit than max_length=\d+ tokens\. Pass the reward model's own"):
        SGLangScorer(engine.url, alone, decoder_tokenizer)


@pytest.mark.parametrize("name", ["sglang", "vllm_scorer"])
def test_requests_are_token_ids_in_the_documented_form(
    name: str, request: Any, engine: Engine, decoder_tokenizer: Any
) -> None:
    scorer = request.getfixturevalue(name)
    scorer.model = "rm"
    scorer.check(["name a river"] * 2, ["the Elbe", ""])
    [(path, body, headers)] = engine.requests
    eos = decoder_tokenizer.eos_token_id
    ids = decoder_tokenizer("name a riverthe Elbe")["input_ids"]
    short = decoder_tokenizer("name a river")["input_ids"]
    assert headers["Content-Type"] == "application/json"
    # The end token is the pad token: the last token that counts is the one before it.
    assert eos == decoder_tokenizer.pad_token_id
    if name == "sglang":
        assert path == "/v1/score"
        assert body == {
            "query": [], "items": [ids, short], "return_pooled_hidden_states": True, "apply_softmax": False,
            "item_first": False, "model": "rm",
        }  # fmt: skip
    else:
        assert path == "/classify"
        assert body == {"input": [ids, short], "use_activation": False, "model": "rm"}


def test_the_recorded_pad_id_ends_the_items(
    vectors: OODGuard, final: OODGuard, decoder_tokenizer: Any, engine: Engine, folder: Path
) -> None:
    eos = decoder_tokenizer.eos_token_id
    with pytest.raises(MismatchError, match=f"pad_id=5: the guard was fitted on a model whose pad id is {eos}"):
        SGLangScorer(engine.url, vectors, decoder_tokenizer, pad_id=5)
    # A guard from before the id was recorded: the tokenizer tells, or the caller.
    old = OODGuard.from_pretrained(folder)
    del old.state.fingerprint["pad_token_id"]  # type: ignore[attr-defined]
    for options, last in (({}, False), ({"pad_id": eos}, False), ({"pad_id": 5}, True)):
        with SGLangScorer(engine.url, old, decoder_tokenizer, **options) as scorer:
            scorer.check("name a river", "the Elbe")
        assert (engine.requests[-1][1]["items"][0][-1] == eos) is last
    # Only pad ids: transformers reads position 0.
    plain = SGLangScorer(engine.url, vectors, decoder_tokenizer)
    assert plain._sent([eos, eos, eos]) == [eos]
    assert plain._sent([3, eos, 4, eos]) == [3, eos, 4]
    plain.close()


def test_guards_that_read_the_last_token_send_it(
    shared_decoder: Any, decoder_tokenizer: Any, engine: Engine, tmp_path: Path
) -> None:
    guard = OODGuard(
        copy.deepcopy(shared_decoder), decoder_tokenizer, alpha=0.05, channels="final", axes=("response",), max_length=64,
        text_format="plain", append_eos=True, read_out="non_pad",
    )  # fmt: skip
    guard.fit(preference_rows(300), calibration=0.5, progress=False).save_pretrained(tmp_path / "guard")
    for read_out, last in (("non_pad", False), ("last_token", True)):
        alone = OODGuard.from_pretrained(tmp_path / "guard")
        alone._state = alone.state.with_settings({"read_out": read_out})
        with SGLangScorer(engine.url, alone, decoder_tokenizer) as scorer:
            scorer.check("name a river", "the Elbe")
        assert (engine.requests[-1][1]["items"][0][-1] == decoder_tokenizer.eos_token_id) is last


# -- the reward is read from the vector


def checkpoint(folder: Path, model: Any, *, shards: bool = False, **changes: torch.Tensor) -> Path:
    tensors = {name: value.contiguous() for name, value in {**model.state_dict(), **changes}.items()}
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = {name: f"model-{1 + (name == 'score.weight')}.safetensors" for name in tensors}
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_the_head_of_a_checkpoint_agrees(
    shards: bool, engine: Engine, vectors: OODGuard, final: OODGuard, decoder_tokenizer: Any, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, final.model, shards=shards)
    if shards:
        # Only the head's file is opened.
        (tmp_path / "model-1.safetensors").write_bytes(b"")
    with SGLangScorer(engine.url, vectors, decoder_tokenizer, head=path) as scorer:
        assert_same(scorer.check(*texts()), final.check(*texts()))


def test_a_reward_of_another_vector_is_flagged(
    engine: Engine, vectors: OODGuard, final: OODGuard, decoder_tokenizer: Any
) -> None:
    # What an engine does that pools another token for the vector than for the reward.
    def spoil(reply: dict[str, Any]) -> dict[str, Any]:
        reply["scores"][1] = [reply["scores"][1][0] + 0.01]
        return reply

    engine.spoil = spoil
    weight = final.model.score.weight
    with SGLangScorer(engine.url, vectors, decoder_tokenizer) as scorer:
        plain = scorer.check(["one two"] * 3, ["three"] * 3)
    assert not any("read_out_mismatch" in r for r in plain.reasons)
    for head in ((weight, None), (weight[0], 0.0), [weight.detach().numpy(), np.zeros(1)]):
        with SGLangScorer(engine.url, vectors, decoder_tokenizer, head=head) as scorer:
            got = scorer.check(["one two"] * 3, ["three"] * 3)
        assert got.reasons == ((), ("read_out_mismatch",), ())
        assert got.is_ood[1]
        assert got.p_values[1] == got.p_values.min() < got.p_values[0]
        assert got.nearest_class is not None
        assert got.nearest_class[1] == -1
        assert not got.is_ood[0]
