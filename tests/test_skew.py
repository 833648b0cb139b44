"""Text tokenised one way for training and another for serving: told at fit, and at every row that arrives otherwise."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from conftest import preference_rows
from tokenizers.processors import TemplateProcessing

from rm_ood import OODGuard, TokenisationWarning
from rm_ood.preferences import Item
from rm_ood.skew import Ends, EndsCheck, grpo_difference
from rm_ood.text import Encoded, TextEncoder

BOS = "<|endoftext|>"


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that begins every text with a BOS of its own, as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = BOS
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.convert_tokens_to_ids(BOS))]
    )
    return tokenizer


@pytest.fixture(scope="module")
def bos_tokenizer(decoder_tokenizer: Any) -> Any:
    return with_bos(decoder_tokenizer)


def items(*texts: tuple[str, str]) -> list[Item]:
    return [Item(prompt, response, None, str(i), None, "x") for i, (prompt, response) in enumerate(texts)]


PAIRS = items(("What is it?", " A river."), ("Where?", " In the north, far from here."))


def encoded(*ids: int) -> Encoded:
    return Encoded(list(ids), None, 0, [], [], 0, ())


# -- at fit


@pytest.mark.parametrize(
    ("adds_bos", "options", "said"),
    [
        (False, {}, None),
        (False, {"append_eos": True}, r"\(ends it with <\|im_end\|>\)"),
        (True, {}, r"\(begins it with <\|endoftext\|>\)"),
        (True, {"append_eos": True}, r"\(begins it with <\|endoftext\|>, ends it with <\|im_end\|>\)"),
        (True, {"special_tokens": False}, None),
        (True, {"special_tokens": False, "append_eos": True}, r"\(ends it with <\|im_end\|>\)"),
    ],
)
def test_the_difference_from_grpo_is_told_and_only_where_there_is_one(
    decoder_tokenizer: Any, bos_tokenizer: Any, adds_bos: bool, options: dict[str, Any], said: str | None
) -> None:
    text = TextEncoder(bos_tokenizer if adds_bos else decoder_tokenizer, "plain", **options)
    difference = grpo_difference(text, PAIRS)
    if said is None:
        assert difference is None
    else:
        assert re.search(said + ".*special_tokens=False, append_eos=False", str(difference))
        assert "river" not in str(difference)


def test_the_difference_is_that_of_the_texts_themselves(decoder_tokenizer: Any, minilm: tuple[Any, Any]) -> None:
    ended = TextEncoder(decoder_tokenizer, "plain", append_eos=True)
    # Text that brings its end token is the same both ways.
    assert grpo_difference(ended, items(("What is it?", " A river.<|im_end|>"))) is None
    long = items(("word " * 5_000, " word" * 5_000))
    short = TextEncoder(decoder_tokenizer, "plain", append_eos=True, max_length=512)
    assert "ends it with" in str(grpo_difference(short, long))
    assert "begins it with [CLS], ends it with [SEP]" in str(grpo_difference(TextEncoder(minilm[1], "plain"), PAIRS))
    assert grpo_difference(ended, []) is None


# -- at every row


def test_the_ends_of_the_fit_items_are_counted(decoder_tokenizer: Any) -> None:
    bos, eos = decoder_tokenizer.bos_token_id, decoder_tokenizer.eos_token_id
    ends = Ends(decoder_tokenizer)
    for ids in ([bos, 5, eos], [bos, 6, eos], [7, 8], [bos, 9, 8]):
        ends.add(ids)
    record = ends.record()
    assert record == {"bos": 0.75, "eos": 0.5, "last": eos, "last_share": 0.5}
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("record", "rows", "flagged", "said"),
    [
        ({"bos": 1.0, "eos": 1.0}, [[1, 5, 2], [5, 2], [1, 5]], [0, 1, 1], "begin without BOS or end without EOS"),
        ({"bos": 0.0, "eos": 0.0}, [[5, 6], [1, 5], [5, 2]], [0, 1, 1], "begin with BOS or end with EOS"),
        ({"bos": 1.0, "eos": 1.0}, [[1, 5, 6]], [1], "end without EOS"),
        ({"bos": 1.0, "eos": 0.0}, [[1, 5, 2]], [1], "end with EOS"),
        # A habit of some of the fit items is no rule.
        ({"bos": 0.5, "eos": 0.9}, [[1, 5, 2], [5, 6]], [0, 0], None),
    ],
)
def test_rows_with_other_ends_than_the_fit_items_have_a_reason(
    decoder_tokenizer: Any, record: dict[str, float], rows: list[list[int]], flagged: list[int], said: str | None
) -> None:
    assert (decoder_tokenizer.bos_token_id, decoder_tokenizer.eos_token_id) == (1, 2)
    check = EndsCheck({"last": 2, "last_share": 1.0, **record}, decoder_tokenizer, "plain")
    expected = [("tokenised_unlike_fit",) if bad else () for bad in flagged]
    if said is None:
        assert check.encoded([encoded(*ids) for ids in rows]) == expected
        return
    with pytest.warns(TokenisationWarning, match=f"{sum(flagged)} of {len(rows)} rows .* they {said}"):
        assert check.encoded([encoded(*ids) for ids in rows]) == expected
    # Once told, it is told by the reasons alone.
    assert check.encoded([encoded(*ids) for ids in rows]) == expected


def test_a_chat_template_ends_every_item_with_its_own_token(decoder_tokenizer: Any) -> None:
    record = {"bos": 1.0, "eos": 0.0, "last": 198, "last_share": 1.0}
    chat = EndsCheck(record, decoder_tokenizer, "chat")
    with pytest.warns(TokenisationWarning, match="they end with another token than the chat template's"):
        assert chat.encoded([encoded(1, 5, 198), encoded(1, 5, 6)]) == [(), ("tokenised_unlike_fit",)]
    # Plain texts end with words, whatever the fit items happened to end with.
    plain = EndsCheck(record, decoder_tokenizer, "plain")
    assert plain.encoded([encoded(1, 5, 6)]) == [()]
    mixed = EndsCheck({**record, "last_share": 0.9}, decoder_tokenizer, "chat")
    assert mixed.encoded([encoded(1, 5, 6)]) == [()]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_are_judged_by_their_own_ends(decoder_tokenizer: Any, side: str) -> None:
    pad = decoder_tokenizer.pad_token_id
    assert pad == decoder_tokenizer.eos_token_id == 2
    rows, width = [[1, 5, 2], [1, 5, 6, 7, 8], [1, 1, 5, 2], [5, 2]], 5
    padding = [[pad] * (width - len(ids)) for ids in rows]
    nothing = [[0] * len(p) for p in padding]
    if side == "right":
        ids = [r + p for r, p in zip(rows, padding, strict=True)]
        mask = [[1] * len(r) + n for r, n in zip(rows, nothing, strict=True)]
    else:
        ids = [p + r for r, p in zip(rows, padding, strict=True)]
        mask = [n + [1] * len(r) for r, n in zip(rows, nothing, strict=True)]
    check = EndsCheck({"bos": 1.0, "eos": 1.0, "last": 2, "last_share": 1.0}, decoder_tokenizer, "plain")
    unlike = ("tokenised_unlike_fit",)
    with pytest.warns(TokenisationWarning, match="2 of 4 rows"):
        assert check.inputs(torch.tensor(ids), torch.tensor(mask)) == [(), unlike, ("doubled_bos",), unlike]
    # Without a mask an end token cannot be told from padding, so nothing is said of it.
    assert check.inputs(torch.tensor(ids), None) == [(), (), ("doubled_bos",), unlike]
    assert check.inputs(torch.tensor([[2, 2]]), None) == [()]


# -- in a guard


def make(model: Any, tokenizer: Any, **options: Any) -> OODGuard:
    return OODGuard(model, tokenizer, alpha=0.05, confidence=None, max_length=128, channels="final", **options)


def rows(n: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {**row, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]} for row in preference_rows(n, seed)
    ]


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_a_guard_fitted_the_training_way_knows_text_served_the_grpo_way(
    tiny_decoder: Any, bos_tokenizer: Any, tmp_path: Any
) -> None:
    model, _ = tiny_decoder
    guard = make(model, bos_tokenizer, append_eos=True)
    with pytest.warns(TokenisationWarning, match="begins it with .* ends it with .*For GRPO fit with") as told:
        guard.fit(rows(), calibration=0.5, progress=False)
    assert [w.filename for w in told] == [__file__]
    assert any("TRL's GRPOTrainer" in note for note in guard.report().to_dict()["fit"]["notes"])
    guard.save_pretrained(tmp_path / "guard")
    guard.detach()
    guard = OODGuard.from_pretrained(tmp_path / "guard", model, bos_tokenizer)
    texts = [(row["prompt"], row["chosen"]) for row in rows(4, seed=3)]
    trained = guard.encode(*map(list, zip(*texts, strict=True)))  # type: ignore[arg-type]
    assert guard(**trained).ood.reasons == ((),) * 4
    served = bos_tokenizer(
        [p + r for p, r in texts], return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    with pytest.warns(TokenisationWarning, match="4 of 4 rows are tokenised unlike the fit data") as told:
        out = guard(**served, prompt_end=trained["prompt_end"] - 1)
    assert told[0].filename == __file__
    assert out.ood.reasons == (("tokenised_unlike_fit",),) * 4
    # Once a guard.
    assert guard(**served, prompt_end=trained["prompt_end"] - 1).ood.reasons == out.ood.reasons
    doubled = {k: torch.cat([v[:, :1], v], 1) for k, v in trained.items() if k in ("input_ids", "attention_mask")}
    assert guard(**doubled, prompt_end=trained["prompt_end"] + 1).ood.reasons == (("doubled_bos",),) * 4


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_a_guard_fitted_the_grpo_way_is_quiet(tiny_decoder: Any, bos_tokenizer: Any) -> None:
    model, _ = tiny_decoder
    guard = make(model, bos_tokenizer, special_tokens=False).fit(rows(), calibration=0.5, progress=False)
    assert guard.report().to_dict()["fit"]["notes"] == []
    served = bos_tokenizer(["What is it? A river."], return_tensors="pt", add_special_tokens=False)
    assert guard(**served, prompt_end=torch.tensor([3])).ood.reasons == ((),)
    assert guard.check("What is it?", " A river.").reasons == ()
    guard.calibrate(rows(seed=5), progress=False)


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_text_without_the_end_token_that_the_fit_data_had_typed(tiny_decoder: Any) -> None:
    ended = [{**r, "chosen": r["chosen"] + "<|im_end|>", "rejected": r["rejected"] + "<|im_end|>"} for r in rows()]
    guard = make(*tiny_decoder).fit(ended, calibration=0.5, progress=False)
    with pytest.warns(TokenisationWarning, match="1 of 1 rows.*end without EOS") as told:
        decision = guard.check("What is it?", " A river.")
    assert told[0].filename == __file__
    assert decision.reasons == ("tokenised_unlike_fit",)
    assert guard.check("What is it?", " A river.<|im_end|>").reasons == ("special_tokens_in_text",)


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_chat_data_have_no_gap(tiny_decoder: Any, bos_tokenizer: Any) -> None:
    model, _ = tiny_decoder
    guard = make(model, bos_tokenizer, text_format="chat").fit(rows(), calibration=0.5, progress=False)
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A river."}]
    text = bos_tokenizer.apply_chat_template(messages, tokenize=False)
    served = bos_tokenizer([text], return_tensors="pt", add_special_tokens=False)
    assert guard(**served, prompt_end=torch.tensor([8])).ood.reasons == (("approximate_spans",),)
    assert guard.check("What is it?", "A river.").reasons == ()
    # The tokenizer's BOS before a template's text is the usual way to get one too many.
    with pytest.warns(TokenisationWarning, match="begin with BOS"):
        out = guard(**bos_tokenizer([text], return_tensors="pt"), prompt_end=torch.tensor([9]))
    assert out.ood.reasons == (("approximate_spans", "tokenised_unlike_fit"),)


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_a_guard_without_a_record_of_the_ends_judges_them_not(tiny_decoder: Any) -> None:
    guard = make(*tiny_decoder).fit(rows(), calibration=0.5, progress=False)
    del guard._fitted().record["ends"]  # type: ignore[attr-defined]
    guard._swap(guard._fitted())
    assert guard.check("What is it?", " A river.<|im_end|>").reasons == ("special_tokens_in_text",)
