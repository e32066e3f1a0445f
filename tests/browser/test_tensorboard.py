"""A person opens TensorBoard on a run: the real server, a real browser, and what must be on the page.

Each test leaves a screenshot in ``tests/artifacts/`` for people to look at.
"""

import io
import json
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from PIL import Image
from selenium import webdriver

from support import end_group, free_port, need, wait_until

pytestmark = pytest.mark.browser

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"
TICKS = [128, 256, 384, 512]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, run_gatdist):
    """A run of four ticks and two evaluations."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    settings = [
        "run.total_samples=512",
        "run.tick_samples=128",
        "model.generator.width=8",
        "model.discriminator.width=8",
        'evaluate.metrics=["fid"]',
        "evaluate.every_samples=256",
        "evaluate.num_samples=64",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    finished = run_gatdist("train", "digits", "--local", "--run-dir", folder, *sets, timeout=110)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def fetch(run_dir, tmp_path_factory):
    """``fetch(path)``: the bytes that a TensorBoard server on the run answers; ``fetch.url`` is its root."""
    port = free_port()
    log = tmp_path_factory.mktemp("tensorboard") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def get(path):
        with urlopen(f"{get.url}/{path}", timeout=10) as response:
            return response.read()

    def has_loaded():
        assert server.poll() is None, log.read_text()
        try:
            return all(
                json.loads(get(f"data/plugin/{plugin}/tags"))
                for plugin in ("scalars", "images", "text")
            )
        except (URLError, ConnectionError):
            return False

    get.url = f"http://127.0.0.1:{port}"
    try:
        wait_until(has_loaded, "TensorBoard to read the run")
        yield get
    finally:
        end_group(server)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that talks to nobody but the pages it is sent to."""
    need("chromium", "chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for switch in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1400,1000",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, fetch):
    """``page(fragment)`` opens a tab of TensorBoard; ``page.all(selector, script)`` asks each element."""

    class Page:
        def __call__(self, fragment, query=""):
            browser.get("about:blank")  # a new fragment alone would load nothing anew
            browser.get(f"{fetch.url}/{query}#{fragment}")

        def all(self, selector, script="element.innerText"):
            return browser.execute_script(
                f"return [...document.querySelectorAll({selector!r})].map(element => {script})"
            )

        def keep(self, name):
            ARTIFACTS.mkdir(exist_ok=True)
            assert browser.save_screenshot(str(ARTIFACTS / f"{name}.png"))

    return Page()


def test_the_curves_are_drawn(page):
    page("timeseries", "?tagFilter=loss/")

    def cards():
        texts = ["".join(text.split()) for text in page.all("scalar-card")]
        return len(texts) == 2 and all("512" in text for text in texts) and texts

    discriminator, generator = sorted(wait_until(cards, "two cards that have reached 512 samples"))
    assert discriminator.startswith("loss/discriminator")
    assert generator.startswith("loss/generator")
    curves = "scalar-card line-chart path, scalar-card line-chart canvas"
    wait_until(lambda: page.all(curves), "a curve")
    page.keep("tensorboard-scalars")


def test_the_pictures_are_shown(page):
    page("images")

    def widths():
        found = page.all("tf-image-loader img", "element.complete ? element.naturalWidth : 0")
        return len(found) == 2 and all(found) and found

    shown = wait_until(widths, "the grids of fakes and reals")
    assert min(shown) >= 300, "too small to be read by eye"
    titles = page.all("tf-image-loader")
    assert any("samples/fakes" in title and "512" in title for title in titles)
    assert any("samples/reals" in title for title in titles)
    page.keep("tensorboard-images")


def test_the_configuration_can_be_read(page):
    page("text")
    rows = wait_until(lambda: page.all("tf-text-loader tr"), "the table of the configuration")
    cells = [row.split() for row in rows]
    assert ["run.total_samples", "512"] in cells
    assert ["data.url", '"builtin:digits"'] in cells
    page.keep("tensorboard-text")


def test_the_run_has_a_row_in_the_table_of_runs(page):
    page("hparams")
    rows = wait_until(
        lambda: [t for t in page.all("tf-hparams-table-view vaadin-grid-cell-content") if t],
        "the table of runs",
    )
    assert "metric/fid" in " ".join(rows)
    page.keep("tensorboard-hparams")


def test_the_curves_are_the_numbers_of_the_run(fetch, run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines] == TICKS
    (run,) = tags = json.loads(fetch("data/plugin/scalars/tags"))
    assert {"loss/generator", "loss/discriminator", "gradient_norm/generator"} <= set(tags[run])
    for tag in ("loss/generator", "metric/fid", "throughput/samples_per_s"):
        points = json.loads(
            fetch(f"data/plugin/scalars/scalars?run={run}&tag={quote(tag, safe='')}")
        )
        written = [(line["samples_seen"], line[tag]) for line in lines if tag in line]
        assert [step for _, step, _ in points] == [step for step, _ in written]
        assert [value for *_, value in points] == pytest.approx([v for _, v in written], rel=1e-6)


def test_there_is_one_readable_picture_a_tick(fetch):
    (run,) = json.loads(fetch("data/plugin/images/tags"))
    tag = quote("samples/fakes", safe="")
    entries = json.loads(fetch(f"data/plugin/images/images?run={run}&tag={tag}&sample=0"))
    assert [entry["step"] for entry in entries] == TICKS
    for entry in entries:
        with Image.open(
            io.BytesIO(fetch(f"data/plugin/images/individualImage?{entry['query']}"))
        ) as grid:
            assert min(grid.size) >= 300
            assert len(grid.convert("L").getcolors()) > 20, "noise at least, not one colour"
