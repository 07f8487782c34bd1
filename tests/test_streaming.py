"""Text while its ids come: the whole decode in the end, no broken character on the way."""

import functools
import json
import time

import hypothesis
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from test_tokenizer import hugging_face
from tiny_models import TEXT, tiny_tokenizer

from ctllm_jax.common.errors import UserError
from ctllm_jax.data.streaming import StopFinder, detokenizer, settled
from ctllm_jax.data.tokenizer import load_tokenizer

BROKEN = "\ufffd"
quick = hypothesis.settings(max_examples=150, deadline=None)


def with_prefix(folder):
    """SentencePiece as Llama-2 has it: a space before the text, which decoding takes away again."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=370,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["<|end|>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer(folder)


def byte_fallback(folder):
    """A tokenizer.json as Llama-2's: SentencePiece's pieces, decoded by other rules."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "水", "从前", "▁▁"]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    parts = tokenizers.decoders
    model.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.add_tokens(["<plain>"])
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return load_tokenizer(folder)


def byte_level(folder):
    return load_tokenizer(hugging_face(folder, lambda model: model.add_tokens(["<plain>", "水 "])))


@pytest.fixture(scope="module", params=["ours", "prefix", "fallback", "byte level"])
def tokenizer(request, tmp_path_factory):
    makers = {"prefix": with_prefix, "fallback": byte_fallback, "byte level": byte_level}
    folder = tmp_path_factory.mktemp("tokenizers") / request.param.replace(" ", "")
    return tiny_tokenizer() if request.param == "ours" else makers[request.param](folder)


@functools.cache
def alphabet(tokenizer) -> dict[str, list[int]]:
    """Ids by kind; where no id is a byte, those that hold a part of a character."""
    kinds: dict[str, list[int]] = {}
    for i, (kind, _) in enumerate(tokenizer.pieces()):
        kinds.setdefault(kind, []).append(i)
    return kinds


@functools.cache
def byte_ids(tokenizer) -> dict[int, int]:
    """Byte to id, where the vocabulary has such."""
    names = {name: i for i, (_, name) in enumerate(tokenizer.pieces())}
    return {byte: names[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in names}


def streamed(tokenizer, ids) -> list[str]:
    stream = detokenizer(tokenizer)
    return [*(stream.push(i) for i in ids), stream.finish()]


@quick
@hypothesis.given(data=st.data())
def test_any_ids_give_what_they_give_at_once(tokenizer, data):
    kinds = st.one_of([st.sampled_from(ids) for ids in alphabet(tokenizer).values()])  # each kind as often
    ids = data.draw(st.lists(kinds, max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@quick
@hypothesis.given(text=st.text(max_size=12), cut=st.integers(0, 3), between=st.booleans())
def test_characters_in_bytes_come_whole(tokenizer, text, cut, between):
    """Text spelled in bytes, with or without pieces of text between; then a character that is cut short."""
    spelled = byte_ids(tokenizer)
    hypothesis.assume(BROKEN not in text)
    word = tokenizer.encode("水")
    if spelled:
        ids = [i for c in text for i in [*(spelled[b] for b in c.encode()), *(word if between else [])]]
        ids += [spelled[b] for b in "😀".encode()[:cut]]
    else:
        ids = tokenizer.encode(text + "😀")
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert BROKEN not in "".join(parts[:-1])


@quick
@hypothesis.given(run=st.binary(max_size=24), random=st.randoms(use_true_random=False))
def test_random_bytes_settle_as_they_come(run, random):
    """Half of it valid UTF-8: what is certain at one point is never taken back."""
    text = "".join(random.choice("a水é😀") for _ in range(8)).encode()
    run = b"".join(random.sample([run[:12], text, run[12:]], 3))
    whole = "".join(pieces_of(run))
    for end in range(len(run) + 1):
        done = settled(run[:end])
        assert end - done < 4 and whole.startswith("".join(pieces_of(run[:done])))


def pieces_of(run: bytes):
    """SentencePiece's reading: a character, or U+FFFD for one byte."""
    while run:
        size = next((n for n in (1, 2, 3, 4) if _is_character(run[:n])), None)
        yield run[:size].decode() if size else BROKEN
        run = run[size or 1 :]


def _is_character(part: bytes) -> bool:
    try:
        return len(part.decode()) == 1
    except UnicodeDecodeError:
        return False


def test_the_cost_does_not_grow_with_what_came_before(tokenizer):
    """Ids that never make a character, ids without text, plain text: ten times the ids, about ten times the time."""
    kinds = alphabet(tokenizer)
    for own in (kinds["byte"][-3:], kinds["special"][:1], kinds["text"]):

        def seconds(count, own=own):
            stream, start = detokenizer(tokenizer), time.process_time()
            for place in range(count):
                stream.push(own[place % len(own)])
            stream.finish()
            return time.process_time() - start

        seconds(100)
        assert seconds(20_000) < 40 * seconds(2_000) + 0.05


def test_an_unknown_decoder_is_refused(tmp_path):
    def change(model):
        model.decoder = tokenizers.decoders.WordPiece()

    odd = load_tokenizer(hugging_face(tmp_path / "odd", change))
    with pytest.raises(UserError, match="WordPiece"):
        detokenizer(odd)


# ---- Stop strings


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is to come out: up to the stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - len(max(matches, key=len))], True
    return text, False


@quick
@hypothesis.given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 7), min_size=30, max_size=30),
)
def test_nothing_of_a_stop_string_comes_out_however_the_text_is_cut(text, stops, sizes):
    finder, out, place = StopFinder(stops), "", 0
    wanted, found = cut(text, stops)
    for size in sizes:
        out += finder.push(text[place : place + size])
        place += size
        assert wanted.startswith(out)
        if not any(text[:place].endswith(stop[:n]) for stop in stops for n in range(1, len(stop))):
            assert out == cut(text[:place], stops)[0]  # nothing is held back in vain
    assert (out + finder.finish(), finder.found) == (wanted, found)
