"""The page of a report, without a browser: what is in it, and how it is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compressed_format.checkpoint import syscalls
from compressed_format.errors import CheckpointError
from compressed_format.inspection.figures import MAX_SERIES, series_of
from compressed_format.inspection.layers import layers_of, module_rows, parts_of
from compressed_format.inspection.report import MAX_PARTS, render_report, write_report
from tests.inspection.inspections import HOSTILE, an_inspection


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data if self.tags and self.tags[-1][0] not in ("script", "style") else ""


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def test_figures_are_what_plotly_takes() -> None:
    """Plotly's own validation, with a colour in the place of the page's."""
    import plotly.graph_objects

    def coloured(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: "#123456" if key.endswith("color") and str(item).startswith("@") else coloured(item)
                for key, item in value.items()
            }
        return [coloured(item) for item in value] if isinstance(value, list) else value

    found = figures(render_report(an_inspection(experts=2, names=("head",))))
    assert set(found) == {"size", "bits", "error-0", "error-1", "error-2", "error-3"}
    for figure in found.values():
        plotly.graph_objects.Figure(coloured(figure))


def test_bars_add_up_to_the_dense_model() -> None:
    inspection = an_inspection(layers=7)
    data = figures(render_report(inspection))["size"]["data"]
    bars = {trace["name"]: trace["y"] for trace in data if trace["type"] == "bar"}
    assert sum(value or 0 for values in bars.values() for value in values) == inspection.dense_nbytes
    assert sum(value or 0 for value in bars["int4 group 64 symmetric"]) == inspection.schemes[0].nbytes
    assert {len(values) for values in bars.values()} == {9}  # the embedding, seven layers, the head


def test_experts_are_one_row_of_their_layer() -> None:
    inspection = an_inspection(layers=3, experts=40)
    rows = [row for row in module_rows(inspection) if "experts" in row.name]
    assert [row.name for row in rows] == [f"model.layers.{layer}.mlp.experts.*.up_proj" for layer in range(3)]
    assert [row.count for row in rows] == [40, 40, 40]
    one = [module for module in inspection.modules if module.name.startswith("model.layers.1.mlp.experts.")]
    assert rows[1].nbytes == sum(module.nbytes for module in one)
    errors = {module.name: module.error for module in one}
    assert rows[1].error is not None
    assert rows[1].worst is not None
    worst = errors[rows[1].worst]
    assert worst is not None
    assert worst.worst_row_snr == min(error.worst_row_snr for error in errors.values() if error is not None)
    assert rows[1].error.worst_row_snr == worst.worst_row_snr


def test_layers_are_in_the_order_of_the_model() -> None:
    names = [layer.name.layer if layer.name else "rest" for layer in layers_of(an_inspection(layers=11))]
    assert names == ["model.embed_tokens", *(f"model.layers.{n}" for n in range(11)), "lm_head"]


def test_what_is_small_and_in_no_stack_is_shown_together() -> None:
    layers = layers_of(an_inspection(layers=200, experts=8, names=("one", "two")))
    assert layers[-1].name is None
    assert {"one", "two"} <= set(layers[-1].members)


def test_more_parts_than_can_be_looked_at_are_named() -> None:
    names = tuple(f"blocks.{layer}.part_{part:02}" for part in range(MAX_PARTS + 3) for layer in range(2))
    inspection = an_inspection(names=names)
    parts = parts_of(module_rows(inspection))
    page = render_report(inspection)
    assert len([name for name in figures(page) if name.startswith("error-")]) == MAX_PARTS < len(parts)
    assert "Without a plot, in the table below only: part_" in page


def test_schemes_beyond_the_colours_share_the_last() -> None:
    assert [series_of(scheme) for scheme in (0, MAX_SERIES - 1, MAX_SERIES, 40)] == [
        *(0, MAX_SERIES - 1, MAX_SERIES, MAX_SERIES)
    ]


def test_names_are_text_wherever_they_stand() -> None:
    plain, hostile = (Page(render_report(an_inspection(names=names))) for names in (("a", "b"), HOSTILE))
    assert {tag for tag, _ in plain.tags} == {tag for tag, _ in hostile.tags}
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)
    assert sum(tag == "script" for tag, _ in hostile.tags) == 3
    for name in HOSTILE[:-1]:
        assert name in hostile.text
    assert r"a\u202eb\x1b[31m\ud800" in hostile.text


def test_nothing_is_asked_of_a_network() -> None:
    page = render_report(an_inspection())
    parsed = Page(page)
    assert not any({"src", "href", "action"} & attributes.keys() for _, attributes in parsed.tags)
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and "content" in a and "src" in str(a["content"]))
    assert str(policy).startswith("default-src 'none'; ")
    assert len(page) < 2_500_000


def test_the_page_can_be_heard() -> None:
    """Language, title, one main heading, headings in order, captions, and names of everything that is operated."""
    parsed = Page(render_report(an_inspection(names=("fc",))))
    tags = [tag for tag, _ in parsed.tags]
    assert ("html", {"lang": "en"}) in parsed.tags
    assert tags.count("title") == tags.count("h1") == tags.count("main") == 1
    assert tags.count("caption") == tags.count("table") == 4
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in zip([0, *levels], levels, strict=False))
    assert all(attributes.get("scope") for tag, attributes in parsed.tags if tag == "th")
    labelled = {attributes["for"] for tag, attributes in parsed.tags if tag == "label"}
    assert {attributes["id"] for tag, attributes in parsed.tags if tag == "input"} == labelled
    plots = [attributes for _, attributes in parsed.tags if "plot" in (attributes.get("class") or "").split()]
    assert plots
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)


# writing -------------------------------------------------------------------------------------------------------------


def test_a_report_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text("old")
    write_report(an_inspection(), file)
    assert file.read_text(encoding="utf-8") == render_report(an_inspection())
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    file.write_text("old")

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(syscalls, "write", full)
    with pytest.raises(CheckpointError, match=r"report\.html: the report cannot be written: No space left"):
        write_report(an_inspection(), file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_no_place_for_a_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder; name a file, such as report\.html"):
        write_report(an_inspection(), tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        write_report(an_inspection(), tmp_path / "missing" / "report.html")


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_what_is_missing_is_named(package: str) -> None:
    program = f"""
import sys
sys.modules[{package!r}] = None
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from compressed_format import CompressedFormatError
from compressed_format.inspection.report import write_report
from tests.inspection.inspections import an_inspection
try:
    write_report(an_inspection(), "never.html")
except CompressedFormatError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    expected = f"a report needs {package}, which is not installed: pip install 'compressed-format[report]'\n"
    assert result.stdout == expected


def test_an_inspection_needs_none_of_them() -> None:
    program = "import sys, compressed_format.inspection; print({'jinja2', 'plotly', 'rich'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"
