"""Charts: where things are, and that text is text."""

import xml.etree.ElementTree as ElementTree

import pytest

from pipeline.evaluate.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Line, chart, sparkline, whisker

UNIT = Axis("recall", 0, 1)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 600, [0, 200, 400, 600]),
        (0.1, 0.47, [0.1, 0.2, 0.3, 0.4]),
        (-2, 3, [-2, -1, 0, 1, 2, 3]),
        (0, 0, [0]),
    ],
)
def test_marks_are_round(low: float, high: float, marks: list[float]) -> None:
    assert Axis("", low, high).marks() == pytest.approx(marks)


class TestChart:
    def test_lines_are_where_their_points_are(self) -> None:
        drawn = ElementTree.fromstring(chart(UNIT, UNIT, [Line("all", [(0, 0), (0.5, 1), (1, 0.5)], "line-1")]))
        (line,) = drawn.iter("polyline")
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        assert points == [(LEFT, HEIGHT - BOTTOM), (middle[0], TOP), (WIDTH - RIGHT, middle[1])]

    def test_bars_stand_on_the_axis(self) -> None:
        drawn = ElementTree.fromstring(chart(UNIT, UNIT, [], [(0, 0.5, 0.25)]))
        (bar,) = drawn.iter("rect")
        assert float(bar.attrib["y"]) + float(bar.attrib["height"]) == HEIGHT - BOTTOM
        assert float(bar.attrib["height"]) == (HEIGHT - BOTTOM - TOP) / 4

    def test_text_is_escaped(self) -> None:
        drawn = ElementTree.fromstring(chart(Axis("<b>&", 0, 1), UNIT, [Line("</svg>", [(0, 0), (1, 1)], "line-1")]))
        assert {"<b>&", "</svg>"} <= {element.text for element in drawn.iter()}


def test_a_sparkline_is_as_high_as_its_values() -> None:
    (area,) = ElementTree.fromstring(sparkline([1, 0.5, 0])).iter("polygon")
    assert area.attrib["points"] == "0,22 0.0,0.0 44.0,11.0 88.0,22.0 88,22"


def test_a_whisker_reaches_over_its_interval() -> None:
    drawn = ElementTree.fromstring(whisker(0.5, 0.25, 1.5, UNIT))  # no further than the axis
    base, reach = drawn.iter("line")
    assert (base.attrib["class"], reach.attrib["x1"], reach.attrib["x2"]) == ("base", "45.0", "180.0")
    assert 'class="zero" x1="90.0"' in whisker(0.1, 0, 0.2, Axis("", -1, 1))
