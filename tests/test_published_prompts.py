"""Tasks that no recorded run covers: OpenCompass's templates, written down anew from its configs, on published rows.

A template here is what `round`s of a config come to for a base model: its pieces with one newline between them.
"""

import gzip
import json

import pytest
from test_declarations import DATA, benchmark, needs_reference, shots

from ctllm_jax.evaluate.prompts import head, open_prompt, option_prompts

ROWS = 3  # compared of each task


def published(file: str) -> list:
    """The rows of a file, JSON lines or one JSON list."""
    path = DATA / file
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(text) if text.startswith(b"[") else [json.loads(line) for line in text.split(b"\n") if line]


TNEWS = {  # OpenCompass's names, in its order
    **{"news_agriculture": "农业新闻", "news_travel": "旅游新闻", "news_game": "游戏新闻"},
    **{"news_tech": "科技类别公司新闻", "news_sports": "体育类别新闻", "news_edu": "初升高教育新闻"},
    **{"news_entertainment": "娱乐圈新闻", "news_finance": "投资资讯", "news_military": "军事类别常识"},
    **{"news_car": "车辆新闻", "news_house": "楼市新闻", "news_world": "环球不含中国类别新闻"},
    **{"news_culture": "书籍文化历史类别新闻", "news_story": "故事类别新闻", "news_stock": "股票市场类别新闻"},
}


def tnews(row):
    texts = [f"{row['sentence']}\n上述内容属于什么新闻？\n{name}" for name in TNEWS.values()]
    return texts, list(TNEWS).index(row["label_desc"])


def eprstmt(row):
    texts = [f'内容： "{row["sentence"]}"。情绪分类：\n{name}' for name in ("消极。", "积极。")]
    return texts, ["Negative", "Positive"].index(row["label"])


def bustm(row):
    asked = f"语句一：“{row['sentence1']}”\n语句二：“{row['sentence2']}”\n请判断语句一和语句二说的是否是一个意思？\n"
    return [asked + "两句话说的毫不相关。", asked + "两句话说是的一个意思。"], int(row["label"])


def chid(row):
    filled = [row["content"].replace("#idiom#", idiom) for idiom in row["candidates"]]
    return [f"以下句子是否通顺？\n{text}\n这个句子是通顺的。" for text in filled], row["answer"]


def cluewsc(row):
    noun, pronoun = row["target"]["span1_text"], row["target"]["span2_text"]
    asked = f"{row['text']}\n此处，代词“{pronoun}“被用于指代“{noun}“吗?\n"
    return [asked + "否", asked + "是"], int(row["label"] == "true")


def cmnli(row):  # the file's own names of labels and fields, which differ from OpenCompass's
    asked = f"语句一：“{row['text_a']}”\n语句二：“{row['text_b']}”\n请问这两句话是什么关系？\n"
    return [asked + name for name in ("矛盾", "蕴含", "无关")], ["矛盾", "蕴含", "中立"].index(row["label"])


def ocnli_fc(row):
    one, other = row["sentence1"], row["sentence2"]
    article = f"阅读文章：{one}\n根据上文，回答如下问题： {other}？\n答："
    texts = [article + "错", article + "对", f"如果{one}为真，那么{other}也为真吗?可能"]
    return texts, ["contradiction", "entailment", "neutral"].index(row["label"])


def c3(row):
    passage, [question, *_] = row[:2]
    choices = (question["choice"] + [question["choice"][0]] * 4)[:4]
    asked = f"文章：{' '.join(passage)}\n问题：{question['question']}\n答案："
    return [asked + choice for choice in choices], question["choice"].index(question["answer"])


CHOSEN = {
    "tnews_ppl": (tnews, "fewclue_tnews/test_public.json"),
    "eprstmt_ppl": (eprstmt, "fewclue_eprstmt/test_public.json"),
    "bustm_ppl": (bustm, "fewclue_bustm/test_public.json"),
    "chid_ppl": (chid, "fewclue_chid/test_public.json.gz"),
    "cluewsc_ppl": (cluewsc, "fewclue_cluewsc/test_public.json"),
    "cmnli_ppl": (cmnli, "clue_cmnli/dev.json.gz"),
    "ocnli_fc_ppl": (ocnli_fc, "fewclue_ocnli/test_public.json.gz"),
    "c3_d_ppl": (c3, "c3/c3-d-dev.json.gz"),
}


@needs_reference
@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_options_are_opencompass_to_the_newline(name):
    template, file = CHOSEN[name]
    found, rows = benchmark(name), published(file)
    items = iter(found.items[""])
    for row in rows[:ROWS]:
        item = next(items)
        prompts = option_prompts(found.task, item, head(found, "", 0))
        assert ([prompt.text for prompt in prompts], item.gold) == template(row)
        for _ in row[1][1:] if name == "c3_d_ppl" else ():  # further questions on the passage
            next(items)


# Rounds of mbpp_gen_1e1056. Its tests begin lines with a space and end them with one, or not, as it stands here.
TASK = "You are an expert Python programmer, and here is your task: "
MBPP = [
    TASK + "Write a function to find the similar elements from the given two tuple lists. "
    "Your code should pass these tests:\n\n assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n "
    "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4) \n "
    "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14) \n",
    "[BEGIN]\n 'def similar_elements(test_tup1, test_tup2):\r\n  res = tuple(set(test_tup1) & set(test_tup2))\r\n"
    "  return (res)' \n[DONE] \n\n ",
    TASK + "Write a python function to identify non-prime numbers. Your code should pass these tests:\n\n "
    "assert is_not_prime(2) == False \n assert is_not_prime(10) == True \n assert is_not_prime(35) == True \n",
    "[BEGIN]\n 'import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
    "    for i in range(2,int(math.sqrt(n)) + 1):\r\n        if n % i == 0:\r\n            result = True\r\n"
    "    return result' \n[DONE] \n\n ",
    TASK + "Write a function to find the largest integers from a given list of numbers using heap queue algorithm. "
    "Your code should pass these tests:\n\n "
    "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] \n "
    "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] \n "
    "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35] \n",
    "[BEGIN]\n 'import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n"
    "  largest_nums = hq.nlargest(n, nums)\r\n  return largest_nums' \n[DONE] \n\n ",
]


@needs_reference
def test_mbpp_and_its_examples_are_opencompass_to_the_newline():
    found = benchmark("mbpp_gen")
    rows = published("mbpp/mbpp.jsonl.gz")[10:510]
    assert len(found) == len(rows) == 500
    for item, row in list(zip(found.items[""], rows, strict=True))[:ROWS]:
        tests = "\n".join(row["test_list"])
        asked = [TASK + f"{row['text']} Your code should pass these tests:\n\n {tests}  \n", "[BEGIN]\n"]
        assert open_prompt(found.task, item, head(found, "", shots(found.task))) == "\n".join([*MBPP, *asked])
