"""The page of a report in a real browser, from a file, with the network watched."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api as playwright

from compressed_format.inspection import Inspection
from compressed_format.inspection.report import write_report
from tests.inspection.inspections import HOSTILE, an_inspection

# What keeps a browser from reaching for the network on its own, and lets it run in a container.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        reason = "there is no chromium or google-chrome on PATH; `make browser` installs one, BROWSER_PATH names one"
        if os.environ.get("COMPRESSED_FORMAT_REQUIRE_BROWSER", "") not in ("", "0"):
            pytest.fail(reason)
        pytest.skip(reason)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page of an inspection and waits for its plots; in the end, nothing may have gone wrong in it."""
    wrong: list[str] = []
    requests: list[str] = []
    pages: list[Any] = []
    file = tmp_path / "report.html"

    def opened(inspection: Inspection, *, scheme: str = "light") -> Any:
        write_report(inspection, file)
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector(f"html[data-drawn={scheme}]")
        return page

    yield opened
    for page in pages:
        page.close()
    assert wrong == []
    assert set(requests) == {file.as_uri()}


def bars(page: Any) -> list[int]:
    """How many bars with any height each colour of the plot of sizes has."""
    script = """traces => traces.map(
        trace => Array.from(trace.querySelectorAll('.point path')).filter(path => path.getBBox().height > 0).length
    )"""
    counts: list[int] = page.locator("#size .barlayer .trace").evaluate_all(script)
    return counts


def test_each_layer_has_its_marks_and_is_named_where_one_points(visit: Callable[..., Any]) -> None:
    page = visit(an_inspection(layers=5))
    # Two schemes in five layers; what is not compressed is in all seven; what is saved again in five.
    assert bars(page) == [5, 5, 7, 5]
    assert (
        page.locator("#bits .scatterlayer .trace.scatter").count() == 4
    )  # a line, two schemes, and what is pointed at
    assert page.locator("#bits .scatterlayer .trace:nth-child(2) .point").count() == 5
    assert page.locator(".parts figure").count() == 2
    for part in ("#error-0", "#error-1"):
        assert page.locator(f"{part} .scatterlayer .trace").count() == 3
        assert page.locator(f"{part} .scatterlayer .trace:nth-child(1) .point").count() == 5
        assert page.locator(f"{part} .scatterlayer .trace:nth-child(2) .point").count() == 5
    bar = page.locator("#size .barlayer .trace:nth-child(3) .point").nth(3).bounding_box()
    plot = page.locator("#size").bounding_box()
    page.mouse.move(bar["x"] + bar["width"] / 2, plot["y"] + plot["height"] / 3)  # far above the bar
    page.wait_for_selector("#size .hovertext")
    text = page.locator("#size .hoverlayer").text_content()
    assert text.startswith("model.layers.22.20 kB int4 group 64 symmetric4.22 kB int8")  # layer 2, 2.20 kB


def test_without_a_reference_there_are_no_errors_to_show(visit: Callable[..., Any]) -> None:
    page = visit(an_inspection(errors=False))
    assert page.locator(".parts").count() == 0
    assert "Error of each layer" not in page.inner_text("body")
    assert page.locator("#modules thead th").count() == 5


def test_long_models_stay_readable(visit: Callable[..., Any]) -> None:
    """Two stacks, of 320 layers and of 30, between an embedding and a head."""
    page = visit(an_inspection(layers=320, experts=4, names=tuple(f"visual.blocks.{n}.qkv" for n in range(30))))
    assert bars(page)[:2] == [350, 320]
    assert page.locator("#modules tbody tr").count() == 3 * 320 + 30
    overlaps = """ticks => {
        const boxes = ticks.filter(tick => tick.textContent).map(tick => tick.getBoundingClientRect());
        if (boxes.some(box => box.width === 0)) throw new Error("a tick is hidden");
        return boxes.slice(1).filter((box, index) => box.left < boxes[index].right).length;
    }"""
    ticks = page.locator("#size .xtick text")
    assert 5 < ticks.count() <= 20
    assert ticks.evaluate_all(overlaps) == 0
    assert {"embed_tokens", "lm_head", "300"} <= set(ticks.all_text_contents())
    assert page.locator("#size .annotation-text").all_text_contents() == ["layers", "blocks"]
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_selector("html[data-width=narrow]")
    assert ticks.evaluate_all(overlaps) == 0
    assert "300" in ticks.all_text_contents()


def test_the_page_is_as_wide_as_the_window(visit: Callable[..., Any]) -> None:
    page = visit(an_inspection(names=("a_module_with_a_name_that_is_" + "very_" * 20 + "long",)))
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        misfits = """svgs => svgs.filter(
            svg => Math.abs(svg.getBoundingClientRect().width - svg.closest('.plot').clientWidth) > 1
        ).length"""
        while page.locator(".main-svg").evaluate_all(misfits):  # they follow a little later
            page.wait_for_timeout(20)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for plot in page.locator(".plot .main-svg").all():
            box = plot.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width


# colours -------------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance as of WCAG 2, of ``rgb(...)``."""
    channels = [float(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def colours(page: Any) -> dict[str, str]:
    """The colours that are seen: of the page, of texts and of marks."""
    found = {
        "page": ("html", "backgroundColor"),
        "section": ("section:nth-of-type(2)", "backgroundColor"),
        "text": ("h2#schemes", "color"),
        "quiet text": ("td + td .quiet, th .quiet", "color"),
        "heading of a column": ("#modules thead button", "color"),
        "tick": ("#size .ytick text", "fill"),
        "first scheme": ("#size .barlayer .trace:nth-child(1) .point path", "fill"),
        "second scheme": ("#size .barlayer .trace:nth-child(2) .point path", "fill"),
        "not compressed": ("#size .barlayer .trace:nth-child(3) .point path", "fill"),
        "whole weight": ("#error-0 .scatterlayer .trace:nth-child(1) .point", "fill"),
        "worst channel": ("#error-0 .scatterlayer .trace:nth-child(2) .point", "fill"),
    }
    script = "(element, property) => getComputedStyle(element)[property]"
    return {name: page.locator(place).first.evaluate(script, key) for name, (place, key) in found.items()}


TEXTS = ("text", "quiet text", "heading of a column", "tick")
MARKS = ("first scheme", "second scheme", "not compressed", "whole weight", "worst channel")


def test_both_colour_schemes_can_be_read_and_are_followed(visit: Callable[..., Any]) -> None:
    page = visit(an_inspection(), scheme="light")
    light, light_series = colours(page), palette(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-drawn=dark]")
    dark, dark_series = colours(page), palette(page)
    assert luminance(light["page"]) > 0.8
    assert luminance(dark["page"]) < 0.05
    for found in (light, dark):
        for name in TEXTS:
            assert contrast(found[name], found["section"]) >= 4.5, name
        for name in MARKS:
            assert contrast(found[name], found["section"]) >= 3, name
    for found, series in ((light, light_series), (dark, dark_series)):
        assert len({*series, found["not compressed"]}) == 9
        assert all(contrast(colour, found["section"]) >= 3 for colour in series)
    assert not {light[name] for name in light} & {dark[name] for name in dark}
    page.emulate_media(color_scheme="light")
    page.wait_for_selector("html[data-drawn=light]")
    assert colours(page) == light


def palette(page: Any) -> list[str]:
    script = """surface => Array.from({ length: 8 }, (_, number) => {
        surface.style.color = `var(--series-${number})`;
        const colour = getComputedStyle(surface).color;
        surface.style.color = "";
        return colour;
    })"""
    found: list[str] = page.locator("section").nth(1).evaluate(script)
    return found


# the table -----------------------------------------------------------------------------------------------------------


def test_the_table_is_sorted_by_numbers_both_ways(visit: Callable[..., Any]) -> None:
    page = visit(an_inspection(layers=12))

    def column(index: int) -> list[str]:
        return [row.locator("th, td").nth(index).inner_text() for row in page.locator("#modules tbody tr").all()]

    before = column(0)
    assert before[:3] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", *before[2:3]]
    heading = page.locator("#modules thead th", has_text="Signal to noise")
    assert heading.get_attribute("aria-sort") == "none"
    heading.locator("button").click()
    ratios = [float(text.removesuffix(" dB")) for text in column(5)]
    assert heading.get_attribute("aria-sort") == "ascending"
    assert ratios == sorted(ratios)
    assert len(set(ratios)) > 12
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert [float(text.removesuffix(" dB")) for text in column(5)] == sorted(ratios, reverse=True)
    name = page.locator("#modules thead th", has_text="Module")
    name.locator("button").click()
    assert column(0) == before  # by place in the model: layer 2 comes before layer 10
    assert heading.get_attribute("aria-sort") == "none"


def test_what_was_not_compared_is_last_either_way(visit: Callable[..., Any]) -> None:
    inspection = an_inspection(layers=3)
    without = replace(inspection.modules[2], error=None)
    page = visit(replace(inspection, modules=(*inspection.modules[:2], without, *inspection.modules[3:])))
    button = page.locator("#modules thead th", has_text="Signal to noise").locator("button")
    for _ in range(2):
        button.click()
        assert page.locator("#modules tbody tr").last.locator("td").nth(4).inner_text() == "not compared"


def test_the_table_is_filtered_by_words(visit: Callable[..., Any]) -> None:
    page = visit(an_inspection(layers=12))
    page.fill("#filter", "layers.1 INT8")
    shown = page.locator("#modules tbody tr:visible")
    assert shown.count() == 3
    assert shown.first.locator("th").inner_text() == "model.layers.1.mlp.down_proj"
    assert page.inner_text("#shown") == "3 of 24"
    page.fill("#filter", "")
    assert shown.count() == 24


# names ---------------------------------------------------------------------------------------------------------------


def test_hostile_names_do_nothing_and_are_shown(visit: Callable[..., Any]) -> None:
    many = tuple(f"{name}.{layer}.fc" for name in HOSTILE for layer in range(2))
    page = visit(an_inspection(names=(*HOSTILE, *many)))
    page.wait_for_timeout(100)  # for a handler that would run late
    assert page.evaluate("window.hurt") is None
    assert page.locator("body img, body a, iframe, object").count() == 0
    text = page.inner_text("body")
    for name in HOSTILE[:-1]:
        assert name in text
    titles = page.locator(".parts h3").all_inner_texts()
    assert "outside of stacks" in titles
    # Plotly's texts are no HTML either: a hostile layer is pointed at, and its name is there to the letter.
    page.locator("#size").scroll_into_view_if_needed()
    bars = page.locator("#size .barlayer .trace:first-child .point").all()
    boxes = [box for box in (bar.bounding_box() for bar in bars) if box["height"] > 0]
    hovered = []
    for box in boxes:
        page.mouse.move(0, 0)
        page.wait_for_selector("#size .hovertext", state="detached")
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 1)
        page.wait_for_selector("#size .hovertext")
        hovered.append(page.locator("#size .hoverlayer").text_content())
        assert page.locator("#size .hoverlayer a, #size .hoverlayer img").count() == 0
    for name in HOSTILE[:-1]:
        assert any(text.startswith(f"{name}2.20 kB") for text in hovered), name
    assert page.evaluate("window.hurt") is None
