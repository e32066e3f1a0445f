"""Runs to display, and a browser."""

import pytest
from selenium import webdriver

import gatdist
from small_runs import AUDIO, TEXT, small_config, write_clips, write_texts
from support import need


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, run_gatdist):
    """A run with four log intervals and two evaluations."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    settings = [
        "run.total_samples=512",
        "run.log_every_samples=128",
        "model.generator.width=8",
        "model.discriminator.width=8",
        'evaluate.metrics=["fid"]',
        "evaluate.every_samples=256",
        "evaluate.num_samples=64",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    finished = run_gatdist("train", "digits", "--local", "--run-dir", folder, *sets, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="session")
def families_dir(tmp_path_factory):
    """The folder of two runs: ``clips`` and ``texts``."""
    folder = tmp_path_factory.mktemp("families")
    write_clips(folder / "tones")
    write_texts(folder / "words")
    unmeasured = {"evaluate": {"metrics": []}}
    clips = small_config(folder / "tones", AUDIO | unmeasured)
    texts = small_config(folder / "words", TEXT | unmeasured, vocabulary="abc")
    gatdist.train(clips, f"{folder}/runs/clips", local=True)
    gatdist.train(texts, f"{folder}/runs/texts", local=True)
    return folder / "runs"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium without network access except to the tested pages."""
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
