"""The page of a study in a real browser, against the real service on a synthetic store."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest

from autoq.report._colours import loss_colour, loss_range
from autoq.report.numbers import bits_text, interval_text, loss_text, percent_text
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

pytestmark = pytest.mark.skipif(
    chromium_path() is None, reason=f"no Chromium; {CHROMIUM_VARIABLE} names one"
)

NAME = "calm"
HOSTILE = '<img src=x onerror="document.title=1"> & <script>alert(2)</script>'


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    store = f"sqlite:///{tmp_path_factory.mktemp('store')}/autoq.db"
    with StudyStore.open(store) as opened:
        add_synthetic_study(opened, groups=24, formats=4, name=NAME)
        add_synthetic_study(opened, groups=16, formats=3, name=HOSTILE, seed=1)
        add_synthetic_study(opened, groups=8, formats=2, name="doomed", seed=2)
        add_synthetic_study(opened, groups=8, formats=2, name="low", seed=3)
    with served(ServiceSettings(store=store)) as address:
        yield address


@pytest.fixture(scope="module")
def context():
    with chromium(chromium_path()) as running:
        made = running.new_context(viewport={"width": 1200, "height": 900})
        made.set_default_timeout(PATIENCE_MILLISECONDS)
        yield made


@pytest.fixture
def watch(url):
    return Watch(urlsplit(url).netloc)


@pytest.fixture
def page(context, watch):
    opened = context.new_page()
    watch.see(opened)
    yield opened
    opened.close()


def open_study(page, url, query=""):
    """The study's page, with all that it reads; the chart may come later."""
    page.goto(f"{url}/studies/{NAME}{query}")
    page.get_by_text("Reading the frontier").wait_for(state="detached")
    page.locator(".tile").first.wait_for()
    return page


def tiles(page):
    """Name -> (value, what stands below it)."""
    found = page.locator(".tile").all()
    parts = [tile.locator("span, b").all_text_contents() for tile in found]
    return {name: (value, more) for name, value, more in parts}


def plan_for(url, **body):
    return httpx.post(f"{url}/v1/studies/{NAME}/plans", json=body, timeout=120).json()


def test_pages_stay_on_their_host_and_say_no_errors(page, url, watch):
    for address in ("/", "/?new=1", f"/compare?study={NAME}&study={quote(HOSTILE)}"):
        page.goto(url + address)
        page.locator("h1").first.wait_for()
        page.wait_for_load_state("networkidle")
    open_study(page, url)
    page.locator(".js-plotly-plot .legend").first.wait_for()
    for tab in page.get_by_role("tab").all():
        tab.click()
        page.wait_for_load_state("networkidle")
    assert (watch.errors, watch.foreign) == ([], [])


def test_the_plan_in_numbers_is_the_service_s(page, url):
    open_study(page, url, "?bits=5.2")
    plan = plan_for(url, effective_bits=5.2)
    shown = tiles(page)
    assert shown["effective bits per weight"][0] == bits_text(plan["effective_bits"])
    assert shown["predicted loss, nats per token"] == (
        loss_text(plan["predicted_loss"]),
        f"95 %: {interval_text(*plan['predicted_loss_interval'])}",
    )
    assert shown["gap to the bound"][0] == percent_text(plan["gap"])


def test_keys_on_the_slider_change_the_plan_and_the_address(page, url, context):
    open_study(page, url, "?bits=5")
    slider = page.get_by_label("Budget", exact=True)
    slider.focus()
    before = tiles(page)
    page.keyboard.press("PageUp")
    page.wait_for_function("() => new URLSearchParams(location.search).get('bits') !== '5'")
    asked = float(re.search(r"bits=([\d.]+)", page.url)[1])
    plan = plan_for(url, effective_bits=asked)
    page.get_by_text(bits_text(plan["effective_bits"]), exact=True).first.wait_for()
    assert asked > 5.0
    assert tiles(page) != before
    # A link to here shows the same to somebody else.
    other = context.new_page()
    open_study(other, page.url.split("/studies/")[0], "?" + page.url.partition("?")[2])
    assert tiles(other) == tiles(page)
    other.close()


@pytest.mark.parametrize(("key", "end"), [("Home", "budget_floor"), ("End", "budget_ceiling")])
def test_the_ends_of_the_slider_are_the_frontier_s(page, url, key, end):
    frontier = httpx.get(f"{url}/v1/studies/{NAME}/frontier", timeout=120).json()
    open_study(page, url)
    page.get_by_label("Budget", exact=True).focus()
    page.keyboard.press(key)
    plan = plan_for(url, effective_bits=frontier[end])
    page.locator(".tile b", has_text=bits_text(plan["effective_bits"])).first.wait_for()
    assert not page.get_by_role("alert").count()


def test_layers_that_become_unquantised_move_to_more_bits(page, url):
    open_study(page, url)
    page.get_by_label("Budget", exact=True).focus()
    page.keyboard.press("End")
    page.locator(".moves-sentence", has_text="24 layers move: 24 to more bits.").wait_for()
    assert page.locator("p.legend").text_content() == "none 24 groups, 100.0 % of the weights"


def test_a_budget_in_gigabytes(page, url):
    limit = plan_for(url, effective_bits=5)["takes"]["stored_bytes"] / 1e9
    open_study(page, url, f"?gb={limit}")
    assert page.get_by_label("Unit of the budget").input_value() == "gb"
    expected = plan_for(url, max_gb=limit)
    assert tiles(page)["effective bits per weight"][0] == bits_text(expected["effective_bits"])


def test_what_no_plan_meets_is_said_in_the_service_s_words(page, url):
    open_study(page, url)
    page.get_by_label("Budget as a number").fill("1")
    page.keyboard.press("Enter")
    said = page.get_by_role("alert")
    said.wait_for()
    reply = httpx.post(f"{url}/v1/studies/{NAME}/plans", json={"effective_bits": 1}, timeout=120)
    assert reply.status_code == 422
    assert reply.json()["detail"] in said.text_content()


def test_layers_that_move_are_named(page, url):
    open_study(page, url, "?bits=6")
    detail = httpx.get(f"{url}/v1/studies/{NAME}", timeout=120).json()
    before, now = detail["plan"]["assignment"], plan_for(url, effective_bits=6)["assignment"]
    moved = [(name, before[name], now[name]) for name in now if before[name] != now[name]]
    assert moved
    words = page.locator(".moves-sentence").text_content()
    assert re.match(rf"{len(moved)} layers? moves?:", words)
    more = page.get_by_role("button", name=re.compile("Show all"))
    if more.is_visible():
        more.click()
    rows = page.locator(".moves tbody tr").all()
    shown = [row.locator("td").all_text_contents() for row in rows]
    assert [(name, source, target) for name, source, _, target in shown] == moved


def test_a_pinned_plan_is_compared_with_and_stays_in_the_address(page, url):
    open_study(page, url, "?bits=5.5")
    page.get_by_role("button", name="Pin this plan").click()
    assert "No layer moves." in page.locator(".moves-sentence").text_content()
    page.reload()
    page.locator(".moves-sentence", has_text="the pinned plan").wait_for()
    assert "against=bits-5.5" in page.url


def heat_map(page):
    return page.get_by_role("application", name=re.compile("Sensitivity"))


def by_bits(table):
    """Formats as the heat map has them: by falling mean bits."""
    means = {}
    for column, name in enumerate(table["formats"]):
        bits = [row[column] for row in table["effective_bits"] if row[column] is not None]
        means[name] = sum(bits) / len(bits) if bits else 0.0
    return sorted(table["formats"], key=lambda name: -means[name])


def words_of(table, group, name, chosen):
    column = table["formats"].index(name)
    score, error = table["scores"][group][column], table["standard_errors"][group][column]
    said = f"loss {loss_text(score)} (standard error {loss_text(error)})"
    return said + ("\nchosen" if chosen == name else "")


def test_the_heat_map_tells_each_cell_by_keyboard(page, url):
    open_study(page, url)
    table = httpx.get(f"{url}/v1/studies/{NAME}/sensitivity", timeout=120).json()
    plan = httpx.get(f"{url}/v1/studies/{NAME}", timeout=120).json()["plan"]
    order = [name for name in by_bits(table) if name != "none"]
    first = by_bits(table).index(order[0])
    heat_map(page).focus()
    # From the first cell of the first block to the same type and format of the second.
    page.keyboard.press("Home")
    for key in ["ArrowRight"] * first + ["ArrowDown"]:
        page.keyboard.press(key)
    names = [group["name"] for group in table["groups"]]
    group = names.index(names[0].replace("layers.0.", "layers.1."))
    said = page.locator(".grid-canvas", has=heat_map(page)).locator("[aria-live]").text_content()
    assert said.startswith(names[group] + "\n" + order[0])
    assert said.endswith(words_of(table, group, order[0], plan["assignment"][names[group]]))


def test_the_heat_map_tells_each_cell_under_the_pointer_in_the_report_s_colour(page, url):
    open_study(page, url)
    table = httpx.get(f"{url}/v1/studies/{NAME}/sensitivity", timeout=120).json()
    canvas = heat_map(page)
    canvas.scroll_into_view_if_needed()
    frame = canvas.bounding_box()
    tip = page.locator(".grid-canvas", has=canvas).locator(".tip")
    # Row names take 66 pixels and a cell 46; below the last row, 22 high, are 8 pixels. Of two
    # neighbours one at least is not chosen, and so has no mark on its colour.
    y = frame["height"] - 8 - 11
    for x in (66 + 23, 66 + 46 + 23):
        page.mouse.move(frame["x"] + x, frame["y"] + y)
        tip.wait_for()
        if "chosen" not in tip.text_content():
            break
    name, rest = tip.text_content().split("\n")
    column = table["formats"].index(re.match(r"\w+", rest)[0])
    group = [row["name"] for row in table["groups"]].index(name)
    score = table["scores"][group][column]
    assert loss_text(score) in rest
    quantised = [index for index, one in enumerate(table["formats"]) if one != "none"]
    low, high = loss_range(row[index] for row in table["scores"] for index in quantised)
    pixel = canvas.evaluate(
        "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3)",
        [x, y],
    )
    assert "#" + "".join(f"{part:02x}" for part in pixel) == loss_colour(score, low, high)


@pytest.mark.parametrize("width", [1200, 380])
def test_no_name_under_the_pointer_is_cut_off(page, url, width):
    page.set_viewport_size({"width": width, "height": 700})
    page.goto(f"{url}/studies/low")
    page.get_by_text("Reading the frontier").wait_for(state="detached")
    canvas = heat_map(page)
    canvas.focus()
    page.keyboard.press("End")
    tip = page.locator(".grid-canvas", has=canvas).locator(".tip")
    tip.wait_for()
    share = tip.evaluate(
        """(tip) => new Promise((resolve) => {
          const told = (entries) => resolve(entries.at(-1).intersectionRatio);
          new IntersectionObserver(told).observe(tip);
        })"""
    )
    assert share > 0.96  # of its area: half pixels at its edges do not count


def test_the_heat_map_as_a_table(page, url):
    open_study(page, url)
    table = httpx.get(f"{url}/v1/studies/{NAME}/sensitivity", timeout=120).json()
    page.locator("section", has=heat_map(page)).get_by_text("As a table").click()
    rows = page.get_by_role("region", name="Sensitivity as a table").locator("tbody tr")
    rows.first.wait_for()
    assert rows.count() == len(table["groups"])
    last = rows.last.locator("td").all_text_contents()
    assert last[0] == table["groups"][-1]["name"]
    scores = [table["scores"][-1][table["formats"].index(name)] for name in by_bits(table)]
    assert [cell.split(" ± ")[0] for cell in last[2:]] == [loss_text(score) for score in scores]


def test_a_point_of_the_frontier_is_chosen_from_its_table(page, url):
    open_study(page, url)
    frontier = httpx.get(f"{url}/v1/studies/{NAME}/frontier?points=64", timeout=120).json()
    point = frontier["points"][3]
    bits = bits_text(point["effective_bits"])
    page.locator("section", has_text="Loss against bits").get_by_text("As a table").first.click()
    page.get_by_role("button", name=f"Choose {bits} bits").first.click()
    page.locator(".tile b", has_text=bits).first.wait_for()


def test_an_older_reply_never_takes_the_place_of_a_newer(page, url):
    open_study(page, url, "?bits=5")
    held = []

    def hold_the_first(route):
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/plans", hold_the_first)
    number = page.get_by_label("Budget as a number")
    for budget in ("6", "7"):
        number.fill(budget)
        page.keyboard.press("Enter")
    newer = bits_text(plan_for(url, effective_bits=7)["effective_bits"])
    page.locator(".tile b", has_text=newer).first.wait_for()
    held[0].abort() if held[0].request.failure else held[0].continue_()
    page.wait_for_load_state("networkidle")
    assert tiles(page)["effective bits per weight"][0] == newer


def test_names_are_text_whatever_they_say(page, url, watch):
    page.goto(url)
    page.get_by_role("link", name=HOSTILE, exact=True).click()
    page.locator(".js-plotly-plot .legend").first.wait_for()
    assert page.locator("h1").text_content() == HOSTILE
    assert page.title() == f"{HOSTILE} - autoq"
    assert page.locator("main img, main script").count() == 0
    assert (watch.errors, watch.foreign) == ([], [])


def test_studies_are_found_by_their_text(page, url):
    page.goto(url)
    page.get_by_role("link", name="doomed").wait_for()
    page.get_by_label("Search").fill("cal")
    page.get_by_text("1 study", exact=True).wait_for()
    assert page.locator("tbody a").all_text_contents() == [NAME]
    assert page.url.endswith("?q=cal")
    page.get_by_label("Status").select_option("failed")
    page.get_by_text("No study fits").wait_for()


def test_the_page_that_one_goes_to_is_read_from_its_heading(page, url):
    open_study(page, url)
    page.get_by_role("link", name="Studies", exact=True).first.click()
    page.wait_for_function("() => document.activeElement === document.querySelector('h1')")
    assert page.locator("h1").text_content() == "Studies"


@pytest.mark.parametrize(
    ("path", "heading"), [("/studies/100%", "Nothing here"), ("/jobs/abc", "There is no such")]
)
def test_addresses_of_nothing_say_so(page, url, path, heading):
    page.goto(url + path)
    page.get_by_role("heading", name=heading).wait_for()
    assert page.title().startswith(heading)


def test_what_is_typed_stays_when_something_else_is_done(page, url):
    open_study(page, url, "?bits=6.5&tab=exports")
    page.get_by_label("Output").fill("exports/typed")
    page.get_by_role("button", name="Keep this plan").click()
    page.get_by_text(re.compile(r"^Kept as plan \d+\.$")).wait_for()
    assert page.get_by_label("Output").input_value() == "exports/typed"


def test_no_budget_is_not_taken(page, url):
    open_study(page, url, "?bits=5.5")
    number = page.get_by_label("Budget as a number")
    number.fill("-3")
    page.keyboard.press("Enter")
    assert number.input_value() == "5.5"


def test_the_head_and_the_plan_follow_the_job(page, url):
    """While it runs the study is running; when it has ended the plan's measurement is shown."""
    detail = httpx.get(f"{url}/v1/studies/{NAME}", timeout=120).json()
    identifier = detail["plan"]["id"]
    ended = {"id": "j", "kind": "measure", "status": "done", "study": NAME, "request": {}}
    job = {**ended, "started": None, "finished": None, "attempts": 1, "progress": None}
    replies = [{**detail, "status": "running", "job": "j"}, detail]
    page.route(f"**/v1/studies/{NAME}", lambda route: route.fulfill(json=replies.pop(0)))
    states = [{**job, "status": "running"}, job]
    page.route("**/v1/jobs/j", lambda route: route.fulfill(json=states.pop(0)))
    told = {"id": 1, "job": "j", "time": "t", "kind": "status", "data": {"status": "done"}}
    body = f"id: 1\nevent: status\ndata: {json.dumps(told)}\n\n"
    held = []
    page.route("**/v1/jobs/j/events", lambda route: held.append(route))
    measured = {**detail["plan"], "measured": {"kl_divergence": 0.125}}
    page.route(f"**/plans/{identifier}", lambda route: route.fulfill(json=measured))
    page.route("**/plans", lambda route: route.fulfill(json=detail["plan"]))

    open_study(page, url, "?bits=5")
    status = page.locator(".facts .badge").first
    assert status.inner_text().endswith("running")
    while not held:
        page.wait_for_timeout(20)
    held[0].fulfill(body=body, content_type="text/event-stream")
    page.locator(".tile", has_text="measured KL divergence").get_by_text("0.1250").wait_for()
    assert status.inner_text().endswith("done")


def test_a_plan_is_kept_once(page, url):
    open_study(page, url, "?bits=5.75")
    page.get_by_role("button", name="Keep this plan").click()
    page.get_by_text(re.compile(r"^Kept as plan \d+\.$")).wait_for()
    page.get_by_role("button", name="Keep this plan").click()
    page.get_by_text(re.compile(r"^Kept already as plan \d+\.$")).wait_for()
    plans = httpx.get(f"{url}/v1/studies/{NAME}", timeout=120).json()["plans"]
    assert [plan["budgets"] for plan in plans].count({"effective_bits": 5.75}) == 1


def test_a_study_is_deleted_by_whoever_types_its_name(page, url):
    page.goto(f"{url}/studies/doomed")
    page.get_by_role("button", name="Delete …").click()
    sure = page.get_by_role("button", name="Delete", exact=True)
    page.get_by_label("Type its name").fill("doome")
    assert sure.is_disabled()
    page.get_by_label("Type its name").fill("doomed")
    sure.click()
    page.get_by_role("heading", name="Studies").wait_for()
    assert httpx.get(f"{url}/v1/studies/doomed", timeout=120).status_code == 404


def test_the_plan_is_downloaded_as_it_is_shown(page, url):
    open_study(page, url, "?bits=5.25")
    with page.expect_download() as coming:
        page.get_by_role("button", name="Download plan").click()
    plan = json.loads(Path(coming.value.path()).read_text(encoding="utf-8"))
    assert plan["assignment"] == plan_for(url, effective_bits=5.25)["assignment"]


def test_every_module_is_asked_for_at_once():
    """The page names all of its modules, so that they do not come one after the other."""
    folder = Path(str(files("autoq.service.web").joinpath("page")))
    named = re.findall(r'"/assets/js/(\w+\.js)"', (folder / "index.html").read_text())
    assert sorted(named) == sorted(path.name for path in (folder / "assets" / "js").glob("*.js"))
