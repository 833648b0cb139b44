"""SGLang and vLLM clients against a stand-in server that replays the documented JSON of SGLang 0.5.23 and vLLM 0.33."""

from __future__ import annotations

import copy
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from engine_server import Engine
from safetensors.torch import save_file

from rm_ood import Decision, Decisions, EngineError, InputError, MismatchError, NotFittedError, OODGuard
from rm_ood.integrations import transport
from rm_ood.integrations.engines import SGLangScorer, VLLMScorer
from rm_ood.integrations.model_files import model_files
from rm_ood.integrations.vllm_plugin import GuardedClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::rm_ood.TokenisationWarning"),
]

MESSAGES = [{"role": "user", "content": "name a river"}, {"role": "assistant", "content": "the Elbe"}]


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
    with Engine(shared_decoder, shared_decoder.score) as engine:
        yield engine


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
    decoder_tokenizer.save_pretrained(tmp_path / "tokenizer")
    files = model_files(str(tmp_path / "tokenizer"))
    assert files.max_length is None
    lacking = r"a limit of 512 tokens, the tokenizer names none.*as max_length=.*config\.json into the --model folder"
    with pytest.raises(MismatchError, match=lacking):
        SGLangScorer(engine.url, alone, files.tokenizer, max_length=files.max_length)
    shared_decoder.config.save_pretrained(tmp_path / "tokenizer")
    assert model_files(str(tmp_path / "tokenizer")).max_length == 512


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
    del old.state.identity.fields["pad_token_id"]  # type: ignore[attr-defined]
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
    engine.spoil = lambda reply: {**reply, "pooled_hidden_states": [[None] * 32]}
    with SGLangScorer(engine.url, vectors, decoder_tokenizer, head=(weight, None)) as scorer:
        assert scorer.check("one two", "three").reasons == ("non_finite",)
        engine.spoil = lambda reply: {**reply, "scores": [[None]]}
        assert scorer.check("one two", "three").reasons == ("non_finite",)


# -- what cannot be scored is flagged, or nothing is


@pytest.mark.parametrize("name", ["sglang", "vllm_scorer"])
@pytest.mark.parametrize(
    ("where", "bad"),
    [(w, b) for w in ("vector", "reward") for b in (None, float("nan"), float("inf"), -float("inf"))]
    + [("vector", 1e300)],
)
def test_numbers_that_are_none_flag_their_item_alone(
    name: str, where: str, bad: float | None, request: Any, engine: Engine, final: OODGuard
) -> None:
    def spoil(reply: dict[str, Any]) -> dict[str, Any]:
        if name == "vllm_scorer":
            reply["data"][1]["probs"][0 if where == "vector" else -1] = bad
        elif where == "vector":
            reply["pooled_hidden_states"][1][3] = bad
        else:
            reply["scores"][1] = [bad]
        return reply

    engine.spoil = spoil
    scorer = request.getfixturevalue(name)
    got = scorer.check(["one two"] * 3, ["three", "four", "five"])
    assert got.reasons == ((), ("non_finite",), ())
    assert got.is_ood.tolist() == [False, True, False]
    assert np.isfinite(got.p_values).all()
    # The smallest that this calibration can give.
    assert got.p_values[1] == final.check_embeddings(np.full((1, 32), np.nan)).p_values[0]
    others = final.check(["one two"] * 2, ["three", "five"])
    np.testing.assert_array_equal(got.p_values[[0, 2]], others.p_values)


def _vectors(reply: dict[str, Any], change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    return {**reply, "pooled_hidden_states": change(reply["pooled_hidden_states"])}


def _scores(reply: dict[str, Any], change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    return {**reply, "scores": change(reply["scores"])}


SPOILT_SGLANG: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "an older engine": (
        lambda r: {k: v for k, v in r.items() if k != "pooled_hidden_states"}, EngineError, r"no pooled_hidden_states\. .*22427"
    ),
    "null vectors": (lambda r: _vectors(r, lambda h: None), EngineError, "not for cross-encoders"),
    "a null vector": (lambda r: _vectors(r, lambda h: [h[0], None]), EngineError, "no pooled_hidden_states"),
    "one vector": (lambda r: _vectors(r, lambda h: h[:1]), EngineError, "2 items were sent, the reply has 1"),
    "a table": (lambda r: _vectors(r, lambda h: {"0": h}), EngineError, "the reply has dict"),
    "ragged": (lambda r: _vectors(r, lambda h: [h[0], h[1][:-1]]), EngineError, "all of one length"),
    "flat": (lambda r: _vectors(r, lambda h: h[0][:2]), EngineError, "one list of numbers per item"),
    "empty": (lambda r: _vectors(r, lambda h: [[], []]), EngineError, "one list of numbers per item"),
    "text": (lambda r: _vectors(r, lambda h: [["1.0"] * 32] * 2), EngineError, "no number"),
    "bools": (lambda r: _vectors(r, lambda h: [[True] * 32] * 2), EngineError, "no number"),
    "a huge integer": (lambda r: _vectors(r, lambda h: [[10**400] * 32] * 2), EngineError, "too large for a float"),
    "narrow": (lambda r: _vectors(r, lambda h: [v[:-1] for v in h]), MismatchError, "31 features, the guard was fitted on 32"),
    "scores missing": (lambda r: _scores(r, lambda s: None), EngineError, "scores: 2 items were sent, the reply has NoneType"),
    "one score": (lambda r: _scores(r, lambda s: s[:1]), EngineError, "scores: 2 items"),
    "labels": (lambda r: _scores(r, lambda s: [v * 3 for v in s]), MismatchError, "3 numbers per item"),
    "packed items": (lambda r: {**r, "usage": {"prompt_tokens": 12}}, EngineError, "8 tokens .* counts 12 .*--enable-mis"),
    "no count": (lambda r: {**r, "usage": None}, EngineError, "the engine counts None"),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", SPOILT_SGLANG)
def test_a_reply_of_sglang_that_is_not_as_documented_scores_nothing(
    spoilt: str, sglang: SGLangScorer, engine: Engine
) -> None:
    engine.spoil, error, message = SPOILT_SGLANG[spoilt]
    with pytest.raises(error, match=message):
        sglang.check(["one two"] * 2, ["three"] * 2)


def _probs(reply: dict[str, Any], change: Callable[[list[float]], list[Any]]) -> dict[str, Any]:
    return {**reply, "data": [{**row, "probs": change(row["probs"])} for row in reply["data"]]}


SPOILT_VLLM: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no plugin": (lambda r: _probs(r, lambda p: p[-1:]), MismatchError, "got 1 others. Start vLLM with RM_OOD_GUARD"),
    "an activation": (lambda r: _probs(r, lambda p: torch.tensor(p).sigmoid().tolist()), MismatchError, "an activation"),
    "a shift": (lambda r: _probs(r, lambda p: [v - 0.5 for v in p]), MismatchError, "logit_mean"),
    "another guard": (lambda r: _probs(r, lambda p: [*p[:2], p[2] + 1, p[3]]), MismatchError, "of this guard"),
    "no data": (lambda r: {**r, "data": None}, EngineError, "no list of objects `data`"),
    "strings": (lambda r: {**r, "data": ["a", "b"]}, EngineError, "no list of objects `data`"),
    "one item": (lambda r: {**r, "data": r["data"][:1]}, EngineError, "2 items were sent, 1 came back"),
    "twice the same": (lambda r: {**r, "data": [r["data"][0]] * 2}, EngineError, "not each of them once"),
    "no numbers": (lambda r: _probs(r, lambda p: [str(v) for v in p]), EngineError, "probs: holds something"),
    "cut prompts": (lambda r: {**r, "usage": {"prompt_tokens": 7}}, EngineError, "8 tokens were sent, the engine counts 7"),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", SPOILT_VLLM)
def test_a_reply_of_vllm_that_is_not_as_documented_scores_nothing(
    spoilt: str, vllm_scorer: VLLMScorer, engine: Engine
) -> None:
    engine.spoil, error, message = SPOILT_VLLM[spoilt]
    with pytest.raises(error, match=message):
        vllm_scorer.check(["one two"] * 2, ["three"] * 2)


def test_items_of_vllm_are_told_by_their_index(vllm_scorer: VLLMScorer, engine: Engine) -> None:
    items = ["one two"] * 3, ["three", "four five", "six"]
    expected = vllm_scorer.check(*items)
    engine.spoil = lambda reply: {**reply, "data": reply["data"][::-1]}
    np.testing.assert_array_equal(vllm_scorer.check(*items).rewards, expected.rewards)


# -- the way there and back

SECRET = "a most private question"


def _send(status: int, data: bytes, **headers: str) -> Callable[[Any], bool]:
    def raw(handler: Any) -> bool:
        handler.reply(status, data, **headers)
        return True

    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (_send(200, b"<html>"), "answered 200 with 6 bytes that are not JSON"),
        (_send(200, b"[" * 100_000), "not JSON"),
        (_send(200, b'\xff{"a": 1}'), "not JSON"),
        (_send(200, b"[1]"), "a JSON list, expected an object"),
        (
            _send(302, b"", Location="http://127.0.0.1:1/steal"),
            "answered 302. It redirects elsewhere, and nothing was sent",
        ),
        (_send(307, b"", Location="/v1/score"), "answered 307"),
        (_send(400, SECRET.encode()), "answered 400. The engine refuses"),
        (_send(404, b"{}"), "404: another server"),
        (_send(500, SECRET.encode()), "answered 500. The engine failed on it"),
        (_send(201, b"{}"), "answered 201. Expected 200."),
        (_send(200, b"{}", Content_Encoding="gzip"), r"its answer not be read \(DecodingError\)"),
        (_send(200, b"[" + b"1," * 10**6 + b"1]"), r"more than the \d+ bytes that a reply of this many items can take"),
    ],
)
def test_answers_that_are_none(
    raw: Callable[[Any], bool], message: str, engine: Engine, sglang: SGLangScorer, caplog: Any
) -> None:
    engine.raw = raw
    with pytest.raises(EngineError, match=message) as error:
        sglang.check(SECRET, "yes")
    assert len(engine.requests) == 1
    shown = str(error.value) + str(error.value.__cause__) + caplog.text
    assert SECRET not in shown
    assert str(engine.requests[0][1]["items"][0])[1:-1] not in shown


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(transport.time, "sleep", taken.append)
    return taken


def test_a_busy_engine_is_asked_again(
    engine: Engine, vectors: OODGuard, decoder_tokenizer: Any, naps: list[float]
) -> None:
    with SGLangScorer(engine.url, vectors, decoder_tokenizer, retries=2) as scorer:
        engine.statuses = [429, 503]
        assert isinstance(scorer.check("one two", "three"), Decision)
        assert len(engine.requests) == 3
        assert naps == [0.25, 0.5]
        engine.statuses = [503] * 9
        with pytest.raises(EngineError, match=r"answered 503, busy; 3 tries\. Is the engine running there\?"):
            scorer.check("one two", "three")
        assert len(engine.requests) == 6
        # An error is final.
        engine.statuses = [500, 200]
        with pytest.raises(EngineError, match="answered 500"):
            scorer.check("one two", "three")
        assert len(engine.requests) == 7


@pytest.mark.parametrize(
    ("asked", "wait"), [("7", 7.0), ("9999", 30.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.25), ("-3", 0.25)]
)
def test_the_engine_may_ask_to_wait_but_not_forever(
    asked: str, wait: float, engine: Engine, vectors: OODGuard, decoder_tokenizer: Any, naps: list[float]
) -> None:
    engine.raw = lambda handler: len(engine.requests) == 1 and _send(503, b"", Retry_After=asked)(handler)
    with SGLangScorer(engine.url, vectors, decoder_tokenizer) as scorer:
        scorer.check("one two", "three")
    assert naps == [wait]


def test_a_connection_that_is_lost_is_made_again(
    engine: Engine, vectors: OODGuard, decoder_tokenizer: Any, naps: list[float]
) -> None:
    def drop(handler: Any) -> bool:
        if len(engine.requests) > 2:
            return False
        if len(engine.requests) == 2:
            # Half an answer.
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"scores"')
        handler.close_connection = True
        return True

    engine.raw = drop
    with SGLangScorer(engine.url, vectors, decoder_tokenizer) as scorer:
        assert isinstance(scorer.check("one two", "three"), Decision)
    assert len(engine.requests) == 3


def test_nobody_there(vectors: OODGuard, decoder_tokenizer: Any, naps: list[float]) -> None:
    # Bound and not listening: refused, and taken by nobody else meanwhile.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with (
            SGLangScorer(
                f"http://me:secret@127.0.0.1:{port}/?key=secret", vectors, decoder_tokenizer, retries=1
            ) as scorer,
            pytest.raises(
                EngineError, match=rf"^http://127\.0\.0\.1:{port}/v1/score could not be reached.*; 2 tries"
            ) as error,
        ):
            scorer.check("one two", "three")
    assert "secret" not in str(error.value)


def test_a_host_that_does_not_take_the_connection(sglang: SGLangScorer, naps: list[float]) -> None:
    import httpx2

    def silent(request: Any) -> Any:
        raise httpx2.ConnectTimeout("silence")

    sglang.close()
    sglang._client._client = httpx2.Client(transport=httpx2.MockTransport(silent))
    sglang._client.retries = 1
    with pytest.raises(EngineError, match="did not take the connection in time; 2 tries"):
        sglang.check("one two", "three")


def test_an_engine_that_takes_too_long(engine: Engine, vectors: OODGuard, decoder_tokenizer: Any) -> None:
    done = threading.Event()
    engine.raw = lambda handler: done.wait(10)
    with SGLangScorer(engine.url, vectors, decoder_tokenizer, timeout=0.2) as scorer:
        with pytest.raises(EngineError, match=r"took longer than the timeout\. Raise timeout="):
            scorer.check("one two", "three")
        done.set()
    assert len(engine.requests) == 1


def test_headers_and_a_path_below_the_address(engine: Engine, vectors: OODGuard, decoder_tokenizer: Any) -> None:
    headers = {"Authorization": "Bearer key"}
    with SGLangScorer(engine.url + "/rm/", vectors, decoder_tokenizer, headers=headers, retries=0) as scorer:
        engine.raw = _send(200, b"{}")
        with pytest.raises(EngineError):
            scorer.check("one two", "three")
    path, _, sent = engine.requests[0]
    assert path == "/rm/v1/score"
    assert sent["Authorization"] == "Bearer key"


def test_a_failure_half_way_scores_nothing(sglang: SGLangScorer, engine: Engine) -> None:
    sglang.batch_size = 1
    engine.statuses = [200, 500]
    with pytest.raises(EngineError):
        sglang.check(["one two"] * 3, ["three"] * 3)


# -- what cannot work is refused before anything is sent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:30000"}, "got the scheme 'localhost'"),
        ({"url": "ftp://host"}, "got the scheme 'ftp'"),
        ({"url": "http://"}, "expected http://host:port"),
        ({"url": "http://[::1"}, "no address at all"),
        ({"url": None}, "no address at all"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"retries": -1}, "retries=-1"),
        ({"retries": True}, "retries=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, vectors: OODGuard, decoder_tokenizer: Any) -> None:
    with pytest.raises(InputError, match=message):
        SGLangScorer(**{"url": "http://127.0.0.1:1", "guard": vectors, "tokenizer": decoder_tokenizer, **options})


def test_guards_that_an_engine_cannot_serve(
    vectors: OODGuard, folder: Path, decoder_tokenizer: Any, minilm: Any
) -> None:
    url = "http://127.0.0.1:1"
    for changes, message in (
        ({"channels": ("response/mean@0.67",)}, "without 'final'|channels='final'"),
        ({"read_out": "first"}, "the engines pool the last"),
        ({"text_format": "pair"}, "text pairs"),
    ):
        guard = OODGuard.from_pretrained(folder)
        guard._state = guard.state.with_settings(changes)
        with pytest.raises(InputError, match=message):
            SGLangScorer(url, guard, decoder_tokenizer)
    guard = OODGuard.from_pretrained(folder)
    guard._state = replace(guard.state, table=None, _profiles={})
    with pytest.raises(NotFittedError, match="not calibrated"):
        SGLangScorer(url, guard, decoder_tokenizer)
    with pytest.raises(NotFittedError, match="not fitted"):
        SGLangScorer(url, OODGuard(None, None), decoder_tokenizer)
    with pytest.raises(MismatchError, match=r"tokenizer: differs .* in \['tokenizer', 'special_tokens'"):
        SGLangScorer(url, vectors, minilm[1])
    other = copy.deepcopy(decoder_tokenizer)
    other.chat_template = "{{ messages[0].content }}"
    with pytest.raises(MismatchError, match=r"in \['chat_template'\]"):
        SGLangScorer(url, vectors, other)
    with pytest.raises(MismatchError, match="a limit of 64 tokens, not max_length=32"):
        SGLangScorer(url, vectors, decoder_tokenizer, max_length=32)


def test_without_the_client_library(vectors: OODGuard, decoder_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(InputError, match=r"needs httpx2: pip install 'rm_ood\[engines\]'"):
        SGLangScorer("http://127.0.0.1:1", vectors, decoder_tokenizer)


def test_threads_share_a_client(sglang: SGLangScorer) -> None:
    items = texts()
    expected = sglang.check(*items)
    found: dict[int, Decisions] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: sglang.check(*items)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in found.values():
        np.testing.assert_array_equal(got.rewards, expected.rewards)
    assert len(found) == 4
