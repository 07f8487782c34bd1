"""The frame of the report pages: tables and charts."""

import math
import re
import xml.etree.ElementTree

import pytest

from ctllm_jax.common import html

NASTY = "<script>alert('1 & \"2\"')</script>"


def svg(figure: str) -> xml.etree.ElementTree.Element:
    """The drawing in a chart's HTML; a parse error where it is not well-formed."""
    return xml.etree.ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.S).group())


def test_whatever_comes_from_outside_is_escaped():
    parts = [
        html.page(NASTY, NASTY, [(NASTY, "")]),
        html.paragraph(NASTY),
        html.heading(NASTY),
        html.quote(NASTY),
        html.details(NASTY, ""),
        html.cards({NASTY: NASTY}),
        html.table([NASTY], [[NASTY]]),
        html.line_chart(NASTY, {NASTY: [(0, 1), (1, 2)]}, NASTY, {NASTY: 1.5}),
        html.line_chart(NASTY, {NASTY: [(0, 1)], "b": [(1, 2)]}, NASTY, faint={NASTY: [(0, 1)]}),
        html.bar_chart(NASTY, {NASTY: 1}),
        html.stacked_bars(NASTY, {NASTY: {NASTY: 1, "b": 2}}, NASTY),
        html.shaded([(NASTY, 0.5, NASTY)]),
    ]
    for part in parts:
        assert "<script" not in part and "&lt;script&gt;" in part and "&quot;2&quot;" in part
    assert html.paragraph(html.raw("<b>x</b>")) == '<p class=""><b>x</b></p>'


def test_tables_write_numbers_for_people_and_set_their_columns_flush_right():
    table = html.table(["name", "n", "share"], [["a", 1234567, 0.123456], ["b", None, 12345.6]])
    assert "<td>a</td>" in table
    assert '<td class="number">1,234,567</td>' in table and '<td class="number"></td>' in table
    assert '<td class="number">0.1235</td>' in table and '<td class="number">12,346</td>' in table
    assert "<th>name</th>" in html.table(["name"], [])


@pytest.mark.parametrize("line", [[], [(1.0, math.nan)], [(math.inf, 1.0)]])
def test_a_chart_without_points_says_so(line):
    assert html.line_chart("loss", {"train": line}, "step") == html.paragraph("loss: no data", "soft")


@pytest.mark.parametrize("x", [0.0, 1.0, 3e9, -5e17])
@pytest.mark.parametrize("y", [0.0, 2.5, 1e20])
def test_a_chart_of_one_point_shows_it(x, y):
    (dot,) = svg(html.line_chart("loss", {"eval": [(x, y)]}, "step")).findall("circle")
    assert 0 <= float(dot.get("cx")) <= 500 and 0 <= float(dot.get("cy")) <= 250


def test_a_line_lies_inside_its_chart_and_skips_what_is_not_finite():
    points = [(0, 5.0), (10, math.nan), (20, 1.0), (30, math.inf), (40, 3.0)]
    drawing = svg(html.line_chart("loss", {"train": points, "eval": [(20, 2.0), (40, 1.5)]}, "step", {"goal": 0.5}))
    first, second = [line.get("points").split() for line in drawing.findall("polyline")]
    assert len(first) == 3 and len(second) == 2
    for point in first + second:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 500 and 0 <= y <= 250
    assert "goal" in [text.text for text in drawing.findall("text")]


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios_and_leaves_out_what_it_cannot_show():
    points = [(0, 0.01), (1, 0.1), (2, 1.0), (3, 0.0), (4, -1.0), (5, 10.0)]
    drawing = svg(html.line_chart("loss", {"train": points}, "step", log=True))
    line = [float(point.split(",")[1]) for point in drawing.find("polyline").get("points").split()]
    steps = [a - b for a, b in zip(line, line[1:], strict=False)]
    assert len(line) == 4 and steps == pytest.approx([steps[0]] * 3, abs=0.11) and steps[0] > 20
    assert {"0.01", "0.1", "1", "10"} <= {text.text for text in drawing.findall("text")}
    narrow = svg(html.line_chart("loss", {"train": [(0, 2.1), (1, 2.9)]}, "step", log=True))
    assert {"2.2", "2.6"} <= {text.text for text in narrow.findall("text")}


def test_single_values_lie_pale_behind_their_mean_and_may_leave_the_frame():
    single = [(x, 1.0 + x % 2) for x in range(400)] + [(400, 1000.0)]
    chart = html.line_chart("loss", {"a": [(0, 1.5), (400, 1.5)], "b": [(0, 1), (400, 2)]}, "step", faint={"a": single})
    pale, first, second = svg(chart).findall("polyline")
    assert pale.get("stroke") == first.get("stroke") != second.get("stroke") and pale.get("stroke-opacity") == "0.3"
    heights = [float(point.split(",")[1]) for point in pale.get("points").split()]
    assert max(heights) - min(heights[:-1]) > 100 and heights[-1] == min(heights)
    assert chart.count("</i>") == 2 and html.line_chart("loss", {"a": [(0, 1)]}, "step").count("</i>") == 0


def test_points_tell_their_values_and_are_not_too_many():
    drawing = svg(html.line_chart("loss", {"train": [(x, float(x)) for x in range(1000)]}, "step"))
    told = [dot.find("title").text for dot in drawing.findall("circle")]
    assert told[0] == "train, step 0: 0" and 40 < len(told) < 80


@pytest.mark.parametrize(("tick", "text"), [(20_000, "20k"), (1.5e6, "1.5M"), (5000, "5000"), (2e-5, "2e-05")])
def test_round_numbers_are_short(tick, text):
    assert html._short(tick) == text


def test_stacked_bars_divide_one_length_as_their_parts():
    drawing = svg(html.stacked_bars("time", {"a": {"x": 30.0, "y": 10.0}, "b": {"x": 0.0, "y": 0.0}}, " s"))
    assert [float(bar.get("width")) for bar in drawing.findall("rect")] == [225, 75, 0, 0]
    assert [float(bar.get("x")) for bar in drawing.findall("rect")][:2] == [110, 335]
    assert "40 s" in [text.text for text in drawing.findall("text")]
    assert drawing.find("rect").find("title").text == "a, x: 30 s"


def test_bars_are_as_long_as_their_values():
    drawing = svg(html.bar_chart("reasons", {"a": 4, "b": 1, "c": 0}))
    widths = [float(bar.get("width")) for bar in drawing.findall("rect")]
    assert widths == [250.0, 62.5, 0.0]
    svg(html.bar_chart("nothing", {}))
