"""Who can use the page: by keyboard and screen reader, in the dark, on a narrow screen, with a token."""

from __future__ import annotations

from itertools import pairwise
from urllib.parse import urlsplit

import httpx
import pytest

from autoq.service.guard.tokens import create_token
from autoq.service.settings import ServiceSettings
from autoq.studies import StudyStore
from autoq.testing.browser import (
    CHROMIUM_VARIABLE,
    PATIENCE_MILLISECONDS,
    Watch,
    chromium,
    chromium_path,
)
from autoq.testing.served import served
from autoq.testing.synthetic_study import add_synthetic_study
from autoq.wire import Scope

pytestmark = pytest.mark.skipif(
    chromium_path() is None, reason=f"no Chromium; {CHROMIUM_VARIABLE} names one"
)

NAME = "calm"
ADDRESSES = ("/", "/?new=1", f"/studies/{NAME}?bits=5", f"/compare?study={NAME}&study=other")

UNNAMED = """() => {
  const nameOf = (one) => {
    const referred = (one.getAttribute('aria-labelledby') ?? '').split(' ').filter(Boolean)
      .map((id) => document.getElementById(id)?.textContent ?? '').join(' ');
    const labels = [...(one.labels ?? [])].map((label) => label.textContent).join(' ');
    return (one.getAttribute('aria-label') || referred || labels || one.textContent || '').trim();
  };
  const controls = 'a[href], button, input, select, textarea, summary, canvas, [tabindex="0"], '
    + '[role=tabpanel], [role=region], [role=img], [role=progressbar], dialog';
  return [...document.querySelectorAll(controls)].filter((one) => nameOf(one) === '')
    .map((one) => one.outerHTML.slice(0, 120));
}"""

FAINT = """() => {
  // Colours as numbers, however they are written: a canvas resolves color-mix and the like.
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const channels = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const backgroundOf = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const found = channels(getComputedStyle(at).backgroundColor);
      if (found[3] === 255) return found;
    }
    return channels('white');
  };
  const luminance = (colour) => {
    const [red, green, blue] = colour.slice(0, 3).map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    const isShown = one.checkVisibility({ visibilityProperty: true }) && !one.closest('svg, noscript, .skip');
    const isOff = one.closest(':disabled, .unavailable');
    if (!walker.currentNode.textContent.trim() || !isShown || isOff) continue;
    const style = getComputedStyle(one);
    const [light, dark] = [luminance(channels(style.color)), luminance(backgroundOf(one))].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const isLarge = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) found.push(`${walker.currentNode.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    found = f"sqlite:///{tmp_path_factory.mktemp('store')}/autoq.db"
    with StudyStore.open(found) as opened:
        add_synthetic_study(opened, groups=12, formats=4, name=NAME)
        add_synthetic_study(opened, groups=12, formats=4, name="other", seed=1)
    return found


@pytest.fixture(scope="module")
def url(store):
    with served(ServiceSettings(store=store)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium(chromium_path()) as running:
        yield running


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE_MILLISECONDS)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module", params=ADDRESSES)
def shown(request, browser, url):
    """Each page, with all that is folded open."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE_MILLISECONDS)
    page = opened(context.new_page(), url + request.param)
    for folded in page.locator("summary").all():
        folded.click()
    page.wait_for_load_state("networkidle")
    yield page
    context.close()


def opened(page, address):
    page.goto(address)
    page.locator("main h1:not(.loading)").wait_for()
    page.wait_for_load_state("networkidle")
    return page


def test_every_control_has_a_name_and_headings_are_in_order(shown):
    assert shown.evaluate(UNNAMED) == []
    levels = shown.evaluate(
        "() => [...document.querySelectorAll('h1, h2, h3, h4')].filter((one) => one.checkVisibility())"
        ".map((one) => Number(one.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    twice = shown.evaluate(
        "() => [...document.querySelectorAll('[id]')].map((one) => one.id)"
        ".filter((id, index, all) => all.indexOf(id) !== index)"
    )
    assert twice == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(shown, scheme):
    shown.emulate_media(color_scheme=scheme)
    assert shown.evaluate(FAINT) == []


def test_narrow_screens_need_no_scrolling_sideways(shown):
    shown.set_viewport_size({"width": 400, "height": 800})
    try:
        assert shown.evaluate("() => document.documentElement.scrollWidth") <= 400
    finally:
        shown.set_viewport_size({"width": 1200, "height": 900})


def test_the_checks_see_what_is_wrong(page, url):
    """What finds nothing on the pages must find it where it is."""
    opened(page, url)
    page.evaluate(
        """() => {
          const faint = document.createElement('p');
          faint.textContent = 'hard to read';
          faint.style.color = getComputedStyle(document.documentElement).getPropertyValue('--line');
          document.querySelector('main').append(faint, document.createElement('button'));
        }"""
    )
    assert [found.partition(":")[0] for found in page.evaluate(FAINT)] == ["hard to read"]
    assert page.evaluate(UNNAMED) == ["<button></button>"]


def test_dark_is_the_system_s_unless_it_is_chosen_here(browser, url):
    context = browser.new_context(color_scheme="dark")
    context.set_default_timeout(PATIENCE_MILLISECONDS)
    page = opened(context.new_page(), url)
    background = "() => getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 23, 28)"
    page.get_by_label("Colours").select_option("light")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert page.get_by_label("Colours").input_value() == "light"
    context.close()


def test_the_heat_map_follows_the_colours(page, url):
    opened(page, f"{url}/studies/{NAME}")
    picture = page.get_by_role("application").first
    before = picture.evaluate("(canvas) => canvas.toDataURL()")
    page.get_by_label("Colours").select_option("dark")
    assert picture.evaluate("(canvas) => canvas.toDataURL()") != before


def test_the_first_key_skips_to_the_content(page, url):
    opened(page, url)
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "main"


def test_what_changes_is_said_to_screen_readers(page, url):
    opened(page, f"{url}/studies/{NAME}?bits=5")
    page.get_by_label("Budget", exact=True).focus()
    page.keyboard.press("End")
    plan = httpx.get(f"{url}/v1/studies/{NAME}/frontier", timeout=120).json()["budget_ceiling"]
    page.locator("#announcer", has_text=f"{plan:.4g} bits").wait_for(state="attached")


def test_tabs_by_keyboard(page, url):
    opened(page, f"{url}/studies/{NAME}?tab=plans")
    chosen = page.get_by_role("tab", selected=True)
    assert chosen.text_content() == "Stored plans"
    chosen.focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", selected=True).text_content() == "Exports"
    assert "tab=exports" in page.url
    assert page.evaluate("() => document.activeElement.id") == "tab-exports"


def test_faults_stand_beside_their_fields(page, url):
    opened(page, f"{url}/?new=1")
    page.get_by_label("Effective bits per weight").fill("-3")
    page.get_by_role("button", name="Start the search").click()
    field = page.locator("[name=effective_bits][aria-invalid=true]")
    field.wait_for()
    trouble = field.evaluate(
        "(one) => one.getAttribute('aria-describedby').split(' ')"
        ".map((id) => document.getElementById(id).textContent)"
    )
    reply = httpx.post(
        f"{url}/v1/studies", json={"model": "bundled", "effective_bits": -3}, timeout=120
    )
    assert trouble[-1] == reply.json()["errors"][0]["what"]
    assert page.evaluate("() => document.activeElement.name") == "effective_bits"


def test_two_clicks_make_one_job(page, url):
    opened(page, f"{url}/?new=1")
    keys = []
    page.on(
        "request",
        lambda asked: (
            keys.append(asked.headers.get("idempotency-key")) if asked.method == "POST" else None
        ),
    )
    page.get_by_label("Effective bits per weight").fill("5")
    form = page.locator("form.search-form")
    form.evaluate("(form) => { form.requestSubmit(); form.requestSubmit(); }")
    page.wait_for_url("**/jobs/*")
    assert len(keys) == 2 and len(set(keys)) == 1 and keys[0]
    jobs = httpx.get(f"{url}/v1/jobs", timeout=120).json()["items"]
    assert [(job["kind"], job["request"]["effective_bits"]) for job in jobs] == [("search", 5)]
    assert page.url.endswith(f"/jobs/{jobs[0]['id']}")


def test_a_token_is_asked_for_kept_for_the_tab_and_forgotten(browser, store, tmp_path):
    path = tmp_path / "tokens.json"
    token = create_token(path, "somebody", Scope.READ)
    with served(ServiceSettings(store=store, token_file=path)) as address:
        context = browser.new_context()
        context.set_default_timeout(PATIENCE_MILLISECONDS)
        page = context.new_page()
        watch = Watch(urlsplit(address).netloc)
        page.on("request", lambda asked: watch._note(asked.url))
        page.goto(f"{address}/studies/{NAME}")
        page.get_by_label("Token").fill("not-it")
        page.get_by_role("button", name="Sign in").click()
        page.locator("main [role=alert]").filter(has_text="token").wait_for()
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("button", name="Keep this plan").wait_for()
        assert page.locator("#identity").text_content() == "somebody, may read"
        assert page.get_by_role("button", name="Keep this plan").is_disabled()
        assert page.get_by_role("button", name="Delete").is_disabled()
        assert token not in page.url
        assert token not in page.evaluate(
            "() => JSON.stringify({ ...localStorage }) + document.cookie"
        )
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("Token").wait_for()
        assert token not in page.evaluate("() => JSON.stringify({ ...sessionStorage })")
        assert watch.foreign == []
        context.close()
