"""TensorBoard on a run: the real server in a real browser.

Each test leaves a screenshot in ``tests/artifacts/`` for review.
"""

import io
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from gatdist.config import load_config
from gatdist.monitor.sinks import Monitor
from gatdist.storage import Store
from small_runs import LENGTH, LINES, RATE
from support import end_group, free_port, wait_until

pytestmark = pytest.mark.browser

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"
TICKS = [128, 256, 384, 512]

# TensorBoard's pages are nested shadow trees, which plain selectors do not enter.
SEARCH = """
const below = (root, selector) => [root, ...root.querySelectorAll("*")].flatMap((node, index) => [
    ...(index > 0 && node.matches(selector) ? [node] : []),
    ...(node.shadowRoot ? below(node.shadowRoot, selector) : []),
]);
const said = node => node.nodeType === Node.TEXT_NODE ? node.textContent
    : node.localName === "style" ? ""
    : [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes].map(said).join(" ");
return arguments[0]
    .reduce((roots, selector) => roots.flatMap(root => below(root, selector)), [document])
    .map(element => (ASK));
"""


@pytest.fixture(scope="module")
def fetch(run_dir, tmp_path_factory):
    """``fetch(path)``: the answer of a TensorBoard server on the run; ``fetch.url`` is its root."""
    with tensorboard(run_dir, tmp_path_factory.mktemp("log"), "scalars", "images", "text") as get:
        yield get


@pytest.fixture(scope="module")
def fetch_families(families_dir, tmp_path_factory):
    """The same for runs on audio and text."""
    with tensorboard(families_dir, tmp_path_factory.mktemp("log"), "audio", "text") as get:
        yield get


@contextmanager
def tensorboard(logs, folder, *plugins, options=()):
    """Yield a server that has data for each plugin."""
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), *options]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def get(path):
        with urlopen(f"{get.url}/{path}", timeout=300) as response:
            return response.read()

    def has_loaded():
        assert server.poll() is None, log.read_text()
        try:
            return all(json.loads(get(f"data/plugin/{plugin}/tags")) for plugin in plugins)
        except (URLError, ConnectionError):
            return False

    get.url = f"http://127.0.0.1:{port}"
    try:
        wait_until(has_loaded, "TensorBoard to read the run")
        yield get
    finally:
        end_group(server)


class Page:
    """TensorBoard in a browser."""

    def __init__(self, browser, url):
        self.browser = browser
        self.url = url

    def open(self, tab, query=""):
        self.browser.get("about:blank")  # changing only the fragment would not reload the page
        self.browser.get(f"{self.url}/{query}#{tab}")

    def all(self, *path, ask="said(element)"):
        """Return the result for each element that a path of selectors matches (default: text)."""
        return self.browser.execute_script(SEARCH.replace("ASK", ask), path)

    def fakes_and_reals(self, *path, ask):
        """Return the results of two elements as soon as both are true."""

        def found():
            answers = self.all(*path, ask=ask)
            return len(answers) == 2 and all(answers) and answers

        return wait_until(found, f"fakes and reals at {path}")

    def image(self, selector):
        """Return the first matching element as PNG."""
        return self.browser.find_element("css selector", selector).screenshot_as_png

    def curve_width(self):
        """Return the width of the first chart's curve in pixels."""
        # The grid is light, and the mark at the last step is at most two pixels wide.
        with Image.open(io.BytesIO(self.image("line-chart canvas"))) as chart:
            return (np.asarray(chart.convert("L")) < 128).any(axis=0).sum()

    def screenshot(self, name):
        ARTIFACTS.mkdir(exist_ok=True)
        assert self.browser.save_screenshot(str(ARTIFACTS / f"tensorboard-{name}.png"))


@pytest.fixture
def page(browser, fetch):
    return Page(browser, fetch.url)


@pytest.fixture
def families(browser, fetch_families):
    return Page(browser, fetch_families.url)


def test_curves_are_drawn(page):
    page.open("timeseries", "?tagFilter=loss/")

    def cards():
        texts = ["".join(text.split()) for text in page.all("scalar-card")]
        return len(texts) == 2 and all("512" in text for text in texts) and texts

    discriminator, generator = sorted(wait_until(cards, "two cards that have reached 512 samples"))
    assert discriminator.startswith("loss/discriminator")
    assert generator.startswith("loss/generator")

    wait_until(lambda: page.curve_width() > 30, "a curve in the first chart")
    page.screenshot("scalars")


def test_compared_curves_share_a_chart(page, fetch):
    groups = {
        category["title"]: [chart["title"] for chart in category["chart"]]
        for category in json.loads(fetch("data/plugin/custom_scalars/layout"))["category"]
    }
    assert list(groups) == ["Players", "Metrics", "Health", "Time", "Data", "Scaling"]
    assert groups["Metrics"][0] == "fid", "which came after the first log"
    page.open("custom_scalars")
    charts = ("tf-custom-scalar-multi-line-chart-card",)

    def drawn():
        """Return the charts of the first group that show two curves."""
        texts = ["".join(text.split()) for text in page.all(*charts)]
        return [text for text in texts if "Matches(2)" in text]

    shared = ("Losses", "Logits", "Gradientnorms")
    wait_until(
        lambda: sum(text.startswith(shared) for text in drawn()) == 3, "the charts of both players"
    )
    page.screenshot("custom-scalars")


def test_images_are_shown(page):
    page.open("images")
    size = "element.complete && element.naturalWidth"
    shown = page.fakes_and_reals("tf-image-loader", "img", ask=size)
    assert min(shown) >= 300, "too small to be read by eye"
    titles = [title.split() for title in page.all("tf-image-loader")]
    assert any("samples/fakes" in title and "512" in title for title in titles)
    assert any("samples/reals" in title for title in titles)
    page.screenshot("images")


def test_configuration_is_shown(page):
    page.open("text")
    rows = wait_until(lambda: page.all("tf-text-loader", "tr"), "the table of the configuration")
    cells = [row.split() for row in rows]
    assert ["run.total_samples", "512"] in cells
    assert ["data.url", '"builtin:digits"'] in cells
    page.screenshot("text")


def test_audio_can_be_played(families):
    families.open("audio")
    shown = families.fakes_and_reals("tf-audio-loader", "audio", ask="element.duration")
    # 16 clips in sequence, with a pause of a quarter of a second after each.
    assert shown == pytest.approx([16 * (LENGTH / RATE + 0.25)] * 2, abs=0.01)
    titles = [title.split() for title in families.all("tf-audio-loader")]
    assert any("samples/fakes/audio" in title and "96" in title for title in titles)
    families.screenshot("audio")


def test_texts_are_shown(families):
    families.open("text")

    def loaded():
        found = [text.split() for text in families.all("tf-text-loader")]
        texts = {words[0]: words for words in found if words}
        shown = [texts.get(f"samples/{of}/text_summary", []) for of in ("fakes", "reals")]
        return "96" in shown[0] and "caba" in shown[1] and shown

    _, reals = wait_until(loaded, "the texts")
    assert set(LINES) <= set(reals)
    families.screenshot("texts")


def test_run_has_a_row_in_hparams(page):
    page.open("hparams")
    cells = ("tf-hparams-table-view", "vaadin-grid-cell-content")
    wait_until(lambda: "metric/fid" in " ".join(page.all(*cells)).split(), "a column of the FID")
    page.screenshot("hparams")


def test_curves_equal_metrics_of_run(fetch, run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines] == TICKS
    (run,) = tags = json.loads(fetch("data/plugin/scalars/tags"))
    assert {"loss/generator", "loss/discriminator", "gradient_norm/generator"} <= set(tags[run])
    for tag in ("loss/generator", "metric/fid", "throughput/samples_per_s"):
        query = f"run={run}&tag={quote(tag, safe='')}"
        drawn = json.loads(fetch(f"data/plugin/scalars/scalars?{query}"))
        written = [(line["samples_seen"], line[tag]) for line in lines if tag in line]
        assert [step for _, step, _ in drawn] == [step for step, _ in written]
        assert [value for *_, value in drawn] == pytest.approx([v for _, v in written], rel=1e-6)


def test_one_readable_image_per_log_interval(fetch):
    (run,) = json.loads(fetch("data/plugin/images/tags"))
    query = f"run={run}&tag={quote('samples/fakes', safe='')}&sample=0"
    entries = json.loads(fetch(f"data/plugin/images/images?{query}"))
    assert [entry["step"] for entry in entries] == TICKS
    for entry in entries:
        image = fetch(f"data/plugin/images/individualImage?{entry['query']}")
        with Image.open(io.BytesIO(image)) as grid:
            assert min(grid.size) >= 300
            assert len(grid.convert("L").getcolors()) > 20, "noise at least, not one colour"


@pytest.fixture(scope="module")
def segments_dir(tmp_path_factory):
    """A run on a store without append, stopped at 640 samples and resumed from 384, as copied."""
    store = Store(f"memory://{uuid4().hex}/run")
    config = load_config("digits", ['evaluate.metrics=["fid"]'])
    for resume_samples, stop in ((0, 640), (384, 1024)):
        monitor = Monitor(store, resume_samples=resume_samples)
        monitor.hparams(config)
        for seen in range(resume_samples + 64, stop + 1, 64):
            noise = np.random.default_rng(seen).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            monitor.preview(seen, "samples/fakes", noise)
            value = seen / 1024 + (100 if resume_samples == 0 and seen > 384 else 0)
            losses = {"loss/generator": value, "loss/discriminator": -value}
            monitor.tick(seen, losses | {"metric/fid": 1.0})
            monitor.flush()
            board = monitor._board
            wait_until(lambda board=board: board.is_complete, "the segment")
        monitor.close()
    folder = tmp_path_factory.mktemp("segments") / "run"
    (folder / "tensorboard").mkdir(parents=True)
    for name in store.list("tensorboard"):
        (folder / "tensorboard" / name).write_bytes(store.read(f"tensorboard/{name}"))
    store.delete("")
    return folder


@pytest.mark.parametrize("reader", ["--load_fast=true", "--load_fast=false"])
def test_uploaded_event_files_show_one_resumed_run(browser, segments_dir, tmp_path, reader):
    assert len(list(segments_dir.glob("tensorboard/*"))) >= 20
    expected = [*range(64, 1025, 64)]
    with tensorboard(segments_dir, tmp_path, "scalars", "images", options=[reader]) as get:

        def curve():
            tags = json.loads(get("data/plugin/scalars/tags"))
            assert list(tags) == ["tensorboard"], "one run"
            query = f"run=tensorboard&tag={quote('loss/generator', safe='')}"
            drawn = json.loads(get(f"data/plugin/scalars/scalars?{query}"))
            return drawn if drawn and drawn[-1][1] == 1024 else None

        drawn = wait_until(curve, "the last step")
        assert [step for _, step, _ in drawn] == expected
        assert [value for *_, value in drawn] == pytest.approx([step / 1024 for step in expected])
        query = f"run=tensorboard&tag={quote('samples/fakes', safe='')}&sample=0"
        images = json.loads(get(f"data/plugin/images/images?{query}"))
        assert images[-1]["step"] == 1024
        assert [one["step"] for one in images] == sorted({one["step"] for one in images})
        page = Page(browser, get.url)
        page.open("timeseries", "?tagFilter=loss/")

        def cards():
            texts = ["".join(text.split()) for text in page.all("scalar-card")]
            return len(texts) == 2 and all("1,024" in text or "1024" in text for text in texts)

        wait_until(cards, "two cards that have reached 1,024 samples")
        wait_until(lambda: page.curve_width() > 30, "a curve in the first chart")
        page.screenshot(f"segments-{reader.partition('=')[2]}")
        page.open("images")
        ask = "element.complete && element.naturalWidth"
        wait_until(lambda: page.all("tf-image-loader", "img", ask=ask), "an image")
        page.open("custom_scalars")
        charts = ("tf-custom-scalar-multi-line-chart-card",)
        wait_until(
            lambda: any("Matches(2)" in "".join(text.split()) for text in page.all(*charts)),
            "a chart of both losses",
        )
        page.open("hparams")
        cells = ("tf-hparams-table-view", "vaadin-grid-cell-content")
        wait_until(
            lambda: "metric/fid" in " ".join(page.all(*cells)).split(), "a column of the FID"
        )
