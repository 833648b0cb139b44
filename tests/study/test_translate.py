"""Translation through a real Marian model (tiny, untrained) with a real SentencePiece vocabulary."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import sentence
from transformers import MarianConfig, MarianMTModel, MarianTokenizer

from rm_ood.canaries import SCRIPTS
from rm_ood.dialogue import parse_dialogue
from rm_ood.errors import InputError
from rm_ood.study import conditions, read_pairs
from rm_ood.study.translate import Translator, _halves, sentences, translated

RNG = random.Random(0)
ROWS = read_pairs(
    [
        {"prompt": f"{sentence(RNG)}. {sentence(RNG)}?", "chosen": sentence(RNG), "rejected": [sentence(RNG), sentence(RNG)]}
        for _ in range(4)
    ]
    + [
        {
            "prompt": f"\n\nHuman: {sentence(RNG)}\n\nAssistant: {sentence(RNG)}\n\nHuman: {sentence(RNG)}\n\nAssistant:",
            "chosen": " " + sentence(RNG),
            "rejected": sentence(RNG),
        }
    ]
)  # fmt: skip


def english() -> list[str]:
    rng = random.Random(0)
    return [sentence(rng) + ". " + sentence(rng) + "?" for _ in range(400)]


def unspaced(letters: str, n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(letters) for _ in range(n))


def letters_of(script: str) -> str:
    """Letters of a script, each with the marks that stand on it."""
    return "".join(sorted({c for pair in SCRIPTS[script] for text in pair for c in text if c.isalpha()}))


def make_model(folder: Path, seed: int, lines: list[str] | None = None) -> Path:
    """A Marian model with random weights and a vocabulary from lines of text, saved as the hub's are."""
    import sentencepiece

    folder.mkdir(parents=True)
    (folder / "text").write_text("\n".join(lines or english()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "source"), vocab_size=120 if lines is None else 200,
        hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    specials = ["</s>", "<unk>"]
    vocab = {
        piece: i for i, piece in enumerate([*specials, *(p for p in pieces if p not in (*specials, "<s>")), "<pad>"])
    }
    (folder / "vocab.json").write_text(json.dumps(vocab))
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes((folder / "source.model").read_bytes())
    tokenizer = MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"), model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=len(vocab), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, max_length=24,
        pad_token_id=vocab["<pad>"], eos_token_id=0, decoder_start_token_id=vocab["<pad>"], bos_token_id=0,
        forced_eos_token_id=0, init_std=1.0, num_beams=1,
    )  # fmt: skip
    model = MarianMTModel(config)
    # What an untrained decoder says hangs on its last word more than on the source.
    model.model.decoder.layers[0].encoder_attn.out_proj.weight.data *= 20
    model.generation_config.no_repeat_ngram_size = 1
    # A pad that is decoded would vanish from the text.
    model.generation_config.bad_words_ids = [[vocab["<pad>"]]]
    model.generation_config.max_length = 24
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("marian")
    return make_model(folder / "opus-mt-en-de", 1), make_model(folder / "opus-mt-de-en", 2)


@torch.inference_mode()
def alone(folder: Path, text: str) -> str:
    """One sentence through the plain transformers calls."""
    tokenizer = MarianTokenizer.from_pretrained(folder)
    model = MarianMTModel.from_pretrained(folder).eval()
    out = model.generate(**tokenizer([text], return_tensors="pt"))
    return str(tokenizer.batch_decode(out, skip_special_tokens=True)[0]).strip()


def test_sentences_are_translated_one_by_one(models: tuple[Path, Path]) -> None:
    translator = Translator(models[0], batch_size=3)
    text = "the answer river. music paper garden?\n\nwindow seven orange"
    new = translator([text, "quiet small", ""])
    expected = [
        alone(models[0], s) for s in ("the answer river.", "music paper garden?", "window seven orange", "quiet small")
    ]
    assert len(set(expected)) == 4
    assert new == [f"{expected[0]} {expected[1]}\n\n{expected[2]}", expected[3], ""]


def test_long_sentences_are_cut_at_words_and_every_word_is_read(models: tuple[Path, Path]) -> None:
    translator = Translator(models[0])
    long = " ".join(sentence(random.Random(i), 9, 9) for i in range(30))
    pieces = translator._sentences(long)
    assert len(pieces) > 4
    assert " ".join(pieces) == long
    assert all(len(translator.tokenizer(piece)["input_ids"]) <= 64 for piece in pieces)
    assert translator([long])[0]


@pytest.fixture(scope="module")
def eastern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows Chinese and Thai letters: each is a token or so."""
    pytest.importorskip("sentencepiece")
    lines = [unspaced(letters_of(script), 30, seed) for script in ("CJK", "THAI") for seed in range(200)]
    return make_model(tmp_path_factory.mktemp("eastern") / "opus-mt-zh-en", 3, [line + "，。" for line in lines])


@pytest.mark.parametrize("script", ["CJK", "THAI"])
def test_long_sentences_without_spaces_are_read_to_their_end(eastern: Path, script: str) -> None:
    translator = Translator(eastern)
    text = unspaced(letters_of(script), 400)
    assert len(translator.tokenizer(text)["input_ids"]) > 128
    pieces = translator._sentences(text)
    assert "".join(pieces) == text
    assert all(len(translator.tokenizer(piece)["input_ids"]) <= 64 for piece in pieces)
    # Nothing is cut down to crumbs either.
    assert len(pieces) <= 2 * len(translator.tokenizer(text)["input_ids"]) / 32
    assert translator([text])[0] == " ".join(alone(eastern, piece) for piece in pieces)
    changed = translator([text[:-8] + unspaced(letters_of(script), 8, seed=9)])[0]
    assert changed != translator([text])[0]


def test_a_long_sentence_without_spaces_is_cut_at_its_pauses(eastern: Path) -> None:
    translator = Translator(eastern)
    clauses = [unspaced(letters_of("CJK"), 20, seed) + "，" for seed in range(12)]
    pieces = translator._sentences("".join(clauses))
    assert len(pieces) > 3
    assert all(piece.endswith("，") for piece in pieces)
    assert "".join(pieces) == "".join(clauses)


def test_marks_stay_with_their_letters_and_white_space_alone_is_lost() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab ก\u0e34\u0e48，") for _ in range(rng.randint(2, 30))).strip()
        if len(text) > 1:
            halves = _halves(text)
            assert "".join("".join(halves).split()) == "".join(text.split())
            assert len(max(halves, key=len)) < len(text)
    marked = "ก\u0e34\u0e48" * 9
    assert all(not half.startswith(("\u0e34", "\u0e48")) for half in _halves(marked))
    assert _halves("a\u0301\u0301\u0301") == ["a\u0301", "\u0301\u0301"]


def test_the_papers_four_conditions(models: tuple[Path, Path]) -> None:
    found = list(conditions(ROWS, [f"translate={models[0]}"]))
    assert [(c.name, c.side, c.severity, c.paired) for c in found] == [
        ("opus-mt-en-de", "prompt", None, True),
        ("opus-mt-en-de", "response", None, True),
        ("opus-mt-en-de", "both", None, True),
        ("opus-mt-en-de, back", "both", None, True),
    ]
    prompt, response, both, back = (c.rows for c in found)
    there = Translator(models[0])
    for old, p, r, b in zip(ROWS, prompt, response, both, strict=True):
        assert p.responses == old.responses
        assert r.prompt == old.prompt
        assert (b.prompt, b.responses) == (p.prompt, r.responses)
        assert b.chosen != old.chosen
        assert str(b.chosen).strip() == there([str(old.chosen).strip()])[0]
        assert (b.id, b.cluster) == (old.id, old.cluster)
    home = Translator(models[1])
    assert [str(row.chosen).strip() for row in back] == home([str(row.chosen).strip() for row in both])
    dialogue = [[m["role"] for m in parse_dialogue(str(row.prompt)) or []] for row in (ROWS[-1], both[-1], back[-1])]
    assert dialogue == [["user", "assistant", "user"]] * 3


def test_sides_and_models_back_can_be_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    def cells(spec: str) -> list[tuple[str, str]]:
        return [(c.name, c.side) for c in conditions(ROWS[:1], [spec])]

    assert cells(f"translate={models[0]}:response") == [("opus-mt-en-de", "response")]
    assert cells(f"translate={models[0]}:back") == [("opus-mt-en-de, back", "both")]
    assert cells(f"translate={models[0]},{models[1]}:back") == [("opus-mt-en-de, back", "both")]
    other = tmp_path / "mine"
    other.symlink_to(models[0])
    assert [side for _, side in cells(f"translate={other}")] == ["prompt", "response", "both"]
    with pytest.raises(InputError, match="no model back: name it"):
        cells(f"translate={other}:back")
    for wrong in (":answer", ":prompt:both", ""):
        spec = f"translate={models[0]}{wrong}" if wrong else "translate="
        with pytest.raises(InputError, match=r"expected translate=MODEL\[,MODEL_BACK\]\[:SIDE\]"):
            conditions(ROWS, [spec])


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentencepiece")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"translate=.*nothing: no Marian model"):
        next(translated(ROWS, str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("One here. Two there! Three?", ["One here.", "Two there!", "Three?"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("Dr. Smith met Mrs. Jones. They talked, e.g. of 3.5.", ["Dr. Smith met Mrs. Jones.", "They talked, e.g. of 3.5."]),
        ("今天天气很好。我们走吧！好吗？", ["今天天气很好。", "我们走吧！", "好吗？"]),
        ("他说：“好。”我走了！！真的吗？！好", ["他说：“好。”", "我走了！！", "真的吗？！", "好"]),
        ("ဒီနေ့ကောင်းတယ်။သွားမယ်။", ["ဒီနေ့ကောင်းတယ်။", "သွားမယ်။"]),
        ("no end", ["no end"]),
        ("  ", []),
        ("Wait... What? (Yes.) Ok", ["Wait...", "What?", "(Yes.)", "Ok"]),
        ("J. K. Rowling wrote it.", ["J. K. Rowling wrote it."]),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_ends_them(line: str, expected: list[str]) -> None:
    assert sentences(line) == expected


def test_no_character_of_a_line_is_lost() -> None:
    rng = random.Random(0)
    for _ in range(200):
        line = "".join(rng.choice("ab. !?。\"') AB…1") for _ in range(40))
        assert "".join("".join(sentences(line)).split()) == "".join(line.split())
