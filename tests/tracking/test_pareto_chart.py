"""The page and the picture of Pareto fronts: what they hold, and that nothing in them is taken for HTML."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from compress.tracking.pareto import Estimate, Point, read_fronts
from compress.tracking.pareto_chart import Sweep, pareto_figure, pareto_page, pareto_picture

FRONTS = read_fronts([["accuracy", "tflite_bytes"], ["accuracy", "latency_p50"]], "")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028%{x}"


def point(label: str, accuracy: float, size: float, p50: float, *fronts: str, width: float | None = None) -> Point:
    values = {
        "accuracy": Estimate(accuracy, width),
        "tflite_bytes": Estimate(size, width),
        "latency_p50": Estimate(p50, width),
    }
    runs = {f"{label}-0": "0"} | ({f"{label}-1": "1"} if width is not None else {})
    return Point(label, runs, values, frozenset(fronts))


POINTS = [
    point("large", 95.0, 4000, 2.0, "tflite_bytes", "latency_p50"),
    point("small", 90.0, 1000, 2.0, "tflite_bytes", width=1.5),
    point("neither", 85.0, 4100, 2.5),
    point("not timed", 80.0, 900, math.nan, "tflite_bytes"),
]


def test_the_figure_is_one_that_plotly_knows():
    figure = go.Figure(pareto_figure([Sweep("", POINTS)], FRONTS))
    by_size, by_latency = ([t for t in figure.data if t.xaxis == axis] for axis in ("x", "x2"))
    assert [list(trace.x) for trace in by_size] == [[4100.0], [900.0, 1000.0, 4000.0]]
    assert [list(trace.x) for trace in by_latency] == [[2.0, 2.5], [2.0]]
    assert list(by_size[1].error_y.array) == [0.0, 1.5, 0.0]
    assert by_size[1].error_x.visible
    assert not by_latency[1].error_y.visible
    assert by_size[1].mode == "lines+markers"
    assert [details["label"] for details in by_size[1].customdata] == ["not timed", "small", "large"]


def test_fronts_of_three_objectives_have_a_panel_for_each_and_no_steps():
    joint = read_fronts(["accuracy", "tflite_bytes", "latency_p50"], "")
    points = [point("a", 95.0, 4000, 2.0, "tflite_bytes.latency_p50")]
    figure = go.Figure(pareto_figure([Sweep("", points)], joint))
    assert {trace.xaxis for trace in figure.data} == {"x", "x2"}
    assert {trace.mode for trace in figure.data} == {"markers"}


def test_several_sweeps_are_told_apart():
    figure = go.Figure(pareto_figure([Sweep("grid", POINTS), Sweep("search", POINTS)], FRONTS))
    fronts = [trace for trace in figure.data if trace.name.endswith("Pareto front") and trace.xaxis == "x"]
    assert [trace.name for trace in fronts] == ["grid: Pareto front", "search: Pareto front"]
    assert len({trace.marker.color for trace in fronts}) == 2


class Scripts(HTMLParser):
    """Collects the elements of a page and what is in its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = (dict(attrs).get("id") or "main") if tag == "script" else ""

    def handle_data(self, data):
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data

    def handle_endtag(self, tag):
        self._inside = ""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "pareto.html"
    sweep = Sweep(EVIL, [point(EVIL, 95.0, 4000, 2.0, "tflite_bytes"), *POINTS], "http://server:5000/", "7")
    pareto_page([sweep, Sweep("other", POINTS)], FRONTS, path, EVIL)
    return path


def test_the_page_carries_plotly_compressed_and_needs_no_network(page):
    assert page.stat().st_size < 2_200_000
    parsed = Scripts()
    parsed.feed(page.read_text())
    assert gzip.decompress(base64.b64decode(parsed.scripts["library"])).decode() == get_plotlyjs()
    text = re.sub(r'<script type="text/plain".*?</script>', "", page.read_text(), flags=re.S)
    assert not re.search(r'(src|href)="', text)


def test_nothing_that_comes_from_a_run_is_html(page):
    parsed = Scripts()
    parsed.feed(page.read_text())
    assert parsed.tags.count("script") == 3
    assert "img" not in parsed.tags
    figure = json.loads(parsed.scripts["figure"])
    evil = [trace for trace in figure["data"] if "alert" in trace["name"]]
    assert evil
    for trace in evil:
        assert "<script" not in trace["name"]
        # What plotly reads as its own few tags is escaped; what the page writes as text is not.
        assert all("<img" not in text and "<script" not in text for text in trace["text"])
        assert trace["hovertemplate"] == "%{text}<extra></extra>"
    labels = {details["label"] for trace in evil for details in trace["customdata"]}
    assert EVIL in labels


def test_a_click_knows_the_run(page):
    parsed = Scripts()
    parsed.feed(page.read_text())
    details = json.loads(parsed.scripts["figure"])["data"][1]["customdata"][0]
    assert details["server"] == "http://server:5000"
    assert details["runs"][0]["path"] == f"/#/experiments/7/runs/{details['runs'][0]['run']}"


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "https://me:secret@server"])
def test_only_a_plain_server_is_linked(uri):
    figure = pareto_figure([Sweep("", POINTS, uri, "7")], FRONTS)
    details = figure["data"][0]["customdata"][0]
    assert details["server"] == "http://127.0.0.1:5000"
    assert "secret" not in json.dumps(figure)


def test_the_picture(tmp_path):
    pareto_picture([Sweep("grid", POINTS), Sweep("search", POINTS[:2])], FRONTS, tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.width > picture.height > 300
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert (0xD1, 0x49, 0x5B) in colors
    assert (0x1F, 0x5F, 0xA8) in colors
