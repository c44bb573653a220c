"""A person's whole way through the page: a real search, a budget, an export, by the real command."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from autoq.testing.browser import CHROMIUM_VARIABLE, chromium, chromium_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        chromium_path() is None, reason=f"no Chromium; {CHROMIUM_VARIABLE} names one"
    ),
]

SCREENSHOTS_VARIABLE = "AUTOQ_SCREENSHOTS"
"""A folder that pictures are written to; the documentation's are made by naming docs/screenshots."""

_LONGEST = 300_000  # milliseconds that a search or an export may take on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def url(folder):
    (folder / "exports").mkdir()
    command = [sys.executable, "-m", "autoq", "serve", "--port", "0", "--exports", "exports"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--store", "sqlite:///autoq.db"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        yield next(filter(None, (re.search(r"http://[\d.:]+", line) for line in lines)))[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def pictures(folder):
    named = os.environ.get(SCREENSHOTS_VARIABLE)
    place = Path(named).absolute() if named else folder / "pictures"
    place.mkdir(parents=True, exist_ok=True)
    return place


@pytest.fixture(scope="module")
def page():
    with chromium(chromium_path()) as browser:
        context = browser.new_context(viewport={"width": 1200, "height": 860})
        context.set_default_timeout(_LONGEST)
        yield context.new_page()


def test_search_look_choose_export(page, url, folder, pictures):
    start_the_search(page, url)
    page.locator(".progress-words", has_text=re.compile(r"scoring.*left")).wait_for()
    page.screenshot(path=pictures / "job.png", full_page=True)
    page.locator(".job-head .badge", has_text="done").wait_for()

    page.get_by_role("link", name="Study demo").click()
    page.locator(".js-plotly-plot .legend").first.wait_for()
    budget, plan = choose_a_budget(page, url)
    upper = {"x": 0, "y": 0, "width": 1200, "height": 2060}  # down to the heat map
    page.screenshot(path=pictures / "study.png", full_page=True, clip=upper)
    page.emulate_media(color_scheme="dark")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=pictures / "study-dark.png", full_page=True, clip=upper)
    page.emulate_media(color_scheme="light")

    export_the_plan(page)
    entry = httpx.get(f"{url}/v1/studies/demo", timeout=120).json()["exports"][0]
    assert entry["path"] == "exports/demo-out"
    found = {
        path.relative_to(folder / entry["path"]).as_posix(): digest(path)
        for path in (folder / entry["path"]).rglob("*")
        if path.is_file()
    }
    assert found == {file["path"]: file["sha256"] for file in entry["files"]}
    stored = httpx.get(f"{url}/v1/studies/demo/plans/{entry['plan']}", timeout=120).json()
    assert stored["assignment"] == plan["assignment"]
    assert stored["budgets"] == {"effective_bits": budget}

    start_the_search(page, url, name="another", seed=1)
    job = page.url
    page.goto(url)
    page.get_by_role("progressbar").wait_for()
    page.set_viewport_size({"width": 1200, "height": 460})
    page.screenshot(path=pictures / "home.png")
    page.goto(job)
    page.get_by_role("button", name="Cancel").click()
    page.locator(".job-head .badge", has_text="cancelled").wait_for()
    assert page.get_by_role("button", name="Resume").is_visible()
    assert {one.name for one in pictures.glob("*.png")} >= {
        "job.png",
        "study.png",
        "study-dark.png",
        "home.png",
    }


def start_the_search(page, url, name="demo", seed=0):
    page.goto(f"{url}/?new=1")
    page.get_by_label("Model", exact=True).select_option("bundled")
    page.get_by_label("Effective bits per weight").fill("5")
    page.get_by_label("Name of the study").fill(name)
    page.locator("summary", has_text="Calibration data").click()
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_text("Afterwards: measure").click()
    page.get_by_label("Measure one format throughout").check()
    page.get_by_role("button", name="Start the search").click()
    page.wait_for_url("**/jobs/*")


def choose_a_budget(page, url):
    """Drag the slider to the right; what it says is what the service answers."""
    slider = page.get_by_label("Budget", exact=True)
    frame = slider.bounding_box()
    middle = frame["y"] + frame["height"] / 2
    page.mouse.move(frame["x"] + frame["width"] * 0.05, middle)
    page.mouse.down()
    for share in (0.06, 0.08, 0.10, 0.12):
        page.mouse.move(frame["x"] + frame["width"] * share, middle)
    page.mouse.up()
    page.wait_for_url("**bits=*")
    budget = float(re.search(r"bits=([\d.]+)", page.url)[1])
    plan = httpx.post(
        f"{url}/v1/studies/demo/plans", json={"effective_bits": budget}, timeout=120
    ).json()
    page.locator(".tile b", has_text=f"{plan['effective_bits']:.4f}").first.wait_for()
    assert budget > 5.0
    return budget, plan


def export_the_plan(page):
    page.get_by_role("tab", name="Exports").click()
    page.get_by_label("Output").fill("exports/demo-out")
    page.get_by_role("button", name="Export this plan").click()
    page.locator("article.export", has_text="demo-out").wait_for()
    assert "Read back" in page.locator("article.export").text_content()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
