"""`ctllm serve` over real sockets: the words of OpenAI's API, and what is refused."""

# ruff: noqa: F811 (fixtures)
import dataclasses
import json
import re

import hypothesis
from hypothesis import strategies as st
from tiny_server import (  # noqa: F401 (fixtures too)
    CHAT,
    GREEDY,
    QUESTION,
    TEXT,
    alone,
    chat,
    decoder,
    events,
    head_of,
    model,
    raw,
    server,
    serving,
    wait_until,
)

from ctllm_jax.common.errors import UserError
from ctllm_jax.samples import sample
from ctllm_jax.serve import protocol
from ctllm_jax.serve.protocol import Refusal, parse_request

# ---- Answers


def test_models_and_health(server, model):
    status, _, listed = server.request("GET", "/v1/models")
    assert status == 200 and [card["id"] for card in listed["data"]] == ["tiny"]
    assert server.request("GET", "/v1/models/tiny")[2] == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 500
    assert server.request("GET", "/v1/models/other")[0] == 404
    assert server.request("GET", "/health")[2] == {"status": "ok", "open": 0, "slots": 4}


def test_an_answer_is_that_of_ctllm_generate(server, model):
    expected = sample(model, [QUESTION], True, GREEDY)[0]
    status, _, found = server.request("POST", CHAT, chat())
    assert status == 200 and found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected["text"]},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    prompt = len(server.server._template.render_prompt(QUESTION))
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 10, "total_tokens": prompt + 10}

    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    again = server.request("POST", CHAT, chat(messages=[{"role": "user", "content": parts}], user="me", n=1.0))[2]
    assert again["choices"] == found["choices"]


def test_text_is_continued_from_text_or_ids(server, model):
    expected = sample(model, ["The quick"], False, dataclasses.replace(GREEDY, max_tokens=5))[0]["text"]
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("The quick")]
    for prompt in ("The quick", ["The quick"], ids, [ids]):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 5, "echo": False}
        status, _, found = server.request("POST", TEXT, body)
        assert status == 200 and found["choices"][0]["text"] == expected and found["object"] == "text_completion"


def test_a_stream_says_the_same_bit_by_bit(server):
    whole = server.request("POST", CHAT, chat(max_tokens=40))[2]
    *parts, usage, end = events(
        server, CHAT, chat(stream=True, max_completion_tokens=40, stream_options={"include_usage": True})
    )
    assert end == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert len({part["id"] for part in parts}) == 1 and {part["object"] for part in parts} == {"chat.completion.chunk"}
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {} and len(deltas) > 5
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]

    body = {"model": "tiny", "prompt": "水", "max_tokens": 8}
    text = server.request("POST", TEXT, body)[2]["choices"][0]["text"]
    *parts, end = events(server, TEXT, {**body, "stream": True})
    assert end == "[DONE]" and "".join(part["choices"][0]["text"] for part in parts) == text


def test_stop_strings_and_stop_ids_end_an_answer(server, model):
    text = server.request("POST", CHAT, chat(max_tokens=20))[2]["choices"][0]["message"]["content"]
    stop = text[4:6]
    found = server.request("POST", CHAT, chat(max_tokens=20, stop=stop))[2]
    assert found["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop" and found["usage"]["completion_tokens"] < 20
    parts = events(server, CHAT, chat(max_tokens=20, stop=[stop, "never"], stream=True))[:-1]
    said = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert said == text[: text.index(stop)] and parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_seed_decides_and_without_one_answers_differ(server):
    def text(**changes):
        body = chat(temperature=1.2, max_tokens=12, **changes)
        return server.request("POST", CHAT, body)[2]["choices"][0]["message"]["content"]

    assert text(seed=1) == text(seed=1) and len({text(seed=1), text(seed=2), text(), text()}) == 4


# ---- Refusals


REFUSED = [
    (chat(n=2), 400, "n"),
    (chat(n=True), 400, "n"),
    (chat(logprobs=True), 400, "logprobs"),
    (chat(tools=[{"type": "function"}]), 400, "tools"),
    (chat(response_format={"type": "json_object"}), 400, "response_format"),
    (chat(presence_penalty=0.5), 400, "presence_penalty"),
    (chat(best_of=1), 400, "best_of"),
    (chat(temprature=1), 400, "temprature"),
    (chat(prompt="a"), 400, "prompt"),
    (chat(temperature="hot"), 400, "temperature"),
    (chat(temperature=-1), 400, None),
    (chat(top_p=0), 400, None),
    (chat(top_k=2.5), 400, "top_k"),
    (chat(seed=2**40), 400, "seed"),
    (chat(max_tokens=0), 400, None),
    (chat(stop=[""]), 400, "stop"),
    (chat(stop=["a"] * 17), 400, "stop"),
    (chat(stream="yes"), 400, "stream"),
    (chat(stream_options={"x": 1}), 400, "stream_options"),
    (chat(model="gpt-4"), 404, "model"),
    ({"messages": QUESTION}, 404, "model"),
    ({"model": "tiny"}, 400, "messages"),
    (chat(messages=[]), 400, "messages"),
    (chat(messages=[*QUESTION, {"role": "assistant", "content": "a"}]), 400, "messages"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages"),
    (chat(messages=[{"role": "user", "content": "水" * 600}]), 400, None),
    (chat(messages=[{"role": "user", "content": "\ud800"}]), 400, None),
    (b"{", 400, None),
    (b"[1]", 400, None),
    (b"\xff\xfe", 400, None),
    (b'{"temperature": NaN}', 400, None),
    (b"[" * 9_000, 400, None),
    (b" " * 20_000, 413, None),
]


def test_what_is_not_supported_is_refused_in_openais_form(server):
    for body, wanted, param in REFUSED:
        status, _, found = server.request("POST", CHAT, body)
        assert (status, found["error"]["param"]) == (wanted, param), (body, found)
        assert set(found["error"]) == {"message", "type", "param", "code"} and found["error"]["message"]
    for prompt in ("", [], [1, "a"], ["a", "b"], [-1], [10**6], 5):
        status, _, found = server.request("POST", TEXT, {"model": "tiny", "prompt": prompt})
        assert status == 400, (prompt, found)
    assert server.request("GET", CHAT)[0] == 405 and server.request("POST", "/v1/embeddings", {})[0] == 404
    assert server.open() == 0


def test_web_pages_of_others_reach_nothing(server):
    """What a browser sends for them: forms and plain text without asking, and any name that they give this machine."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, _, found = server.request("POST", CHAT, chat(max_tokens=1), **{"Content-Type": kind})
        assert status == 415 and "Content-Type: application/json" in found["error"]["message"]
    assert (
        server.request("POST", CHAT, chat(max_tokens=1), **{"Content-Type": "application/json; charset=utf-8"})[0]
        == 200
    )
    assert server.request("OPTIONS", CHAT)[0] == 405  # what it asks before it sends JSON
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
    ):
        for method, path, body in (("POST", CHAT, chat(max_tokens=1)), ("GET", "/v1/models", None)):
            status, _, found = server.request(method, path, body, Host=host)
            assert status == 403 and found["error"]["code"] == "foreign_host", host
    for host in (
        "localhost",
        f"LocalHost:{server.port}",
        "127.0.0.1:1",
        "127.8.8.8",
        "[::1]",
        "[::1]:80",
        "me.localhost",
    ):
        assert server.request("GET", "/v1/models", Host=host)[0] == 200, host


def test_who_listens_for_others_is_asked_by_any_name(alone):
    with serving(alone, host="0.0.0.0") as running:
        assert running.request("POST", CHAT, chat(max_tokens=1), Host="models.example")[0] == 200


def test_a_model_without_a_template_completes_texts_only(alone, model, monkeypatch):
    def none(tokenizer):
        raise UserError("no template")

    monkeypatch.setattr("ctllm_jax.serve.server.own_template", none)
    with serving(alone) as running:
        status, _, found = running.request("POST", CHAT, chat())
        assert status == 400 and "/v1/completions" in found["error"]["message"]
        assert running.request("POST", TEXT, {"model": "tiny", "prompt": "水"})[0] == 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
OTHER_KEYS = ("messages", "prompt", "stream", "stream_options", "user", "what")
KEYS = st.sampled_from(sorted({*protocol.CHAT_SAMPLING, *protocol.CHAT_NEUTRAL, *OTHER_KEYS}))


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(values=st.dictionaries(KEYS, VALUES, max_size=4), whole=st.booleans(), is_chat=st.booleans())
def test_any_body_is_read_or_refused(values, whole, is_chat):
    body = {**chat(), **values} if whole else {"model": "tiny", **values}
    try:
        parsed = parse_request(json.dumps(body).encode(), is_chat, "tiny", GREEDY)
    except Refusal as refusal:
        assert refusal.status in (400, 404) and refusal.body["error"]["message"]
    else:
        assert parsed.messages if is_chat else parsed.prompt


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_malformed_requests_do_no_harm(server, data):
    """Sound requests with bytes cut, put in or changed; random bytes; headers that lie."""
    body = json.dumps(chat(max_tokens=2)).encode()
    head = head_of(len(body), "Connection: close")
    request = head + body
    cut = data.draw(st.integers(0, len(request)))
    junk = data.draw(st.binary(max_size=30))
    kind = data.draw(st.sampled_from(["cut", "junk inside", "changed", "random", "length", "chunks"]))
    sent = {
        "cut": request[:cut],
        "junk inside": request[:cut] + junk + request[cut:],
        "changed": request[:cut] + junk + request[cut + len(junk) :],
        "random": junk * 20,
        "length": head.replace(str(len(body)).encode(), junk) + body,
        "chunks": head.replace(b"Content-Length: ", b"Transfer-Encoding: chunked\r\nX: ") + junk + body,
    }[kind]
    answer = raw(server, sent, seconds=20 if sent == request else 0.1)
    assert (answer == b"" and sent != request) or re.match(rb"HTTP/1\.[01] (200|4\d\d) ", answer)
    assert b"Traceback" not in answer


def test_after_the_fuzzing_it_works_as_before(server):
    wait_until(lambda: server.open() == 0)
    assert server.request("POST", CHAT, chat())[0] == 200
