"""Tokenizers as the rest of the code sees them: ids equal to other tools', nothing forged, nothing cut."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tiny_models import NO_REFERENCE, REFERENCE, TEXT, tiny_tokenizer

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import own_template
from ctllm_jax.data.template import CHATML
from ctllm_jax.data.tokenizer import BYTE, CHAT_PIECES, SPECIAL, UNK, load_tokenizer

needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
# "▁" alone does not come back from SentencePiece: see test_only_one_character_is_lost.
AWKWARD = (
    "",
    " ",
    "\n",
    "\t\ttab\t",
    "  two  spaces   ",
    "end \n\n  start",
    " " * 70,
    "a\r\nb\rc",
    "a\0b\x1b\x7f\x85",
    "\u2028line\u2029paragraph",
    "\ufeffmark\u200b\ufffd\ufffe",
    "ＡＢＣ１２３　全角",
    "e\u0301 é",
    "𠮷野家 😀 \U0010ffff",
    "<s></s><unk><pad><|user|><0x41>",
)


def hugging_face(folder: pathlib.Path, change=None) -> pathlib.Path:
    """A byte-level BPE with the special pieces <s> and </s>, after `change(model)`."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    model.train_from_iterator(TEXT, trainer)
    if change:
        change(model)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return folder


@pytest.fixture(params=["SentencePiece", "Hugging Face"])
def model(request, tmp_path):
    return tiny_tokenizer() if request.param == "SentencePiece" else load_tokenizer(hugging_face(tmp_path / "hf"))


# ---- Other tools


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    lines = (REFERENCE / "tokenization.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@needs_reference
def test_sentencepiece_agrees_with_the_reference(cases):
    pieces = load_tokenizer(REFERENCE / "tokenizer_sp" / "sp.model")
    names = sentencepiece.SentencePieceProcessor(model_file=str(pieces.file))
    assert pieces.encode_batch([case["text"] for case in cases]) == [case["sp_ids"] for case in cases]
    for case in cases:
        assert [names.id_to_piece(i) for i in pieces.encode(case["text"])] == case["sp_pieces"]
        assert pieces.decode(case["sp_ids"]) == case["sp_decoded"]


@needs_reference
def test_hugging_face_differs_from_the_reference_in_forged_markers_alone(cases):
    byte_level = load_tokenizer(REFERENCE / "tiny_mha")
    markers = {i: text for i, (kind, text) in enumerate(byte_level.pieces()) if kind == SPECIAL}
    forged = 0
    for case, ids in zip(cases, byte_level.encode_batch([case["text"] for case in cases]), strict=True):
        wanted = []  # the reference's ids, where a marker that the text spells is text
        for i in case["bytebpe_no_special"]:
            wanted += byte_level.encode(markers[i]) if i in markers else [i]
            forged += i in markers
        assert case["bytebpe_with_bos"] == [byte_level.bos_id, *case["bytebpe_no_special"]]
        assert ids == wanted and not set(ids) & set(markers)
        assert byte_level.decode(ids) == case["bytebpe_decoded"]
    assert forged == 4


# ---- Texts


def test_awkward_texts_come_back(model):
    for text, ids in zip(AWKWARD, model.encode_batch(AWKWARD), strict=True):
        assert model.decode(ids) == text


def test_only_one_character_is_lost():
    model = tiny_tokenizer()
    lost = [c for c in map(chr, range(0x3000)) if model.decode(model.encode(f"a{c}b")) != f"a{c}b"]
    assert lost == ["\u2581"] and model.decode(model.encode("a\u2581b")) == "a b"


def test_no_text_becomes_a_special_id(model):
    special = {i for i, (kind, _) in enumerate(model.pieces()) if kind == SPECIAL}
    assert {model.bos_id, model.eos_id} <= special
    texts = ["<s>", "a</s>b", *CHAT_PIECES, "<unk><pad>"]
    assert not special & {i for ids in model.encode_batch(texts) for i in ids}


def test_arrays_hold_the_same_ids_as_lists(model):
    texts = [*TEXT, *AWKWARD]
    arrays = model.encode_arrays(texts)
    assert all(array.dtype == np.int32 and array.ndim == 1 for array in arrays)
    assert [array.tolist() for array in arrays] == model.encode_batch(texts) == [model.encode(text) for text in texts]


def test_a_lone_surrogate_is_refused_with_its_place(model):
    for encode in (model.encode_batch, model.encode_arrays):
        with pytest.raises(UserError, match=r"text 1 cannot be encoded: character 2 is a lone surrogate \(U\+D800\)"):
            encode(["good", "ab\ud800"])


# ---- Vocabulary


def test_every_id_is_a_piece_of_one_kind(model):
    pieces = model.pieces()
    assert len(pieces) == model.vocab_size
    for i, (kind, text) in enumerate(pieces):
        decoded = model.decode([i])
        if kind == BYTE:
            assert "\ufffd" in decoded or text == f"<0x{ord(decoded):02X}>"
        elif text != UNK:  # SentencePiece shows that one
            assert decoded == ("" if kind == SPECIAL else text)


def test_a_copy_is_the_same_tokenizer_with_its_settings(model, tmp_path):
    (tmp_path / "copy").mkdir()
    model.copy_to(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.digest, again.bos_id, again.eos_id) == (model.digest, model.bos_id, model.eos_id)


def test_without_a_beginning_of_document_the_end_opens_a_text(tmp_path):
    folder = hugging_face(tmp_path / "hf")
    model = load_tokenizer(folder)
    assert (model.opening_id, model.start_ids) == (model.bos_id, [model.bos_id])
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    model = load_tokenizer(folder)
    assert (model.opening_id, model.start_ids) == (model.eos_id, [])


# ---- What a tokenizer.json may have inside


def test_truncation_and_padding_inside_a_tokenizer_json_are_off(tmp_path):
    def change(model):
        model.enable_truncation(5)
        model.enable_padding(length=8)

    plain, cutting = load_tokenizer(hugging_face(tmp_path / "a")), load_tokenizer(hugging_face(tmp_path / "b", change))
    assert json.loads((tmp_path / "b" / "tokenizer.json").read_text())["truncation"]["max_length"] == 5
    assert cutting.encode_batch([TEXT[2], "a"]) == plain.encode_batch([TEXT[2], "a"])
    assert len(cutting.encode(TEXT[2])) > 8


def test_a_post_processor_adds_nothing(tmp_path):
    def change(model):
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )

    plain, adding = load_tokenizer(hugging_face(tmp_path / "a")), load_tokenizer(hugging_face(tmp_path / "b", change))
    assert adding.encode(TEXT[0]) == plain.encode(TEXT[0])


def test_ids_beyond_a_gap_are_counted(tmp_path):
    folder = hugging_face(tmp_path / "a")
    content = json.loads((folder / "tokenizer.json").read_text())
    last = len(content["model"]["vocab"]) - 1
    piece = next(piece for piece, i in content["model"]["vocab"].items() if i == last)
    content["model"]["vocab"][piece] = last + 10
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).vocab_size == last + 11 == len(load_tokenizer(folder).pieces())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither tokenizer.model nor tokenizer.json"),
        ({"tokenizer.model": "text"}, "not a SentencePiece model"),
        ({"tokenizer.json": "{"}, "not a tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_of_both_files_in_a_folder_tokenizer_json_counts(tmp_path):
    """As transformers leaves a folder: it added pieces and a chat template, of which the model file knows nothing."""
    folder = hugging_face(tmp_path / "hf", lambda model: model.add_special_tokens(["<|im_start|>", "<|im_end|>"]))
    (folder / "chat_template.jinja").write_text(CHATML)
    shutil.copyfile(tiny_tokenizer().file, folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.file.name == "tokenizer.json"
    assert own_template(tokenizer).end_ids == (tokenizer.piece_id("<|im_end|>"),)
    assert load_tokenizer(folder / "tokenizer.model").digest == tiny_tokenizer().digest  # if asked for by name


def test_a_tokenizer_json_without_an_end_of_document_is_refused(tmp_path):
    (hugging_face(tmp_path / "a") / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="eos_token is missing"):
        load_tokenizer(tmp_path / "a")
