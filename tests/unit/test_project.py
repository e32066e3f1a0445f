"""The public API: names, commands, presets, and import time."""

import json
import pkgutil
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import gatdist

REPOSITORY = Path(__file__).resolve().parents[2]

# A new name here is a promise to users; removing one breaks their code.
PUBLIC = [
    "Config",
    "Context",
    "Draws",
    "GatdistError",
    "Task",
    "Term",
    "apply",
    "beat",
    "evaluate",
    "export",
    "import_weights",
    "index",
    "load",
    "load_config",
    "pack",
    "register_discriminator",
    "register_feature_extractor",
    "register_generator",
    "register_loss",
    "register_task",
    "register_term",
    "register_update_rule",
    "sample",
    "statistics",
    "train",
    "verify",
]


def test_public_names():
    assert gatdist.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_is_documented(name):
    assert callable(getattr(gatdist, name))
    assert getattr(gatdist, name).__doc__


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="'trian'"):
        gatdist.trian  # noqa: B018


def test_public_functions_are_not_replaced_by_submodules():
    """A submodule with the name of a public function would replace it when imported."""
    assert not {module.name for module in pkgutil.iter_modules(gatdist.__path__)} & set(PUBLIC)


def modules_after(code):
    """Return top-level modules that a fresh interpreter has imported after running ``code``."""
    report = (
        "import json, sys; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    )
    script = f"try:\n    {code}\nexcept SystemExit:\n    pass\n{report}"
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True
    )
    return set(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import gatdist",
        "from gatdist.cli import main; main(['--help'])",
        "from gatdist.cli import main; main(['train', '--help'])",
    ],
)
def test_import_and_help_do_not_load_heavy_libraries(code):
    assert not modules_after(code) & {"torch", "ray", "pydantic", "numpy", "fsspec", "tensorboard"}


def test_configuration_is_read_without_torch():
    loaded = modules_after("import gatdist; gatdist.load_config('digits')")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "ray", "numpy", "fsspec"}


def test_packing_does_not_import_torch():
    assert not modules_after("import gatdist.packing, gatdist.api") & {"torch", "ray"}


def test_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="gatdist")
    assert command.value == "gatdist.cli:main"
    assert version("gatdist") == gatdist.__version__


def test_lock_pins_everything_exactly_and_names_no_index():
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins[0].startswith("torch==")
    for pin in pins:
        name, equals, pinned = pin.partition("==")
        assert equals, pin
        assert name.replace("-", "").replace("_", "").replace(".", "").isalnum(), pin
        assert pinned.replace(".", "").isalnum(), f"{pin}: a local build tag or a marker"
    assert len(pins) == len({pin.partition("==")[0].lower() for pin in pins})
