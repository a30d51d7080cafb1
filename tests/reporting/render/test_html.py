import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from lightning_compress.reporting import LayerReport, Report, report
from lightning_compress.reporting.render.html import layer_bars, summary_cards
from lightning_compress.reporting.render.plot import curve_plot

VOID = {"meta", "br", "line", "path", "circle", "rect"}


class Page(HTMLParser):
    """Checks that every tag is closed by its own end, and gathers texts, tags and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.tags, self.attributes = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(" ".join(data.split()))


def layer(name="fc", **values):
    plain = {
        "type": "Linear", "shape": (10, 10), "parameters": 110, "nonzero": 35, "weights": 100, "weights_nonzero": 25,
        "size_bytes": 440, "size_bytes_sparse": 160, "macs": 100, "macs_nonzero": 25,
    }  # fmt: skip
    return LayerReport(name=name, **(plain | values))


def a_report(*layers, **values):
    return Report(
        **({"name": "Net", "layers": layers, "size_bytes": 4400, "size_bytes_sparse": 1000, "macs_batch": 1} | values)
    )


def test_a_page_of_a_measured_model_tells_all_of_it(tmp_path):
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
    dense = report(model, torch.ones(2, 20), metrics={"error": 1.25}, runs=2)
    after = report(
        model,
        torch.ones(2, 20),
        baseline=dense,
        metrics={"error": 1.5},
        history={"Sparsity": [(0, 0), (9, 0.5)]},
        runs=2,
    )
    page = Page(after.save(tmp_path / "r.html").read_text(encoding="utf-8"))
    headings = ["Sparsity over steps", "Totals", "Layer by layer", "All layers", "How it was measured"]
    assert [text for text in page.texts if text in headings] == headings
    assert {"20 x 10", "10 x 20"} & set(page.texts) == {"10 x 20"}
    assert "1.25" in page.texts
    assert "1.5" in page.texts
    assert any("2 runs after 1 to warm up, threads: 1" in text for text in page.texts)


def test_the_page_needs_no_network_and_no_script():
    html = a_report(layer(), history={"sparsity": ((0, 0.0), (5, 0.5))}).to_html()
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html


def test_every_name_is_escaped():
    evil = "<script>alert('x')</script>\"&"
    one = a_report(
        layer(evil, type=evil),
        name=evil,
        metrics={evil: 1.0},
        notes=(evil,),
        environment={evil: evil},
        before=a_report(layer(evil), metrics={evil: 2.0}),
    )
    html = one.to_html()
    assert "<script" not in html
    page = Page(html)
    assert "script" not in page.tags
    assert page.texts.count(evil) >= 6
    assert ("title", evil) in page.attributes


def test_a_page_without_input_history_or_layers_has_no_empty_section():
    page = Page(a_report(macs_batch=None).to_html())
    assert "Sparsity over steps" not in page.texts
    assert "Layer by layer" not in page.texts
    assert "Notes" not in page.texts


def test_cards_compare_with_the_model_before():
    before = a_report(layer(nonzero=110, weights_nonzero=100), metrics={"error": 1.0})
    size, nonzero, sparsity, error = summary_cards(a_report(layer(), before=before, metrics={"error": 2.0}))
    assert (size.before, size.after) == ("4.40 kB", "1.00 kB")
    assert "4.40x smaller" in size.remark
    assert (nonzero.before, nonzero.after, nonzero.remark) == ("110", "35", "3.14x smaller")
    assert (sparsity.before, sparsity.after) == ("0 %", "75.00 %")
    assert (error.label, error.before, error.after) == ("error", "1", "2")


def test_bars_are_to_the_scale_of_the_largest_layer():
    large, small, none = layer("a"), layer("b", parameters=55, nonzero=55, weights_nonzero=100), layer("c", weights=0)
    first, second = layer_bars(a_report(large, small, none))
    assert (first.sparsity_percent, first.share_percent, first.left_percent) == (75.0, 100.0, pytest.approx(3500 / 110))
    assert (second.sparsity_percent, second.share_percent, second.left_percent) == (0.0, 50.0, 50.0)
    assert first.share == "40.00 %"  # 110 of 110 + 55 + 110


def test_the_plot_is_a_staircase_from_0_to_100_percent():
    plot = curve_plot("Sparsity", [(0, 0.0), (50, 0.5), (100, 1.0)])
    # 720 wide with 52 left and 20 right, 240 high with 14 above and 34 below
    assert plot.line == "M52.0 206.0H376.0V110.0H700.0V14.0"
    assert [tick.text for tick in plot.up] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert [tick.text for tick in plot.across] == ["0", "20", "40", "60", "80", "100"]
    assert plot.label == "Sparsity from 0 % at step 0 to 100 % at step 100"


def test_what_is_no_fraction_has_a_scale_of_its_own():
    plot = curve_plot("bits", [(0, 16.0), (4, 8.0), (8, 4.0)])
    assert plot.line == "M52.0 14.0H376.0V110.0H700.0V158.0"
    assert [tick.text for tick in plot.up] == ["0", "5", "10", "15"]
    assert plot.up[1].at == 146.0  # 5 of 16 from 206 to 14
    assert (plot.end_text, plot.label) == ("4", "bits from 16 at step 0 to 4 at step 8")
    assert curve_plot("loss", [(0, -2.0), (2, 2.0)]).line == "M52.0 206.0H700.0V14.0"
    assert curve_plot("loss", [(0, 3.0)]).up


@pytest.mark.parametrize(
    "history", [[(7, 0.5)], [(3, 0.1), (3, 0.2)], [(5, 0.9), (1, 0.1)], [(10**9, 0.0), (10**9 + 1, 1)]]
)
def test_odd_histories_are_plotted(history):
    plot = curve_plot("Sparsity", history)
    numbers = [float(number) for number in re.findall(r"[\d.]+", plot.area)]
    assert all(0 <= number <= 720 for number in numbers)
    assert plot.across


def test_a_long_history_is_thinned_and_keeps_its_ends():
    plot = curve_plot("Sparsity", [(step, step / 100_000) for step in range(100_001)])
    assert plot.line.count("H") <= 1001
    assert plot.line.startswith("M52.0 206.0")
    assert plot.line.endswith("V14.0")


def test_many_layers_make_as_many_rows():
    layers = [layer(f"blocks.{place}") for place in range(60)]
    page = Page(replace(a_report(), layers=tuple(layers)).to_html())
    assert sum(text == "blocks.59" for text in page.texts) == 2
    assert page.tags.count("tr") == 1 + 12 + 1 + 60
