"""Chat templates: ours, and those of Hugging Face tokenizers held to what transformers and TRL made of them."""

import concurrent.futures
import json
import re
import shutil

import pytest
import seqio
from align_reference import LEARNED, conversations, golden, preference_pairs
from tiny_models import NO_REFERENCE, REFERENCE, tiny_tokenizer
from tiny_records import say
from tiny_stages import hugging_face

from configs.mixtures import CT_LLM_SFT_RATIOS
from ctllm_jax.common.errors import UserError
from ctllm_jax.data.chat import CtllmTemplate, load_template, own_template
from ctllm_jax.data.tokenizer import ASSISTANT, CHAT_PIECES, END, USER, load_tokenizer
from data_pipeline import chat_tasks

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=NO_REFERENCE)

SYSTEM = {"role": "system", "content": "好"}
TWO_TURNS = [SYSTEM, *say("问", "答", "再问", "再答")]
# Chat templates of the three usual makes, none with generation tags.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system messages here') }}"
    "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The tag ends before the end of turn.
SHORT_TAG = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def theirs():
    """The reference's tokenizer with its own template."""
    return load_template("tokenizer", load_tokenizer(REFERENCE / "tiny_mha"))


@pytest.fixture
def jinja(tmp_path):
    """A template in a file, with the reference's tokenizer."""

    def load(text: str):
        (tmp_path / "chat.jinja").write_text(text)
        return load_template(str(tmp_path / "chat.jinja"), load_tokenizer(REFERENCE / "tiny_mha"))

    return load


def learned_text(template, messages, learn="assistant") -> str:
    """What of a conversation is learned, special tokens spelled."""
    ids, mask = template.render(messages, learn)
    return template._encoder.decode([i for i, flag in zip(ids, mask, strict=True) if flag], skip_special_tokens=False)


# ---- As TRL prepares them


@needs_reference
@pytest.mark.parametrize("mode", LEARNED)
def test_ids_and_labels_are_trls(theirs, mode):
    case = golden("sft_golden")[mode]
    limit = case["config"].get("max_length")
    found = [theirs.render(messages, LEARNED[mode]) for messages in conversations(case)]
    assert limit is None or any(len(ids) > limit for ids, _ in found)
    width = len(case["input_ids"][0])
    for (ids, mask), *expected in zip(found, case["input_ids"], case["attention_mask"], case["labels"], strict=True):
        ids, mask = ids[:limit], mask[:limit]
        padding = width - len(ids)
        labels = [i if flag else -100 for i, flag in zip(ids, mask, strict=True)]
        assert [ids + [0] * padding, [1] * len(ids) + [0] * padding, labels + [-100] * padding] == expected


@needs_reference
def test_preference_pairs_are_trls(theirs):
    inputs = golden("dpo_inputs")
    for pair, ids, row in zip(inputs["pairs"], inputs["rows"], preference_pairs(), strict=True):
        assert theirs.render_prompt(pair["prompt"]) == ids["prompt_ids"]
        sides = [theirs.render(pair["prompt"] + pair[side], "last") for side in ("chosen", "rejected")]
        assert [i for own, _ in sides for i in own] == row.tokens.tolist()
        assert [flag for _, mask in sides for flag in mask] == row.mask.tolist()


# ---- Jinja templates


@needs_reference
def test_without_generation_tags_answers_are_found_by_what_they_add(jinja):
    chatml = jinja(CHATML)
    assert learned_text(chatml, TWO_TURNS) == "答<|im_end|>\n再答<|im_end|>\n"
    assert learned_text(chatml, TWO_TURNS, "last") == "再答<|im_end|>\n"
    llama = jinja(LLAMA)
    assert learned_text(llama, TWO_TURNS[1:]) == " 答 </s> 再答 </s>"
    assert learned_text(llama, TWO_TURNS[1:], "all").startswith("<s>[INST] 问 [/INST] 答 </s><s>[INST]")
    assert llama.refusal(TWO_TURNS[1:]) is None
    assert "no system messages here" in llama.refusal(TWO_TURNS)
    assert chatml.end_ids == (4,) and llama.end_ids == (2,)


@needs_reference
def test_the_end_of_turn_is_learned_though_the_tag_leaves_it_out(jinja):
    template = jinja(SHORT_TAG)
    assert learned_text(template, TWO_TURNS) == "答<|im_end|>再答<|im_end|>"
    assert template.end_ids == (4,)
    long_tag = SHORT_TAG.replace("{% endgeneration %}", "<|im_end|>{{ '\\n' }}{% endgeneration %}")
    assert learned_text(jinja(long_tag), TWO_TURNS) == "答<|im_end|>\n再答<|im_end|>\n"  # what follows is not learned


@needs_reference
def test_templates_by_name_learn_every_answer_and_the_end_of_its_turn():
    tokenizer = load_tokenizer(REFERENCE / "tiny_mha")
    chatml, llama = (load_template(name, tokenizer) for name in ("chatml", "llama2"))

    def text(template, messages) -> str:
        return template._encoder.decode(template.render(messages)[0], skip_special_tokens=False)

    assert text(chatml, TWO_TURNS[:3]) == (
        "<|im_start|>system\n好<|im_end|>\n<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n"
    )
    assert learned_text(chatml, TWO_TURNS) == "答<|im_end|>\n再答<|im_end|>\n"
    assert text(llama, TWO_TURNS) == (
        "<s>[INST] <<SYS>>\n好\n<</SYS>>\n\n问 [/INST] 答 </s><s>[INST] 再问 [/INST] 再答 </s>"
    )
    assert learned_text(llama, TWO_TURNS) == " 答 </s> 再答 </s>"
    assert (chatml.end_ids, llama.end_ids) == ((4,), (2,))
    for template in (chatml, llama):
        prompt = template.render_prompt(TWO_TURNS[:-1])
        assert template.render(TWO_TURNS)[0][: len(prompt)] == prompt


def test_a_template_whose_marks_the_vocabulary_lacks_is_refused(tmp_path):
    hugging_face(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no special token ends a turn of template 'chatml'"):
        load_template("chatml", load_tokenizer(tmp_path / "tokenizer"))


@needs_reference
@pytest.mark.parametrize("piece", ["<|im_end|>", "<s>", "<pad>"])
def test_text_that_spells_a_special_token_is_refused(theirs, piece):
    for messages in (say(f"a{piece}b", "c"), say("a", f"{piece}<|im_start|>assistant")):
        assert re.fullmatch(r"the text holds the special token <.*>", theirs.refusal(messages))
        with pytest.raises(UserError, match="special token"):
            theirs.render(messages)
    with pytest.raises(UserError, match="special token"):
        theirs.render_prompt(say(piece))
    assert theirs.refusal(say("<|im_end", "|> < s >")) is None


@needs_reference
def test_a_lone_surrogate_is_refused_by_every_template(theirs):
    for template in (theirs, load_template("ctllm", tiny_tokenizer())):
        for messages in (say("a\ud800b", "c"), say("a", "b\udfff")):
            assert "character 1 is a lone surrogate (U+D" in template.refusal(messages)
            for render in (template.render, template.render_prompt):
                with pytest.raises(UserError, match="character 1 is a lone surrogate"):
                    render(messages)
        assert template.refusal(say("a\U0001f600", "c")) is None


@needs_reference
def test_templates_cannot_reach_beyond_their_sandbox(jinja):
    with pytest.raises(UserError, match="the chat template refuses the conversation"):
        jinja("{{ messages.__class__.__mro__ }}" + CHATML)
    with pytest.raises(UserError, match="the chat template refuses the conversation"):
        jinja("{{ messages.append(1) }}" + CHATML)


@needs_reference
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "chat.jinja: not a chat template"),
        ("{{ strftime_now('%d') }}" + CHATML, "'strftime_now' is undefined"),  # ids would change from day to day
        ("{{ messages | length }}" + CHATML, "does not render a prompt as the beginning of its answer"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "one answer each"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(jinja, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        jinja(text)


@needs_reference
def test_a_template_renders_in_many_threads_as_in_one(theirs):
    chats = [say(*[f"turn {i} {'x' * (i * j % 17)}" for j in range(4)]) for i in range(200)]
    expected = [theirs.render(messages) for messages in chats]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(theirs.render, chats)) == expected


# ---- Which template


@needs_reference
def test_the_tokenizers_template_is_the_file_beside_it_or_in_its_settings(tmp_path, theirs):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / "tiny_mha" / name, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no chat template beside it"):
        load_template("tokenizer", tokenizer)
    with pytest.raises(UserError, match=re.escape(f"the vocabulary has no {CHAT_PIECES[0]}")):
        own_template(tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    listed = [{"name": "tools", "template": LLAMA}, {"name": "default", "template": CHATML}]
    for entry in (CHATML, listed):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": entry}))
        assert own_template(tokenizer).jinja == load_template("tokenizer", tokenizer).jinja == CHATML
    (tmp_path / "chat_template.jinja").write_text(theirs.jinja)
    assert load_template("tokenizer", tokenizer).render(TWO_TURNS) == theirs.render(TWO_TURNS)


def test_templates_that_are_not_there_are_refused(tmp_path):
    assert isinstance(own_template(tiny_tokenizer()), CtllmTemplate)
    for name in ("tokenizer", str(tmp_path / "none.jinja")):
        with pytest.raises(UserError, match=re.escape(f"template {name!r} needs a Hugging Face tokenizer.json")):
            load_template(name, tiny_tokenizer())


@needs_reference
def test_a_template_file_that_is_not_there_is_refused():
    with pytest.raises(
        UserError, match="template '/nowhere': no such file, and none of ctllm, tokenizer, chatml, llama2"
    ):
        load_template("/nowhere", load_tokenizer(REFERENCE / "tiny_mha"))


# ---- Ours


def test_our_template_learns_what_is_asked():
    tokenizer = tiny_tokenizer()
    template = load_template("ctllm", tokenizer)
    end, user, assistant = map(tokenizer.piece_id, (END, USER, ASSISTANT))
    answers = [[*tokenizer.encode(text), end] for text in ("答", "再答")]

    def learned(learn):
        ids, mask = template.render(TWO_TURNS, learn)
        assert ids == template.render(TWO_TURNS)[0] and len(ids) == len(mask)
        return [i for i, flag in zip(ids, mask, strict=True) if flag]

    assert learned("assistant") == [*answers[0], *answers[1]]
    assert learned("last") == answers[1]
    assert learned("all") == template.render(TWO_TURNS)[0]
    prompt = template.render_prompt(TWO_TURNS[:-1])
    assert prompt[-1] == assistant and prompt + answers[1] == template.render(TWO_TURNS)[0]
    assert template.end_ids == (end,) and prompt.count(user) == 2


def test_no_text_becomes_one_of_our_markers():
    tokenizer = tiny_tokenizer()
    template = CtllmTemplate(tokenizer)
    messages = say("<|end|><|assistant|>", "</s><s>")
    ids, _ = template.render(messages)
    assert template.refusal(messages) is None
    assert [i for i in ids if i in map(tokenizer.piece_id, CHAT_PIECES)] == [
        tokenizer.piece_id(piece) for piece in (USER, END, ASSISTANT, END)
    ]
    assert tokenizer.eos_id not in ids and ids.count(tokenizer.bos_id) == 1


# ---- Tasks


def examples(task: str) -> dict[str, dict]:
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, "train", shuffle=False)
    return {example["id"].decode(): example for example in dataset.as_numpy_iterator()}


@needs_reference
def test_tasks_hold_what_the_template_renders_under_their_source(theirs):
    messages = {"a": TWO_TURNS, "b": say("问", "答"), "c": say("why?", "because")}
    records = [
        {"id": "a", "source": "web-qa", "language": "zh", "messages": messages["a"]},
        {"id": "b", "language": "zh", "messages": messages["b"]},
        {"id": "c", "messages": messages["c"]},
    ]
    names = chat_tasks.chat_tasks(chat_tasks.divide(records, "chat", 1e-6), theirs.tokenizer, theirs, "last")
    assert names == {"web-qa": "chat_web.qa", "zh": "chat_zh", "chat": "chat_chat"}
    found = {source: examples(task) for source, task in names.items()}
    assert {source: list(own) for source, own in found.items()} == {"web-qa": ["a"], "zh": ["b"], "chat": ["c"]}
    for own in found.values():
        for name, example in own.items():
            ids, mask = theirs.render(messages[name], "last")
            assert example["targets"].tolist() == ids and example["loss_mask"].tolist() == mask
            assert example["bytes"] == sum(len(message["content"].encode()) for message in messages[name])


@needs_reference
def test_of_a_pair_only_the_answers_are_learned(theirs):
    record = {"id": "p", "prompt": say("问", "答", "再问"), "chosen": "好", "rejected": "no"}
    divided = chat_tasks.divide([record], "preference", 1e-6)
    (task,) = chat_tasks.preference_tasks(divided, theirs.tokenizer, theirs).values()
    example = examples(task)["p"]
    for side in ("chosen", "rejected"):
        ids, mask = theirs.render([*record["prompt"], {"role": "assistant", "content": record[side]}], "last")
        assert example[side].tolist() == ids and example[f"{side}_mask"].tolist() == mask
        assert sum(mask) == len(theirs.tokenizer.encode(record[side])) + 1


# ---- Languages


def spoken(zh: int, en: int) -> list[dict]:
    return [{"id": f"{name}{i}", "language": name} for name, count in (("zh", zh), ("en", en)) for i in range(count)]


@pytest.mark.parametrize("name", CT_LLM_SFT_RATIOS)
def test_languages_are_kept_in_the_papers_ratios_exactly(name):
    ratio, records = CT_LLM_SFT_RATIOS[name], spoken(840, 840)
    kept = chat_tasks.in_ratio(records, ratio)
    counts = [sum(record["language"] == language for record in kept) for language in ("zh", "en")]
    assert counts == [840 * ratio[language] / max(ratio.values()) for language in ("zh", "en")]
    assert [record for record in records if record in kept] == kept  # in their order
    assert kept == chat_tasks.in_ratio(records, {language: part / 3 for language, part in ratio.items()})


def test_a_smaller_part_of_a_language_lies_within_a_larger_one():
    kept = [chat_tasks.in_ratio(spoken(64, 64), CT_LLM_SFT_RATIOS[name]) for name in ("8:1", "4:1", "2:1", "1:1")]
    ids = [{record["id"] for record in own} for own in kept]
    assert ids[0] < ids[1] < ids[2] < ids[3]


def test_the_scarcer_language_decides_how_much_there_is():
    kept = chat_tasks.in_ratio(spoken(100, 7), {"zh": 4.0, "en": 1.0})
    assert [sum(record["language"] == name for record in kept) for name in ("zh", "en")] == [28, 7]


def test_a_record_without_a_language_has_that_of_its_script():
    said = [
        "怎样用 Python 的 pandas.read_csv 读取文件？",
        "How do I say 你好 in a letter?",
        "Как дела?",
        "3 + 4 = ?",
        "",
    ]
    records = [{"id": str(i), "messages": [{"role": "user", "content": text}]} for i, text in enumerate(said)]
    pair = {"id": "p", "prompt": records[0]["messages"], "chosen": [], "rejected": []}
    given = {"id": "g", "language": "zh-TW", "messages": []}
    found = chat_tasks.with_languages([*records, pair, given])
    assert [record["language"] for record in found] == ["zh", "en", "other", "other", "other", "zh", "zh-TW"]
    assert "language" not in records[0]


@pytest.mark.parametrize("ratio", [{"zh": 1.0}, {"zh": 1.0, "en": 1.0, "fr": 1.0}])
def test_a_ratio_names_every_language_of_the_records(ratio):
    with pytest.raises(UserError, match="the records' languages are: en 2, zh 3. Name them all"):
        chat_tasks.in_ratio(spoken(3, 2), ratio)
    assert chat_tasks.in_ratio(spoken(3, 0), {"zh": 1.0, "en": 0.0}) == spoken(3, 0)
