"""How soon the page of a large study is there, and how soon it follows the slider.

    python benchmarks/page.py --output benchmarks/results/page.json

`autoq serve` in a process of its own serves a synthetic study of 1,000 groups x 12 formats to a
headless Chromium on the same machine. Of every visit, in a fresh browser profile: the first
contentful paint, as the browser counts it; when the frame with the heat map was on the screen; when
the chart was drawn. The first visit finds the server's tables unread, too. Then a key is pressed on
the slider so many times, each waited for: from the key to the new plan's numbers. All are wall
times in milliseconds, of browser and server together; `load` says what else ran.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page

from autoq.studies import StudyStore
from autoq.testing.browser import chromium, chromium_path
from autoq.testing.synthetic_study import add_synthetic_study

NAME = "synthetic"

PAINTS = """() => {
  const start = (name) => performance.getEntriesByName(name)[0]?.startTime ?? null;
  return { first_paint_ms: start('first-contentful-paint'), heat_map_ms: start('autoq-heat-map') };
}"""

STEP = """() => new Promise((resolve) => {
  const slider = document.getElementById('budget');
  const start = performance.now();
  new PerformanceObserver((list, observer) => {
    if (!list.getEntriesByName('autoq-plan').length) return;
    observer.disconnect();
    resolve(performance.now() - start);
  }).observe({ type: 'mark' });
  slider.value = String(Number(slider.value) + 7);
  slider.dispatchEvent(new Event('input'));
  slider.dispatchEvent(new Event('change'));
})"""


def main() -> None:
    """Measure, print, and write what was measured."""
    arguments = parse_arguments()
    path = chromium_path()
    if path is None:
        raise SystemExit("no Chromium was found; name one in AUTOQ_CHROMIUM")
    with (
        tempfile.TemporaryDirectory() as folder,
        served(folder, arguments) as url,
        chromium(path) as browser,
    ):
        visits = [visit(browser, url) for _ in range(arguments.visits + 1)]
        steps = slider_steps(browser, url, arguments.steps)
        version = browser.version
    results = {
        "machine": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "chromium": version,
            "load": round(os.getloadavg()[0], 2),
        },
        "study": {"groups": arguments.groups, "formats": arguments.formats},
        "first_visit": visits[0],
        "visits": {name: spread([one[name] for one in visits[1:]]) for name in visits[0]},
        "slider_ms": spread(steps),
    }
    print(json.dumps(results, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """What is measured, and where it is written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--formats", type=int, default=12)
    parser.add_argument("--visits", type=int, default=7, help="after the first one")
    parser.add_argument("--steps", type=int, default=40, help="of the slider")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


@contextmanager
def served(folder: str, arguments: argparse.Namespace) -> Iterator[str]:
    """The URL of a server on a store with the study."""
    store = f"sqlite:///{folder}/autoq.db"
    with StudyStore.open(store) as opened:
        add_synthetic_study(opened, groups=arguments.groups, formats=arguments.formats, name=NAME)
    command = [sys.executable, "-m", "autoq", "serve", "--port", "0", "--workers", "0"]
    process = subprocess.Popen(
        [*command, "--store", store], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = re.search(r"http://[\d.:]+", line)
            if found:
                break
        else:
            raise SystemExit("the server did not start")
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def visit(browser: Browser, url: str) -> dict[str, float]:
    """One visit in a profile that has nothing of earlier ones."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = open_study(context.new_page(), url)
    paints: dict[str, float] = page.evaluate(PAINTS)
    chart = page.evaluate("() => performance.now()")
    context.close()
    return {**paints, "chart_ms": chart}


def open_study(page: Page, url: str) -> Page:
    """The study's page with everything on it."""
    page.goto(f"{url}/studies/{NAME}")
    page.locator(".js-plotly-plot .legend").first.wait_for()
    return page


def slider_steps(browser: Browser, url: str, steps: int) -> list[float]:
    """Milliseconds from each step of the slider to the new plan on the page."""
    page = open_study(browser.new_page(), url)
    return [page.evaluate(STEP) for _ in range(steps)]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, the value below which 95 of 100 lie, and the largest."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 1),
        "largest": round(ordered[-1], 1),
        "count": len(ordered),
    }


if __name__ == "__main__":
    main()
