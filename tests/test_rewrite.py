"""What filters take out of a text or reject by a list: links, punctuation, licence headers, lines, addresses."""

import dataclasses

import pytest
from test_filter_thresholds import config

from ctllm_jax.common.errors import UserError
from data_pipeline.filters import urls
from data_pipeline.filters.lines import LineConfig, LineFilter, read_words
from data_pipeline.filters.rewrite import (
    RewriteConfig,
    reference_links,
    remove_links,
    remove_links_as_released,
    take_licence_header,
    unify_punctuation,
)
from data_pipeline.filters.rules import Filters
from data_pipeline.filters.urls import UrlConfig, UrlLists


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("见 https://example.com/a?b=1#c。然后", "见 。然后"),
        ("见（http://example.com/a_(b)），然后", "见（），然后"),
        ("see http://example.com/a, then (www.example.org/x).", "see , then ()."),
        ("地址：pan.baidu.com/s/1abc 提取码", "地址： 提取码"),
        ("读[这篇文章](https://example.com/文)吧", "读这篇文章吧"),
        ("https://", "https://"),
        *[
            (text, text)
            for text in (
                "用 numpy.array 或 java.util.List",
                "升级到 v1.2.3.4，再看 192.168.0.1",
                "node.js 与 ASP.NET，文件 main.py、a.tar.gz",
                "a/b.com/ 与 user@mail.com",
                "。，、",
            )
        ],
    ],
)
def test_web_addresses_go_and_nothing_else_does(text, without):
    assert remove_links(text) == without


def test_the_released_script_takes_names_and_versions_for_links():
    assert reference_links("用 numpy.array 升级到 v1.2.3.4 吧") == "用  升级到  吧"
    assert reference_links("用numpy.array") == "用numpy.array"  # right behind a Chinese character it does not


@pytest.mark.parametrize(
    "text",
    [
        "http://a" + ")]" * 200_000,
        "http://a" + "(" * 200_000 + ")" * 400_000,
        "见 www.a" + "!?" * 200_000,
        "a.1 " * 100_000,
        "a.b1-" * 100_000,
        "[](http://" * 50_000,
    ],
    ids=lambda text: text[:10],
)
def test_links_are_removed_in_linear_time(text):
    """Each would take minutes where time grows with the square of the length."""
    assert remove_links(text) is not None and remove_links_as_released(text) is not None


def test_of_a_name_the_character_behind_it_decides():
    for text in ("x.com_a", "x.com.", "x.com", "y.b1 x.com", "a.com-b.1", "x.comé", "x.com水 a.b"):
        assert remove_links_as_released(text) == reference_links(text)


def test_punctuation_becomes_ascii_only_where_asked():
    assert unify_punctuation("“好”，（一）；《书》……２！") == '"好",(一);《书》……２!'
    text = "天气很好，我们去公园。花开了！" * 5
    kept = {preset: Filters(config(preset)).judge("zh_cc", [text], [""])[0].text for preset in ("default", "released")}
    assert kept["default"] == text and kept["released"] == unify_punctuation(text)


HEADER = "# Copyright 2020 Someone\n# Licensed under the Apache License\n"
BLOCK = "/*\n * SPDX-License-Identifier: MIT\n\n freely */\n"


@pytest.mark.parametrize(
    ("text", "header", "rest"),
    [
        (HEADER + "\nx = 1\n", HEADER.rstrip(), "x = 1\n"),
        ("#!/bin/sh\n" + HEADER + "echo\n", HEADER.rstrip(), "#!/bin/sh\necho\n"),
        (BLOCK + "int x;\n", BLOCK.rstrip(), "int x;\n"),
        ('"""Licence: MIT"""\nx = 1\n', '"""Licence: MIT"""', "x = 1\n"),
        ("# what this does\nx = 1\n", "", "# what this does\nx = 1\n"),
        ("x = 1\n# Copyright\n", "", "x = 1\n# Copyright\n"),
        ("/* Copyright, never closed\nint x;\n", "", "/* Copyright, never closed\nint x;\n"),
    ],
)
def test_a_licence_header_is_put_aside(text, header, rest):
    assert take_licence_header(text) == (header, rest)


def test_a_licence_header_stays_with_its_document_and_out_of_its_text():
    verdict = Filters(config("default")).judge("code", [HEADER + "def add(a, b):\n    return a + b\n"], [""])[0]
    assert verdict.text == "def add(a, b):\n    return a + b\n"
    assert verdict.aside == {"licence_header": HEADER.rstrip()} and verdict.reasons == []


NO_LINES = LineConfig("", 0, (), "")


@pytest.mark.parametrize(
    ("change", "stays", "goes"),
    [
        ({"ends": "。.…"}, "说完了。", "标题"),
        ({"min_words": 3}, "我们 学习 历史", "我们 学习"),
        ({"phrases": ("javascript",)}, "请打开脚本", "请启用JavaScript"),
    ],
)
def test_a_line_stays_or_goes(change, stays, goes):
    assert LineFilter(dataclasses.replace(NO_LINES, **change), "rjieba")(f"{goes}\n\n{stays}\n{goes}") == f"\n{stays}"


def test_lines_with_a_listed_word_go(tmp_path):
    (tmp_path / "bad.txt").write_text("赌场\n\n", encoding="utf-8")
    line_filter = LineFilter(dataclasses.replace(NO_LINES, word_lists=str(tmp_path)), "rjieba")
    assert line_filter("欢迎来到赌场玩\n我们学习历史") == "我们学习历史"
    with pytest.raises(UserError, match="no .txt file"):
        LineFilter(dataclasses.replace(NO_LINES, word_lists=str(tmp_path / "none")), "rjieba")


def test_a_list_of_words_in_another_encoding_is_named(tmp_path):
    (tmp_path / "words.txt").write_text("\ufeff赌场\n", encoding="utf-8")
    assert LineFilter(dataclasses.replace(NO_LINES, word_lists=str(tmp_path)), "rjieba")("去赌场") == ""
    (tmp_path / "gbk.txt").write_text("赌场\n", encoding="gbk")
    read_words.cache_clear()
    with pytest.raises(UserError, match=r"gbk\.txt is not in UTF-8"):
        LineFilter(dataclasses.replace(NO_LINES, word_lists=str(tmp_path)), "rjieba")


@pytest.fixture
def lists(tmp_path):
    """UT1's layout."""
    for name, content in {
        "adult/domains": "bad.com\nspam.cn\n# a comment\n",
        "adult/urls": "good.com/bad/\nwww.other.com/~x\nsho.rt/x\n",
        "press/domains": "news.com\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://bad.com/", "adult/domains: bad.com"),
        ("https://user@WWW.Bad.com:8080/x?y", "adult/domains: bad.com"),
        ("http://notbad.com/", None),
        ("http://bad.com.cn/", None),
        ("http://good.com/bad/page", "adult/urls: good.com/bad"),
        ("http://www.good.com/bad?x", "adult/urls: good.com/bad"),
        ("http://good.com/badminton", None),
        ("http://good.com/", None),
        ("http://www.other.com/~x?y", "adult/urls: www.other.com/~x"),  # the longest entry
        ("sho.rt/x", "adult/urls: sho.rt/x"),
        ("http://news.com/", "press/domains: news.com"),
        ("", None),
    ],
)
def test_hosts_and_paths_match_at_their_boundaries(lists, url, entry):
    assert UrlLists(UrlConfig(str(lists), (), "boundaries")).find(url) == entry


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://" + "x." * 20_000 + "bad.com/", "adult/domains: bad.com"),
        ("http://good.com/" + "bad/" * 100_000, "adult/urls: good.com/bad"),
        ("http://" + "a." * 20_000 + "cn/" + "b/" * 200_000, None),
        ("http://" + "." * 1_000_000 + "/" * 1_000_000, None),
    ],
    ids=["host", "path", "both", "marks"],
)
def test_an_address_without_end_is_looked_up_in_what_the_lists_are_long(lists, url, entry, monkeypatch):
    hashed = []
    monkeypatch.setattr(urls, "_hash", lambda entry, own=urls._hash: hashed.append(len(entry)) or own(entry))
    listed = UrlLists(UrlConfig(str(lists), (), "boundaries"))
    hashed.clear()
    assert listed.find(url) == entry
    assert sum(hashed) < 500  # characters


def test_only_the_chosen_categories_block(lists):
    chosen = UrlLists(UrlConfig(str(lists), ("adult",), "boundaries"))
    assert chosen.find("http://news.com/") is None and chosen.find("http://bad.com") is not None


def test_the_released_script_blocks_by_prefix_and_knows_no_domains(lists):
    released = UrlLists(UrlConfig(str(lists), (), "prefix"))
    assert released.find("http://sho.rt/xylophone") == "adult/urls: sho.rt/x"
    assert released.find("http://bad.com/") is None
    assert released.find("http://good.com/badminton") is None  # the entry ends in a slash


def test_a_listed_page_is_rejected_with_the_entry(lists):
    listed = dataclasses.replace(config("default"), urls=UrlConfig(str(lists), (), "boundaries"))
    texts = ["短。", "短。", "【一二三】。"]
    verdicts = Filters(listed).judge("zh_cc", texts, ["http://bad.com/1", "", "http://bad.com/2"])
    assert verdicts[0].reasons[0] == {"rule": "url_list", "value": "adult/domains: bad.com"}
    assert "url_list" not in {reason["rule"] for reason in verdicts[1].reasons}
    assert [reason["rule"] for reason in verdicts[2].reasons][:2] == ["bracketed", "url_list"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: UrlLists(UrlConfig(f"{folder}/none", (), "boundaries")), "no folder"),
        (lambda folder: UrlLists(UrlConfig(str(folder), ("games",), "boundaries")), "no category 'games'"),
        (lambda folder: UrlLists(UrlConfig(str(folder), ("press",), "prefix")), "no urls file"),
        (lambda folder: UrlConfig("", (), "suffix"), "'suffix' is not one of"),
        (lambda folder: RewriteConfig(False, "all", False, False), "'all' is not one of"),
    ],
)
def test_what_is_wrong_with_lists_and_settings_is_said(lists, make, message):
    with pytest.raises(UserError, match=message):
        make(lists)
