"""Parts of the page on their own: what they compute is what the report and the terminal show."""

from __future__ import annotations

import json

import pytest

from autoq.formats import FORMATS
from autoq.report import numbers
from autoq.report._colours import format_colours, loss_colour
from autoq.report.layers import layer_position, short_type
from autoq.report.resources import gigabytes_text
from autoq.service.settings import ServiceSettings
from autoq.testing.browser import CHROMIUM_VARIABLE, PATIENCE_MILLISECONDS, chromium, chromium_path
from autoq.testing.served import served

pytestmark = pytest.mark.skipif(
    chromium_path() is None, reason=f"no Chromium; {CHROMIUM_VARIABLE} names one"
)

LOSSES = [None, 0.0, 2.5e-7, 9.996e-4, 0.001, 0.0012345678, 0.5, 3.14159, 42.0, 998.6, 1234.56, 2e7]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    store = f"sqlite:///{tmp_path_factory.mktemp('store')}/autoq.db"
    with served(ServiceSettings(store=store)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium(chromium_path()) as running:
        yield running


@pytest.fixture
def page(browser, url):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MILLISECONDS)
    opened = context.new_page()
    opened.goto(url)
    opened.locator("h1", has_text="Studies").wait_for()
    yield opened
    context.close()


def called(page, module, function, values):
    """What a function of one of the page's modules says of each value."""
    return page.evaluate(
        """async ([module, name, values]) => {
          const found = (await import(`/assets/js/${module}.js`))[name];
          return values.map((value) => found(value));
        }""",
        [module, function, values],
    )


@pytest.mark.parametrize(
    ("name", "expected", "values"),
    [
        ("lossText", numbers.loss_text, LOSSES),
        ("bitsText", numbers.bits_text, [None, 4.0, 4.80004, 16.0]),
        ("percentText", numbers.percent_text, [None, 0.0, 4.9e-5, 0.00051, 0.97449, 1.0]),
        ("bytesText", numbers.bytes_text, [None, 0, 1023, 1024, 2_090_000, 3 * 2**30, 2**45]),
        ("countText", numbers.count_text, [None, 7, 9_999, 65_536, 131_072, 7_000_000_000]),
        ("secondsText", numbers.seconds_text, [None, 0.417, 59.9, 60.0, 185.2, 7500.0]),
        ("gigabytesText", gigabytes_text, [2_985_123, 16_400_000_000, 23_410_000_000]),
        ("unitText", numbers.unit_text, ["nats_per_token", "relative", "bits"]),
    ],
)
def test_numbers_are_those_of_the_terminal(page, name, expected, values):
    assert called(page, "numbers", name, values) == [expected(value) for value in values]


def test_formats_have_the_report_s_colours(page):
    names = [*FORMATS, "somebody's", "another"]
    found = page.evaluate(
        "async (names) => [...(await import('/assets/js/colours.js')).formatColours(names)]", names
    )
    assert dict(found) == format_colours(names)


def test_losses_have_the_report_s_colours(page):
    losses = [1e-7, 3e-6, 4.2e-5, 1e-3, 0.02, 1.0]
    found = page.evaluate(
        """async (losses) => {
          const { lossColour } = await import('/assets/js/colours.js');
          return losses.map((loss) => lossColour(loss, 1e-6, 0.1));
        }""",
        losses,
    )
    assert found == [loss_colour(loss, 1e-6, 0.1) for loss in losses]


def test_layers_are_placed_as_in_the_report(page):
    names = [
        "model.layers.3.mlp.down_proj",
        "model.layers.12.self_attn.q_proj+k_proj+v_proj",
        "model.layers.1.mlp.experts.0.gate_up_proj",
        "encoder.block.0.layer.0.SelfAttention.q",
        "3.fc",
        "lm_head",
        "model.layers2.x",
    ]
    expected = [layer_position(name) for name in names]
    assert called(page, "layers", "layerPosition", names) == [
        {"stack": one.stack, "block": one.block, "type": one.type} for one in expected
    ]
    types = [one.type for one in expected]
    assert called(page, "layers", "shortType", types) == [short_type(kind) for kind in types]


@pytest.mark.parametrize(("floor", "ceiling"), [(4.5, 16.0), (4.1269, 8.25), (0.0027841, 0.0051)])
def test_a_slider_s_stops(page, floor, ceiling):
    found = page.evaluate(
        "async ([low, high]) => (await import('/assets/js/budget.js')).stops(low, high)",
        [floor, ceiling],
    )
    assert (found[0], found[-1]) == (floor, ceiling)
    assert found == sorted(set(found))
    assert 100 < len(found) < 1300  # fine enough to find a plan, coarse enough for arrow keys


def test_intervals_of_measured_losses_lie_within_the_axes(page):
    plan = {"label": "p", "predicted": 0.0011, "measured": 0.0012, "interval": [0.0005, 0.0018]}
    ends = page.evaluate(
        """async (plan) => {
          const { validationFigure } = await import("/assets/js/charts.js");
          return validationFigure([plan], [], "nats", {}).layout.yaxis.range;
        }""",
        plan,
    )
    assert 10 ** ends[0] < 0.0005
    assert 10 ** ends[1] > 0.0018


def event(number, kind, /, **data):
    body = {"id": number, "job": "j", "time": "2026-01-01T00:00:00Z", "kind": kind, "data": data}
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(body)}\n\n"


def job(status, **changes):
    return {
        "id": "j",
        "kind": "search",
        "status": status,
        "study": "a study",
        "request": {"model": "bundled", "effective_bits": 5, "rules": []},
        "created": "2026-01-01T00:00:00Z",
        "started": "2026-01-01T00:00:01Z",
        "finished": None,
        "attempts": 1,
        "worker": "host:1",
        "progress": None,
        "problem": None,
        "result": None,
        **changes,
    }


class Line:
    """A connection to a job's events that is lost after each reply, and the job as it is."""

    def __init__(self, page, replies):
        self.replies = list(replies)
        self.job = job("running")
        self.asked_after = []
        page.route("**/v1/jobs/j", lambda route: route.fulfill(json=self.job))
        page.route("**/v1/jobs/j/events", self.reply)

    def reply(self, route):
        self.asked_after.append(route.request.headers["last-event-id"])
        if not self.replies:
            result = {"container": "modelopt"}
            self.job = job("done", finished="2026-01-01T00:01:01Z", result=result)
            body = event(9, "status", status="done")
        else:
            body = self.replies.pop(0)
        route.fulfill(body=body, content_type="text/event-stream")


def test_a_job_s_events_are_taken_up_again_behind_the_last(page, url):
    first = (
        event(1, "note", text="one <b>note</b>") + ": still here\n\n" + event(2, "note", text="two")
    )
    second = event(2, "note", text="two") + event(5, "note", text="three")
    line = Line(page, [first, second])
    page.goto(f"{url}/jobs/j")
    page.locator(".job-head .badge", has_text="done").wait_for()
    assert line.asked_after[:3] == ["0", "2", "5"]
    assert page.locator(".notes li").all_text_contents() == ["one <b>note</b>", "two", "three"]


def test_a_job_live(page, url):
    told = (
        event(1, "stage", name="discovery", status="done", seconds=0.42)
        + event(2, "progress", task="scoring", done=32, total=128, seconds_left=75.0)
        + event(3, "trial", number=4, state="complete", values=[0.00125])
        + event(4, "log", text="a line\n", stream="stderr")
    )
    Line(page, [told])
    page.goto(f"{url}/jobs/j")
    bar = page.get_by_role("progressbar", name="scoring")
    bar.wait_for()
    assert bar.get_attribute("aria-valuenow") == "25"
    assert page.locator(".progress-words").text_content() == (
        "scoring32 of 128 (25 %), about 1 min 15 s left"
    )
    assert page.locator(".stages li").text_content() == "● donediscovery0.42 s"
    cells = page.locator("[aria-label=Trials] tbody td").all_text_contents()
    assert cells == ["4", "complete", numbers.loss_text(0.00125)]
    assert page.locator(".log").text_content() == "a line\n"


def test_a_failed_job_says_why_and_is_resumed(page, url):
    line = Line(page, [event(1, "status", status="failed")])
    problem = {
        "type": "urn:autoq:problem:model",
        "title": "The model cannot be used",
        "status": 422,
        "detail": "its weights are not there",
    }
    line.job = job("failed", problem=problem, finished="2026-01-01T00:00:03Z")
    asked = []

    def resume(route):
        asked.append(route.request.method)
        line.job = job("queued", started=None)
        route.fulfill(json=line.job, status=202)

    page.route("**/v1/jobs/j/resume", resume)
    page.goto(f"{url}/jobs/j")
    page.get_by_text("its weights are not there").wait_for()
    assert page.get_by_role("button", name="Cancel").count() == 0
    page.get_by_role("button", name="Resume").click()
    page.locator(".job-head .badge", has_text="done").wait_for()  # its stream was opened again
    page.locator("dd", has_text="modelopt").wait_for()  # and what it came to is shown
    assert asked == ["POST"]


def test_a_resumed_job_tells_nothing_twice(page, url):
    told = event(1, "note", text="one") + event(2, "status", status="cancelled")
    line = Line(page, [told, event(3, "note", text="two")])
    line.job = job("cancelled", finished="2026-01-01T00:00:03Z")

    def resume(route):
        line.job = job("running")
        route.fulfill(json=line.job, status=202)

    page.route("**/v1/jobs/j/resume", resume)
    page.goto(f"{url}/jobs/j")
    page.locator(".notes li", has_text="one").wait_for()
    page.get_by_role("button", name="Resume").click()
    page.locator(".job-head .badge", has_text="done").wait_for()
    assert page.locator(".notes li").all_text_contents() == ["one", "two"]
    assert line.asked_after[1] == "2"


def test_a_stream_that_ends_is_no_lost_connection(page, url):
    page.add_init_script(
        """window.said = new Set();
        new MutationObserver(() => {
          const place = document.querySelector(".job p[aria-live]");
          if (place) window.said.add(place.textContent);
        }).observe(document, { subtree: true, childList: true, characterData: true });"""
    )
    Line(page, [event(1, "note", text="one"), event(2, "note", text="two")])
    page.goto(f"{url}/jobs/j")
    page.locator(".job-head .badge", has_text="done").wait_for()
    assert page.evaluate("() => [...window.said].sort()") == ["", "Starting …"]


def test_an_end_that_could_not_be_asked_about_is_learned_later(page, url):
    line = Line(page, [])
    failed = []

    def fail_once(route):
        if line.job["status"] == "done" and not failed:
            failed.append(True)
            route.abort()
        else:
            route.fulfill(json=line.job)

    page.route("**/v1/jobs/j", fail_once)
    page.goto(f"{url}/jobs/j")
    page.locator(".job-head .badge", has_text="done").wait_for()
    assert failed and page.get_by_role("alert").count() == 0


def test_a_table_that_is_drawn_again_keeps_whoever_stands_in_it(page):
    found = page.evaluate(
        """async () => {
          const { el, fill, refill } = await import("/assets/js/dom.js");
          const place = el("div");
          document.body.append(place);
          const links = (...names) => names.map((name) => el("a", { href: `/${name}` }, name));
          fill(place, links("a", "b"));
          place.lastElementChild.focus();
          refill(place, links("new", "a", "b"));
          const kept = document.activeElement.textContent;
          refill(place, links("new"));
          place.remove();
          return [kept, document.activeElement === document.body];
        }"""
    )
    assert found == ["b", True]


def test_a_form_s_key_is_one_for_each_job(page, url):
    """The same again, until the service has taken it; then, and for another body, a new one."""
    keys = []

    def answer(route):
        keys.append(route.request.headers["idempotency-key"])
        route.fulfill(status=503 if len(keys) == 1 else 202, json={})

    page.route("**/made/jobs", answer)
    page.evaluate(
        """async () => {
          const { JobKey } = await import("/assets/js/api.js");
          const key = new JobKey();
          for (const trials of [1, 1, 1, 2]) await key.post("/made/jobs", { trials }).catch(() => {});
          await key.post("/made/jobs", { trials: 2 });
        }"""
    )
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def study(**changes):
    return {
        "name": "young",
        "model": "bundled",
        "architecture": "LlamaForCausalLM",
        "model_fingerprint": "ab",
        "status": "running",
        "created": "2026-01-01T00:00:00Z",
        "updated": "2026-01-01T00:00:00Z",
        "configuration": {},
        "versions": {},
        "stages": [],
        "groups": None,
        "formats": [],
        "excluded": [],
        "rules": [],
        "target": None,
        "unit": None,
        "plan": None,
        "plans": [],
        "measurements": [],
        "exports": [],
        "job": "j",
        **changes,
    }


def test_a_study_without_a_plan_shows_the_job_that_makes_it(page, url):
    Line(page, [event(1, "progress", task="scoring", done=1, total=4, seconds_left=None)])
    not_yet = {"type": "urn:autoq:problem:not-finished", "title": "Not yet", "status": 409}
    page.route(
        "**/v1/studies/young*/**",
        lambda route: route.fulfill(
            status=409, json={**not_yet, "detail": "its layers are not scored"}
        ),
    )
    page.route("**/v1/studies/young", lambda route: route.fulfill(json=study()))
    page.goto(f"{url}/studies/young")
    page.get_by_text("There is no plan yet.").wait_for()
    page.get_by_role("link", name="Search of a study").wait_for()
    assert page.get_by_role("alert").count() == 0
    page.get_by_role("tab", name="About").click()
    page.get_by_text("LlamaForCausalLM").first.wait_for()


def test_a_study_s_cancelled_job_can_be_resumed_from_its_page(page, url):
    line = Line(page, [])
    line.job = job("cancelled", study="young", finished="2026-01-01T00:00:09Z")
    page.route("**/v1/studies/young*/**", lambda route: route.fulfill(status=404, json={}))
    page.route("**/v1/studies/young", lambda route: route.fulfill(json=study()))
    resumed = job("queued", study="young")
    page.route("**/v1/jobs/j/resume", lambda route: route.fulfill(json=resumed))
    page.goto(f"{url}/studies/young")
    page.get_by_role("button", name="Resume").click()
    page.get_by_text("Waits for a worker that is free.").wait_for()


def exported(status="complete"):
    file = {"path": "model.safetensors", "bytes": 4096, "sha256": "ab"}
    found = {"quantized_matrices": 2, "transformers_logits": {"relative_difference": 9.332e-8}}
    return {
        "id": 1,
        "plan": 1,
        "path": "exports/out",
        "container": "modelopt",
        "status": status,
        "bytes": 4096,
        "files": [file],
        "verification": found,
        "started": "2026-01-01T00:00:00Z",
        "finished": "2026-01-01T00:00:01Z",
    }


def test_a_checkpoint_is_checked_for_a_target_and_the_answer_is_a_table(page, url):
    native = {"does": "native", "runs": True, "reason": "has FP8 units"}
    layers = [
        {"module": name, "stored": "fp8", "outcomes": {"vllm:h200": native}} for name in ("a", "b")
    ]
    unquantised = {"does": "unquantised", "runs": True, "reason": ""}
    layers.append({"module": "c", "stored": "none", "outcomes": {"vllm:h200": unquantised}})
    result = {"sound": True, "runs_in": ["vllm:h200"], "faults": [], "layers": layers}
    done = job("done", kind="verify", study=None, result=result, finished="2026-01-01T00:00:09Z")
    asked = []

    def answer(route):
        asked.append(route.request.post_data_json)
        route.fulfill(status=202, json=done)

    page.route("**/v1/verifications", answer)
    page.route("**/v1/jobs/j", lambda route: route.fulfill(json=done))
    page.route("**/v1/jobs/j/events", lambda route: route.fulfill(content_type="text/event-stream"))
    page.route("**/v1/studies/young*/**", lambda route: route.fulfill(status=404, json={}))
    detail = study(status="done", job=None, exports=[exported()])
    page.route("**/v1/studies/young", lambda route: route.fulfill(json=detail))
    page.goto(f"{url}/studies/young?tab=exports")
    assert "relative difference 9.332e-08" in page.locator("article.export").text_content()
    page.get_by_text("Check where it runs").click()
    page.locator("option[value='vllm:h200']").wait_for(state="attached")
    page.get_by_label("Where it will run").select_option("vllm:h200")
    page.get_by_role("button", name="Check this checkpoint").click()
    rows = page.get_by_role("region", name="What engines do with the layers").locator("tbody tr")
    rows.first.wait_for()
    assert asked == [{"checkpoint": "exports/out", "target": "vllm:h200"}]
    assert [row.locator("td").all_text_contents() for row in rows.all()] == [
        ["vllm:h200", "fp8", "2 layersab", "native", "has FP8 units"],
        ["vllm:h200", "none", "1 layerc", "unquantised", ""],
    ]
    assert page.locator("main dl").first.locator("dd").all_text_contents() == ["yes", "vllm:h200"]


@pytest.mark.parametrize(
    ("address", "links"), [("https://optuna.example/d", 1), ("javascript:alert(1)", 0), (None, 0)]
)
def test_the_dashboard_is_linked_where_the_service_names_it(page, url, address, links):
    who = {"name": "local", "scope": "admin", "authentication": False, "version": "1"}
    page.route("**/v1/me", lambda route: route.fulfill(json={**who, "dashboard": address}))
    page.route("**/v1/studies/young/**", lambda route: route.fulfill(status=404, json={}))
    page.route("**/trials?*", lambda route: route.fulfill(json={"items": [], "total": 0}))
    page.route("**/v1/studies/young", lambda route: route.fulfill(json=study(job=None)))
    page.goto(f"{url}/studies/young?tab=trials")
    page.get_by_text("with each trial in detail").or_(page.get_by_text("has each trial")).wait_for()
    found = page.get_by_role("link", name="Optuna's dashboard")
    assert found.count() == links
    assert not links or found.get_attribute("href") == address


def test_a_study_that_a_job_has_not_begun_yet_shows_the_job(page, url):
    line = Line(page, [])
    line.job = job("cancelled", study="young", finished="2026-01-01T00:00:09Z")
    page.route("**/v1/studies/young**", lambda route: route.fulfill(status=404, json={}))
    listed = {"items": [line.job], "next_cursor": None}
    page.route("**/v1/jobs?study=young&limit=1", lambda route: route.fulfill(json=listed))
    page.goto(f"{url}/studies/young")
    page.get_by_text("There is no plan yet.").wait_for()
    assert page.get_by_role("button", name="Resume").is_visible()
    assert page.locator("h1").text_content() == "young"


def test_a_search_that_goes_on_with_another_study_leads_there(page, url):
    line = Line(page, [event(1, "status", status="running")])
    line.job = job("running", study="young")
    page.route("**/v1/studies/young**", lambda route: route.fulfill(status=404, json={}))
    listed = {"items": [line.job], "next_cursor": None}
    page.route("**/v1/jobs?study=young&limit=1", lambda route: route.fulfill(json=listed))
    page.goto(f"{url}/studies/young")
    page.wait_for_url("**/studies/a%20study")  # that of the job as it ends
