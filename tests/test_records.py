"""Instruction and preference records: every format, good and bad, and every way in which a file can be broken."""

import collections
import gzip
import json
import pathlib
import subprocess
import sys
import zlib

import pytest
from tiny_models import write_jsonl
from tiny_records import say

from ctllm_jax.common.errors import UserError
from data_pipeline import damage, records
from data_pipeline.formats import FORMATS, UNKNOWN_FORMAT
from data_pipeline.records import check_chat, check_preference, read_records

SYSTEM = {"role": "system", "content": "be brief"}
PROMPT = [{"from": "human", "value": "q"}]


def read_one(tmp_path, record: dict, check=check_chat) -> list[dict]:
    """The records that one record gives; its rejection raises AssertionError with the reason."""
    found = read_records([str(write_jsonl(tmp_path / "own.jsonl", [record]))], check)
    assert not found.rejected, found.rejected[0]["reason"]
    return found.kept


# ---- Formats

CHATS = [  # record, its messages
    ({"messages": say("q", "a")}, say("q", "a")),
    ({"messages": [{"role": "system", "content": ""}, *say("q", "a")]}, say("q", "a")),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, say("", "a")[1]]}, say("q", "a")),
    ({"messages": say("q", "a"), "label": True}, say("q", "a")),
    ({"messages": say("q", "a"), "system": "be brief"}, [SYSTEM, *say("q", "a")]),
    ({"messages": [SYSTEM, *say("q", "a")], "system": "be brief"}, [SYSTEM, *say("q", "a")]),
    ({"instruction": "q", "output": "a"}, say("q", "a")),
    ({"instruction": "q", "input": "", "output": "a", "system": ""}, say("q", "a")),
    ({"instruction": "do", "input": "this", "output": "a"}, say("do\nthis", "a")),
    (
        {"instruction": "q", "output": "a", "system": "be brief", "history": [["q0", "a0"]]},
        [SYSTEM, *say("q0", "a0", "q", "a")],
    ),
    ({"conversations": [*PROMPT, {"from": "gpt", "value": "a"}]}, say("q", "a")),
    (
        {"conversations": [{"from": "user", "value": "q"}, {"role": "bot", "content": "a"}], "system": "be brief"},
        [SYSTEM, *say("q", "a")],
    ),
    ({"name": "x", "instruction": "do", "instances": [{"input": "this", "output": "a"}]}, say("do\nthis", "a")),
    ({"question": "q", "answer": "a"}, say("q", "a")),
    ({"prompt": "q", "completion": "a"}, say("q", "a")),
    ({"prompt": "q", "response": "a"}, say("q", "a")),
    ({"prompt": [SYSTEM, *say("q")], "completion": [{"role": "assistant", "content": "a"}]}, [SYSTEM, *say("q", "a")]),
]
PAIRS = [  # record, its prompt; the answers are "good" and "bad"
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, say("q")),
    ({"prompt": [SYSTEM, *say("q")], "chosen": "good", "rejected": "bad"}, [SYSTEM, *say("q")]),
    ({"prompt": "q", "system": "be brief", "chosen": "good", "rejected": "bad"}, [SYSTEM, *say("q")]),
    (
        {"prompt": "q", "system": "be brief", "chosen": say("q", "good"), "rejected": [SYSTEM, *say("q", "bad")]},
        [SYSTEM, *say("q")],
    ),
    ({"prompt": say("q"), "chosen": say("q", "good"), "rejected": say("q", "bad")}, say("q")),
    ({"prompt": "q", "chosen": say("q", "good")[1:], "rejected": {"role": "assistant", "content": "bad"}}, say("q")),
    (
        {
            "conversations": PROMPT,
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        say("q"),
    ),
    ({"instruction": "do", "input": "this", "chosen": "good", "rejected": "bad"}, say("do\nthis")),
    ({"chosen": say("q", "a", "b", "good"), "rejected": say("q", "a", "b", "bad")}, say("q", "a", "b")),
    (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\n b\n\nHuman: again\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\n b\n\nHuman: again\n\nAssistant: bad",
        },
        say("q", "a\n\n b", "again"),
    ),
]


@pytest.mark.parametrize(("record", "messages"), CHATS)
def test_instruction_records_are_read(tmp_path, record, messages):
    expected = {"id": "7", "language": "en", "source": "web", "messages": messages}
    assert read_one(tmp_path, {"id": 7, "language": "en", "source": "web", **record}) == [expected]


@pytest.mark.parametrize(("record", "prompt"), PAIRS)
def test_preference_records_are_read(tmp_path, record, prompt):
    expected = [{"id": "own:1", "prompt": prompt, "chosen": "good", "rejected": "bad"}]
    assert read_one(tmp_path, record, check_preference) == expected


def test_every_format_has_an_example():
    def format_of(record):
        return next(form.name for form in FORMATS if set(form.keys) <= set(record))

    assert {format_of(record) for record, _ in CHATS + PAIRS} == {form.name for form in FORMATS}


def test_a_task_of_several_examples_gives_several_records(tmp_path):
    task = {"id": "t", "instruction": "do", "instances": [{"input": i, "output": i + i} for i in ("a", "b")]}
    found = read_one(tmp_path, task)
    assert found == [{"id": f"t:{n}", "messages": say(f"do\n{i}", i + i)} for n, i in enumerate("ab")]


BAD_CHATS = [
    ({"text": "a document"}, UNKNOWN_FORMAT),
    ({"messages": "no list"}, "the last message is not the assistant's"),
    ({"messages": ["text"]}, "a message is not an object"),
    ({"messages": [{"role": ["user"], "content": "q"}]}, "a message has no known role"),
    ({"messages": say("q", "a"), "label": False}, "an answer that is labelled as bad"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *say("q", "a")[1:]]}, "a message has no text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "a message has no text"),
    ({"instruction": 3, "output": "a"}, "instruction or input is no text"),
    ({"instruction": "q", "output": " "}, "a message has no text"),
    ({"instruction": "q", "output": "a", "history": ["q0"]}, "history is not a list of [question, answer]"),
    ({"conversations": PROMPT}, "the last message is not the assistant's"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "a message has no known role"),
    ({"conversations": None}, "messages is not a list, or empty"),
    ({"instruction": "q", "instances": []}, "instances is not a list of objects, or empty"),
    ({"question": "q", "answer": None}, "question or answer is neither text nor messages"),
    ({"prompt": "q", "completion": ""}, "a message has no text"),
    ({"prompt": 1, "response": "a"}, "prompt or response is neither text nor messages"),
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "a preference record, where instructions are read"),
    ({"messages": say("q", "a"), "source": "a/b"}, "the source is not a word"),
    ({"messages": say("q", "a"), "source": "文" * 43}, "the source is not a word"),
    ({"messages": say("q", "a"), "id": True}, "the id is neither text nor number"),
]
BAD_PAIRS = [
    ({"messages": say("q", "a")}, "an instruction record, where preferences are read"),
    ({"prompt": [], "chosen": "good", "rejected": "bad"}, "prompt: messages is not a list, or empty"),
    ({"prompt": "q", "chosen": "good", "rejected": None}, "chosen or rejected is missing or empty"),
    ({"prompt": "q", "chosen": "good", "rejected": "good"}, "chosen and rejected are the same"),
    ({"prompt": "q", "chosen": say("a", "b"), "rejected": "bad"}, "chosen or rejected is not one answer to the prompt"),
    ({"prompt": say("q", "a"), "chosen": "good", "rejected": "bad"}, "the prompt does not end with the user's message"),
    ({"chosen": "good", "rejected": "bad"}, "the transcripts share no beginning"),
    ({"chosen": say("q", "good"), "rejected": "bad"}, "chosen and rejected are neither transcripts nor messages"),
    (
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: b", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        "chosen or rejected is not one answer to the prompt",
    ),
]


@pytest.mark.parametrize(
    ("check", "record", "reason"),
    [(check_chat, *case) for case in BAD_CHATS] + [(check_preference, *case) for case in BAD_PAIRS],
)
def test_what_cannot_be_used_is_rejected_with_its_reason(tmp_path, check, record, reason):
    found = read_records([str(write_jsonl(tmp_path / "own.jsonl", [record]))], check)
    assert not found.kept
    (entry,) = found.rejected
    assert entry["file"] == str(tmp_path / "own.jsonl") and entry["line"] == 1
    assert entry["reason"].startswith(reason)


# ---- Files


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("array", [False, True])
def test_lines_and_arrays_are_read_plain_or_packed(tmp_path, name, array):
    entries = [{"messages": say(f"q{i}\u2028\u0085", "a")} for i in range(3)]
    texts = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    data = ("\ufeff\n" + (f"[{', '.join(texts)}]" if array else "\r\n".join(texts))).encode()
    (tmp_path / name).write_bytes(packed(data) if name.endswith("gz") else data)
    found = read_records([str(tmp_path / name)], check_chat)
    if array and "jsonl" in name:  # a line that is a list
        assert found.kept == [] and [entry["reason"] for entry in found.rejected] == ["not a JSON object"]
        return
    start = 1 if array else 2
    assert found.kept == [{"id": f"a:{i + start}", **entry} for i, entry in enumerate(entries)]
    assert found.rejected == []


def test_lines_that_are_no_records_are_rejected_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 100)
    good = json.dumps({"messages": say("q", "a")}).encode()
    long = json.dumps({"messages": say("q" * 200, "a")}).encode()
    lines = [
        good,
        b"{",
        b'{"messages": "\xff"}',
        long,
        b'"\\ud800"',
        b"",
        b"[1]",
        good[:-1] + b" " * 50 + b"}" * 60,
        good,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read_records([str(tmp_path / "a.jsonl")], check_chat)
    assert [record["id"] for record in found.kept] == ["a:1", "a:9"]
    assert [(entry["line"], entry["reason"]) for entry in found.rejected] == [
        (2, "not valid JSON"),
        (3, "not UTF-8"),
        (4, "longer than 100 bytes"),
        (5, "not valid JSON"),
        (7, "not a JSON object"),
        (8, "longer than 100 bytes"),
    ]


def test_of_a_gzip_file_cut_short_what_can_be_read_is_kept(tmp_path):
    lines = [json.dumps({"messages": say(f"q{zlib.crc32(bytes([i]))}", "a")}) for i in range(200)]
    data = packed("\n".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    found = read_records([str(tmp_path / "a.jsonl.gz")], check_chat)
    assert 0 < len(found.kept) < 200
    (entry,) = found.rejected
    assert entry["line"] == len(found.kept) + 1
    assert entry["reason"] == "damaged gzip, nothing more can be read (EOFError)"
    (tmp_path / "b.jsonl.gz").write_bytes(data[:2] + b"no gzip")
    found = read_records([str(tmp_path / "b.jsonl.gz")], check_chat)
    assert found.kept == [] and found.rejected[0]["reason"].startswith("damaged gzip, nothing more can be read")
    (tmp_path / "a.json.gz").write_bytes(packed(f"[{', '.join(lines)}]".encode())[:-500])
    with pytest.raises(UserError, match="a.json.gz: damaged gzip .*; fetch the file again"):
        read_records([str(tmp_path / "a.json.gz")], check_chat)


@pytest.mark.parametrize("unit", [b"x", b"{}\n", b"\n"], ids=["one line", "many records", "many empty lines"])
def test_a_decompression_bomb_is_left_where_it_shows(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(damage, "JUDGED", 1 << 19)
    monkeypatch.setattr(damage, "EXPANSION", 20)
    monkeypatch.setattr(records, "MAX_LINE", 1 << 16)
    good = json.dumps({"messages": say("q", "a")}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(packed(good) + packed(unit * (1 << 20)) * 100)
    found = read_records([str(tmp_path / "a.jsonl.gz")], check_chat)
    assert len(found.kept) == 1 and len(found.rejected) < 1_000_000
    reason = "a decompression bomb: more than 20 times its size, nothing more can be read"
    assert found.rejected[-1]["reason"] == reason


def test_arrays_that_are_broken_or_too_large_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('[{"messages": []}, {')
    with pytest.raises(UserError, match=r"a.json: the array is not valid JSON \(.*\); mend it, or write a record per"):
        read_records([str(tmp_path / "a.json")], check_chat)
    monkeypatch.setattr(records, "MAX_ARRAY", 10)
    with pytest.raises(UserError, match="an array of more than 10 bytes is not read whole; write a record per line"):
        read_records([str(tmp_path / "a.json")], check_chat)


def test_ids_are_unique_over_the_files(tmp_path):
    def write(place, *ids):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        entries = [{"id": name, "messages": say("q", f"{place} {name}")} for name in ids]
        return str(write_jsonl(tmp_path / place, entries))

    files = [write("x/a.jsonl", "0", "1", "0", None), write("y/a.jsonl", 0, None), write("b.json", 0, "2", "b/0")]
    found = read_records(files, check_chat)
    assert [record["id"] for record in found.kept] == ["0", "1", "x/a:4", "y/a/0", "y/a:2", "b/0", "2"]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in found.rejected] == [
        (files[0], 3, "the id was seen before"),
        (files[2], 3, "the id was seen before"),
    ]


def test_accelerator_hosts_read_records_with_orjson_alone():
    """Of what the data extra has; ctllm_jax/data/conversations.py says so."""
    missing = ("pyarrow", "xxhash", "numba", "zstandard", "resiliparse", "apache_beam", "tensorflow", "seqio", "jieba")
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); import data_pipeline.records"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=pathlib.Path(__file__).parent.parent)


# ---- Published data

REAL = {  # file: usable instructions, usable preferences, of how many entries
    "sft/alpaca_en_demo.json.gz": (999, 0, 999),
    "sft/alpaca_zh_1500.json.gz": (1497, 0, 1500),  # three have no output
    "sft/alpaca_zh_demo.json.gz": (1000, 0, 1000),
    "sft/belle_zh_seed_tasks.jsonl": (175, 0, 175),
    "sft/stanford_seed_tasks.jsonl": (175, 0, 175),
    "sft/ruozhiba_300.jsonl": (300, 0, 300),
    "sft/ruozhiba_titles.json.gz": (0, 0, 2597),  # titles of threads, no answers
    "preference/dpo_en_demo.json.gz": (0, 300, 300),
    "preference/dpo_zh_demo.json.gz": (0, 300, 300),
    "preference/kto_en_demo.json.gz": (150, 0, 300),  # the other half is labelled as bad
    "hh_rlhf/harmless-base-test.jsonl.gz": (0, 2299, 2312),
    "gsm8k/test.jsonl.gz": (1319, 0, 1319),
}


@pytest.mark.parametrize("name", REAL)
def test_published_data_are_read(shared_data, name):
    file = str(shared_data / "eval" / name)
    chats, preferences, entries = REAL[name]
    for check, usable in ((check_chat, chats), (check_preference, preferences)):
        found = read_records([file], check)
        assert len(found.kept) == usable and len(found.kept) + len(found.rejected) == entries


def test_why_transcripts_are_rejected(shared_data):
    found = read_records([str(shared_data / "eval" / "hh_rlhf" / "harmless-base-test.jsonl.gz")], check_preference)
    assert collections.Counter(entry["reason"] for entry in found.rejected) == {
        "chosen or rejected is not one answer to the prompt": 5,
        "chosen or rejected is missing or empty": 4,
        "prompt: the messages are not user and assistant in turn": 4,
    }


def test_all_published_data_together_lose_nothing_to_their_ids(shared_data):
    files = [str(shared_data / "eval" / name) for name in REAL]
    found = read_records(files, check_chat)
    assert len(found.kept) == len({record["id"] for record in found.kept}) == sum(own[0] for own in REAL.values())
