from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from autoq.report import frontier_png, render_frontier_html, render_html, report_data

VOID = {"br", "meta"}
HOSTILE = "<script>alert('1')</script>\"&"


class Outline(HTMLParser):
    """Refuses elements that are not closed in order; collects texts, names and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert not outline.open
    return outline


def titles(page: str) -> list[str]:
    return re.findall(r"<title>([^<]*)</title>", page)


def test_page_is_well_formed_and_names_every_group(make_summary, plans):
    summary = make_summary(blocks=3)
    outline = parsed(render_html(report_data(summary, plans)))
    for group in summary["groups"]:
        for place in (f"{group['name']} in fp8: loss", f"{group['name']}: {group['format']}"):
            assert any(text.startswith(place) for text in outline.texts)
        assert group["name"] in outline.texts  # the table
    assert "llama-ab12" in outline.texts
    assert "lm_head" in outline.texts
    assert "the output layer" in outline.texts


def test_page_says_what_the_key_value_cache_is(make_summary, plans):
    layers = [("a", "fp8"), ("b", "nvfp4"), ("c", "nvfp4")]
    cache = {
        "bits": 5.6666,
        "bytes_per_token": 1088.0,
        "predicted_loss": 0.00042,
        "layers": [{"name": name, "format": fmt} for name, fmt in layers],
    }
    texts = parsed(render_html(report_data(make_summary(kv_cache=cache), plans))).texts
    assert "key/value cache" in texts
    assert "nvfp4 in 2 layers, fp8 in 1 layer" in texts
    more = "5.667 bits per element, 1,088 bytes per token, predicted loss 4.200e-04"
    assert more in texts, [text for text in texts if "per element" in text]
    assert "key/value cache" not in parsed(render_html(report_data(make_summary(), plans))).texts


def test_page_fetches_nothing(make_summary, plans):
    page = render_html(report_data(make_summary(), plans))
    outline = parsed(page)
    assert not outline.names & {"script", "link", "img", "iframe", "object"}
    assert not [name for name, _ in outline.attributes if name in {"src", "href", "xlink:href"}]
    assert "url(" not in page
    assert "@import" not in page


def test_names_are_escaped_everywhere(make_summary, plans):
    summary = make_summary(study=HOSTILE, model=HOSTILE)
    for group in summary["groups"]:
        group["name"] = group["name"].replace("self_attn", HOSTILE)
        group["reason"] = HOSTILE
    summary["groups"][0]["format"] = HOSTILE
    summary["groups"][0]["scores"][HOSTILE] = 0.5
    summary["excluded"][0]["name"] = HOSTILE
    summary["measurements"][0]["label"] = HOSTILE
    summary["measured"] = {HOSTILE: 1.0}
    summary["configuration"] = {HOSTILE: HOSTILE}
    summary["timings_s"] = {HOSTILE: 1.0}
    summary["export"] = {"path": HOSTILE, "container": HOSTILE, "stored_bytes": 1, "files": []}
    data = report_data(summary, plans)
    for page in (render_html(data), render_frontier_html(data, plans)):
        assert "script" not in parsed(page).names
        assert "<script>" not in page
        assert HOSTILE in "".join(parsed(page).texts)


def test_chosen_cell_is_outlined_once_per_group(make_summary, plans):
    summary = make_summary(blocks=4)
    page = render_html(report_data(summary, plans))
    assert page.count('class="outline"') == len(summary["groups"])
    chosen = [title for title in titles(page) if title.endswith("; chosen")]
    assert len(chosen) == len(summary["groups"])
    assert any(title.startswith("model.layers.0.mlp.down_proj in none") for title in chosen)


def test_formats_that_a_group_cannot_take_are_barred(make_summary, plans):
    summary = make_summary()
    summary["groups"][1]["scores"]["nvfp4"] = None
    page = render_html(report_data(summary, plans))
    assert page.count('class="cell barred"') == 1
    assert f"{summary['groups'][1]['name']} in nvfp4: cannot take this format" in titles(page)
    assert "nvfp4 where it fits" in page
    assert "all fp8" in page


def test_uniform_plans_are_placed_by_hand_computed_numbers(make_summary, plans):
    summary = make_summary(blocks=1)
    summary["groups"][2]["scores"]["nvfp4"] = None
    uniform = {point.label: point for point in report_data(summary, plans).uniform}
    assert uniform["all fp8"].effective_bits == 8.0
    assert uniform["all fp8"].predicted_loss == pytest.approx(0.003)
    partly = uniform["nvfp4 where it fits"]
    assert partly.effective_bits == pytest.approx((4.5 + 4.5 + 16) / 3)
    assert partly.predicted_loss == pytest.approx(0.03)


def test_measured_points_share_the_axis_only_in_the_same_unit(make_summary, plans):
    mark = "measured KL divergence, 95 %"
    comparable = render_html(report_data(make_summary(), plans))
    relative = render_html(report_data(make_summary(unit="relative"), plans))
    assert mark in comparable
    assert 'class="diagonal"' in comparable
    assert mark not in relative
    assert 'class="diagonal"' not in relative


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"measurements": [], "measured": {}}, id="nothing_measured"),
        pytest.param({"excluded": [], "timings_s": {}, "versions": {}}, id="empty_tables"),
        pytest.param(
            {"predicted_loss": None, "predicted_loss_interval": None, "bound": None, "gap": None},
            id="no_prediction",
        ),
        pytest.param({"predicted_loss": 0.0, "bound": 0.0, "gap": 0.0}, id="no_loss"),
    ],
)
def test_page_does_without(make_summary, changes):
    page = render_html(report_data(make_summary(**changes), []))
    parsed(page)
    assert "nan" not in page.lower().replace("nand", "")
    assert ">inf" not in page


def test_groups_without_any_score_still_give_a_page(make_summary):
    summary = make_summary(unit="relative", measurements=[])
    for group in summary["groups"]:
        group["scores"] = {"fp8": 0.0, "nvfp4": -1e-9}
    parsed(render_html(report_data(summary, [])))


def test_stacks_and_layers_outside_blocks_have_their_own_pictures(make_summary, plans):
    summary = make_summary()
    for name in ("lm_head", "decoder.block.0.layer.1.EncDecAttention.k+v"):
        summary["groups"].append({**summary["groups"][0], "name": name})
    texts = parsed(render_html(report_data(summary, plans))).texts
    assert texts.count("model.layers") == 2
    assert texts.count("outside the blocks") == 2
    assert texts.count("decoder.block") == 2


def test_frontier_page_lists_every_plan(make_summary, plans):
    page = render_frontier_html(report_data(make_summary(), plans), plans)
    texts = parsed(page).texts
    for plan in plans:
        assert f"{plan.effective_bits:.4f}" in texts
    assert "this plan: 5.9375 bits" in texts


def test_frontier_png_is_a_picture(make_summary, plans, tmp_path):
    path = tmp_path / "frontier.png"
    frontier_png(report_data(make_summary(), plans), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_png_without_matplotlib_says_what_to_do(make_summary, plans, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"a PNG needs matplotlib.*pip install matplotlib"):
        frontier_png(report_data(make_summary(), plans), tmp_path / "frontier.png")


def test_curve_goes_through_this_plan_unless_another_beats_it(make_summary, plans):
    between = report_data(make_summary(), plans).curve
    assert [point.effective_bits for point in between] == [4.5, 5.9375, 6.0, 8.0, 16.0]
    beaten = report_data(make_summary(predicted_loss=0.07), plans).curve
    assert [point.effective_bits for point in beaten] == [4.5, 6.0, 8.0, 16.0]
