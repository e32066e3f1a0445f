"""Reports in a browser: one file, no server, light and dark, wide and narrow.

Each test leaves screenshots in ``tests/artifacts/`` for review.
"""

import json
import shutil
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By

from gatdist.monitor.numbers import number
from gatdist.runs.report import report
from small_runs import LENGTH, LINES, RATE
from support import wait_until

pytestmark = pytest.mark.browser

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"


class Opened:
    """A report in the browser."""

    def __init__(self, browser, run_dir, folder, lacks=()):
        page, missing = report(str(run_dir))
        assert missing == list(lacks)
        file = folder / "report.html"
        file.write_text(page)
        self.browser = browser
        self.emulate(1280, "light")
        browser.get_log("browser")  # messages of earlier pages
        browser.get(f"file://{file}")

    def run_script(self, script):
        return self.browser.execute_script(f"return {script}")

    def emulate(self, width, scheme, height=1000):
        self.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, name):
        ARTIFACTS.mkdir(exist_ok=True)
        assert self.browser.save_screenshot(str(ARTIFACTS / f"report-{name}.png"))

    def require_self_contained(self):
        """Assert no console messages and no requests."""
        assert self.browser.get_log("browser") == []
        assert self.run_script("performance.getEntriesByType('resource').map(e => e.name)") == []


@pytest.fixture
def opened(browser, tmp_path):
    def opens(run_dir, lacks=()):
        return Opened(browser, run_dir, tmp_path, lacks)

    yield opens
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_report_shows_run_without_requests(opened, run_dir):
    page = opened(run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # Images are decoded, one frame is visible, and the slider goes to the first.
    images = page.run_script("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(images) == 5
    assert min(images) >= 300
    seen = "[...document.querySelectorAll('.frames figure')].filter(f => f.offsetHeight)"
    assert page.run_script(f"{seen}.map(f => f.innerText.trim())") == ["generated, at 512 samples"]
    page.run_script("""(slider => {
        slider.value = 0; slider.dispatchEvent(new Event("input"));
    })(document.querySelector("input[type=range]"))""")
    assert page.run_script(f"{seen}.map(f => f.innerText.trim())") == ["generated, at 128 samples"]
    # Curves end at the values of the last log interval, and show values at the mouse.
    chart = page.browser.find_element(By.CSS_SELECTOR, ".chart[data-chart*=generator]")
    legend = {item.text for item in chart.find_elements(By.TAG_NAME, "li")}
    players = "generator", "discriminator"
    assert legend == {f"{player} {number(lines[-1][f'loss/{player}'])}" for player in players}
    svg = chart.find_element(By.TAG_NAME, "svg")
    page.browser.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", svg)
    at = svg.size["width"] // 2 - 12
    ActionChains(page.browser).move_to_element_with_offset(svg, at, 0).perform()
    tip = chart.find_element(By.CLASS_NAME, "tip").text.split()
    assert tip[:2] == ["512", "samples"]
    for player in players:
        shown = float(tip[tip.index(player) + 1])
        assert shown == pytest.approx(lines[-1][f"loss/{player}"], rel=1e-3)
    page.screenshot("curves")
    page.require_self_contained()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "dark")])
def test_report_is_readable_in_light_and_dark_wide_and_narrow(opened, run_dir, width, scheme):
    page = opened(run_dir)
    page.emulate(width, scheme)
    assert page.run_script("document.documentElement.scrollWidth") <= width
    colors = page.run_script(
        "['color', 'backgroundColor'].map(c => getComputedStyle(document.body)[c])"
    )
    ink, paper = (sum(map(int, c[4:-1].split(","))) for c in colors)
    assert abs(ink - paper) > 400
    assert (ink > paper) == (scheme == "dark")
    page.emulate(width, scheme, height=page.run_script("document.documentElement.scrollHeight"))
    page.screenshot(f"{scheme}-{width}")


def test_audio_plays_and_texts_are_shown(opened, families_dir):
    page = opened(families_dir / "clips")
    seconds = 16 * (LENGTH / RATE + 0.25)
    durations = "[...document.querySelectorAll('audio')].map(a => a.duration)"
    found = wait_until(
        lambda: all(page.run_script(durations)) and page.run_script(durations), "the audio"
    )
    assert found == pytest.approx([seconds] * 4, abs=0.01)
    page.screenshot("audio")
    page.require_self_contained()
    page = opened(families_dir / "texts")
    texts = page.run_script(
        "[...document.querySelectorAll('pre')].map(p => p.textContent.split('\\n'))"
    )
    assert len(texts) == 4
    assert set(LINES) <= set(texts[-1])
    page.require_self_contained()


def test_content_of_a_run_is_not_executed(opened, run_dir, tmp_path):
    evil = """</script><script>document.title = "evil"</script><img src=x onerror='evil()'>"""
    copy = tmp_path / 'run"><b>'
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["url"] = config["plugins"] = evil
    (copy / "config.json").write_text(json.dumps(config))
    attempt = json.loads((copy / "attempts.jsonl").read_text())
    text = json.dumps(attempt | {"reason": evil, "hosts": [evil], "versions": {evil: evil}})
    (copy / "attempts.jsonl").write_text(f"{text}\n")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"samples_seen": 640, f"penalty/{evil}": 2.0, "penalty/a": 1.0}))
    lacks = "config.json is not valid for this version: plugins"
    page, missing = report(str(copy))
    assert missing[0].startswith(lacks)
    page = opened(copy, missing)
    assert page.run_script(
        "[document.scripts.length, document.querySelectorAll('[onerror]').length]"
    ) == [
        1,
        0,
    ]
    assert page.run_script("document.title") == 'run"><b> – gatdist'
    assert evil in page.run_script("document.querySelector('#attempts').textContent")
    page.require_self_contained()
