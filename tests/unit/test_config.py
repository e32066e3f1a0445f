"""The configuration: errors, what may change on resume, and secrets."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gatdist.common.errors import ConfigError, PluginError, nearest
from gatdist.config import (
    cache_folder,
    env_values,
    expand_env,
    flatten,
    import_plugins,
    load_config,
    parse_config,
    preset_names,
    require_unchanged,
)
from support import refused

MINIMAL = """
[run]
total_samples = 1000
[data]
url = "builtin:ring"
"""


@pytest.fixture
def load(tmp_path):
    """``load(*overrides, toml=MINIMAL)``: load a configuration file."""

    def from_file(*overrides, toml=MINIMAL):
        file = tmp_path / "own.toml"
        file.write_text(toml, encoding="utf-8")
        return load_config(str(file), overrides)

    return from_file


def refusal(function, *arguments, **options):
    """Return the ConfigError that the call must raise; a user sees one line of it."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    return caught.value


def is_of(error, key, value):
    return (error.subject, error.value) == (key, value)


# Files


def test_file_requires_data_and_length_only(load):
    config = load()
    assert (config.run.total_samples, config.data.url) == (1000, "builtin:ring")
    assert config.cluster.workers == 1


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_json(name):
    config = load_config(name)
    assert parse_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert config.run.global_batch % config.interleave == 0


def test_unknown_preset_suggests_the_nearest():
    error = refusal(load_config, "digit")
    assert is_of(error, "preset", "digit")
    assert "'digits'" in str(error)


def test_missing_file_is_rejected():
    assert refusal(load_config, "absent.toml").subject == "absent.toml"


def test_folder_is_rejected(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    assert refusal(load_config, str(tmp_path / "folder.toml")).subject.endswith("folder.toml")


def test_invalid_toml_names_the_line(load):
    error = refusal(load, toml="[run]\ntotal_samples = \n")
    assert error.subject.endswith("own.toml")
    assert "line 2" in str(error)


def test_file_that_is_not_utf8_is_rejected(tmp_path):
    (tmp_path / "own.toml").write_bytes(b'[data]\nurl = "\xff\xfe"\n')
    assert refusal(load_config, str(tmp_path / "own.toml")).subject.endswith("own.toml")


def test_file_may_use_any_language(load):
    assert load(toml=MINIMAL.replace("builtin:ring", "/daten/gemälde")).data.url == "/daten/gemälde"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encoding_byte_order_mark_and_crlf_are_read(tmp_path, mark, newline):
    text = MINIMAL.replace("builtin:ring", "/daten/gemälde").replace("\n", newline)
    (tmp_path / "own.toml").write_bytes(mark + text.encode())
    assert load_config(str(tmp_path / "own.toml")).data.url == "/daten/gemälde"


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_encoding_other_than_utf_8_is_named(tmp_path, encoding, mark):
    text = "\ufeff" * mark + MINIMAL
    (tmp_path / "own.toml").write_bytes(text.encode(encoding))
    error = refusal(load_config, str(tmp_path / "own.toml"))
    assert error.subject.endswith("own.toml")
    assert encoding[:6].upper() in str(error)


def test_encoding_is_not_blamed_for_a_stray_nul(tmp_path):
    (tmp_path / "own.toml").write_text(MINIMAL + "# \0\n")
    error = refusal(load_config, str(tmp_path / "own.toml"))
    assert "line 6" in str(error)
    assert "UTF-16" not in str(error)


# Keys and values


def test_integers_beyond_int64_are_rejected():
    key = "game.penalties.r1.every_steps"
    assert refusal(load_config, "ring", [f"{key}=1{'0' * 400}"]).subject == key


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("run.global_bach", "global_batch"),
        ("rum", "run"),
        ("optim.generator.learning_rat", "learning_rate"),
        ("game.penalties.r1.strenght", "strength"),
        ("data.zzz", "block_bytes"),
    ],
)
def test_unknown_key_suggests_the_nearest(load, key, known):
    error = refusal(load, f"{key}=1")
    assert is_of(error, key, None)
    assert known in str(error)


def test_unknown_key_of_an_optional_table_is_rejected(load):
    assert refusal(load, "run.convergence={patience=5}").subject == "run.convergence.patience"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run.seed=one", "run.seed", "one"),
        ("run.seed=true", "run.seed", True),
        ("run.total_samples=1e5", "run.total_samples", 100000.0),
        ("data.url=3", "data.url", 3),
        ("monitor.tensorboard=1", "monitor.tensorboard", 1),
        ("evaluate.metrics=fid", "evaluate.metrics", "fid"),
        ('evaluate.metrics=["fid", 3]', "evaluate.metrics.1", 3),
        ("optim=3", "optim", 3),
        ("run=3", "run", 3),
        ("game.penalties.r1=3", "game.penalties.r1", 3),
        ("run.storage_options=3", "run.storage_options", None),  # it may contain a secret
        ("model.generator=mlp", "model.generator", "mlp"),
        ("data.resolution=big", "data.resolution", "big"),
        ("data.resolution=[8, -2]", "data.resolution.1", -2),
        ("optim.generator.betas=[0, 1]", "optim.generator.betas.1", 1),
    ],
)
def test_wrong_type_of_a_value_or_list_entry_is_named(load, override, key, value):
    assert is_of(refusal(load, override), key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.total_samples", "0"),
        ("run.seed", "-1"),
        ("run.seed", str(2**63)),
        ("optim.generator.learning_rate", "-1"),
        ("optim.generator.learning_rate", "nan"),
        ("optim.generator.betas", "[0.1]"),
        ("data.resolution", "[8, 8, 8]"),
        ("precision.dtype", "'float8'"),
        ("health.won_accuracy", "0.5"),
    ],
)
def test_value_out_of_range_is_rejected(load, key, value):
    error = refusal(load, f"{key}={value}")
    assert (error.subject, repr(error.value)) == (key, value)


@pytest.mark.parametrize(
    ("toml", "key"),
    [
        ("", "run.total_samples"),
        ("[run]\ntotal_samples = 1000", "data.url"),
        (MINIMAL + "[model]\ngenerator = {width = 3}", "model.generator.name"),
        (MINIMAL + "[game.penalties.r1]\nevery_steps = 3", "game.penalties.r1.strength"),
    ],
)
def test_missing_key_is_rejected(load, toml, key):
    assert is_of(refusal(load, toml=toml), key, None)


def test_unknown_key_is_reported_before_a_missing_one(load):
    assert refusal(load, toml="[data]\nurll = 'x'").subject == "data.urll"


def test_network_accepts_its_own_options(load):
    network = load('model.generator={name="mlp", width=7, activation="tanh"}').model.generator
    assert network.options == {"width": 7, "activation": "tanh"}


def test_configuration_is_frozen(load):
    config = load()
    with pytest.raises(ValidationError):
        config.run.seed = 3


# --set


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.url=builtin:digits", "builtin:digits"),
        ("data.url=s3://bucket/a-b_c.d?x&y", "s3://bucket/a-b_c.d?x&y"),
        ("data.url='with blanks'", "with blanks"),
        ('data.url="a=b"', "a=b"),
        (" data.url = '${env:BUCKET}/x' ", "${env:BUCKET}/x"),
    ],
)
def test_bare_word_is_a_string_and_anything_else_toml(load, override, value):
    assert load(override).data.url == value


def test_set_accepts_numbers_lists_tables_and_creates_sections(load):
    config = load(
        "run.seed=1_000",
        "optim.generator.learning_rate=2",
        "optim.discriminator={learning_rate=1e-3, betas=[0.5, 0.9]}",
        "game.penalties.r1.strength=0.5",
        'evaluate.metrics=["kid"]',
        'plugins=["mine.networks"]',
    )
    assert config.run.seed == 1000
    assert config.optim.generator.learning_rate.at(0) == 2.0
    assert [beta.at(0) for beta in config.optim.discriminator.betas] == [0.5, 0.9]
    assert config.game.penalties["r1"].every_steps == 1
    assert config.evaluate.metrics == ["kid"]
    assert config.plugins == ["mine.networks"]


def test_table_replaces_a_presets_table_and_a_key_only_itself():
    replaced = load_config("digits", ['model.generator={name="mlp"}'])
    assert replaced.model.generator.options == {}
    changed = load_config("digits", ["model.generator.width=5"])
    assert changed.model.generator.options["width"] == 5
    assert changed.model.generator.name == load_config("digits").model.generator.name


def test_later_of_two_overrides_wins(load):
    assert load("run.seed=1", "run.seed=2").run.seed == 2


@pytest.mark.parametrize("override", ["run.seed", "=3", "run..seed=3", ".seed=3", "run.=3", ""])
def test_set_without_key_or_value_is_rejected(load, override):
    assert is_of(refusal(load, override), "--set", override)


@pytest.mark.parametrize("value", ["", "a b", "[64,x]", "'open", "a#b"])
def test_set_with_neither_toml_nor_a_word_is_rejected(load, value):
    assert is_of(refusal(load, f"data.url={value}"), "--set data.url", value)


def test_set_below_a_value_is_rejected(load):
    assert is_of(refusal(load, "run.seed=3", "run.seed.low=4"), "--set run.seed.low", "4")


# Across fields


def test_run_shows_at_least_one_batch(load):
    assert is_of(refusal(load, "run.total_samples=63"), "run.total_samples", 63)
    assert load("run.total_samples=64").run.total_samples == 64


def test_virtual_workers_divide_the_batch_and_default_to_a_divisor(load):
    error = refusal(load, "data.interleave=7")
    assert is_of(error, "data.interleave", 7)
    for fact in ("(64)", " 8."):
        assert fact in str(error)
    assert load("data.interleave=16").interleave == 16


@given(st.integers(1, 1000))
def test_default_of_virtual_workers_is_the_largest_divisor_up_to_64(batch):
    config = parse_config(
        {"run": {"total_samples": 1000, "global_batch": batch}, "data": {"url": "x"}}
    )
    assert batch % config.interleave == 0
    assert not [n for n in range(config.interleave + 1, min(64, batch) + 1) if batch % n == 0]


def test_convergence_requires_a_measured_metric(load):
    stop = 'run.convergence={metric="kid", patience_samples=100}'
    other = refusal(load, stop, 'evaluate.metrics=["fid"]')
    assert is_of(other, "run.convergence.metric", "kid")
    assert is_of(refusal(load, stop), "evaluate.every_samples", 0)
    assert load(stop, "evaluate.every_samples=100").run.convergence.metric == "kid"


def test_each_worker_has_a_sample_of_each_batch(load):
    error = refusal(load().check_workers, 65)
    assert is_of(error, "run.global_batch", 64)
    for fact in ("65 workers", "Use 65", "--workers 64"):
        assert fact in str(error)
    assert is_of(
        refusal(load("game.generator_batch=5").check_workers, 6), "game.generator_batch", 5
    )


@pytest.mark.parametrize("workers", [1, 2, 7, 64])
def test_valid_worker_counts(load, workers):
    load().check_workers(workers)


@pytest.mark.parametrize(
    ("reduction", "workers", "speedup"),
    [("fast", 4, 4), ("fast", 40, 32), ("canonical", 2, 2), ("canonical", 3, 2)],
)
def test_speedup_is_limited_by_the_largest_share(load, reduction, workers, speedup):
    assert load(f"run.reduction={reduction}").speedup(workers) == speedup


# Resuming


@pytest.mark.parametrize(
    "override",
    [
        "run.global_batch=32",
        "run.seed=1",
        "data.interleave=32",
        "data.shuffle_window_samples=64",
        "data.resolution=16",
        "model.latent_size=8",
        'model.generator={name="mlp"}',
        "game.update_rule=one_stage",
        "game.penalties.r1.strength=1.0",
        "game.ema_half_life_samples=5",
        "optim.generator.learning_rate=1.0",
        "optim.generator.learning_rate={start=1.0, end=0.0, samples=10}",
        "game.generator_batch=32",
        "precision.dtype=float64",
    ],
)
def test_change_that_affects_the_result_is_rejected_on_resume(load, override):
    old, new = load(), load(override)
    key = override.partition("=")[0].removesuffix(".strength")
    assert old.digest() != new.digest()
    error = refusal(require_unchanged, old, new, "runs/x")
    assert error.subject.startswith(key)
    assert "runs/x" in str(error)


def test_rejected_change_names_both_values(load):
    error = refusal(require_unchanged, load(), load("run.seed=5"), "runs/x")
    assert is_of(error, "run.seed", 5)
    assert " 0. " in str(error)


@pytest.mark.parametrize(
    "override",
    [
        "run.total_samples=2000",
        "run.log_every_samples=1",
        "run.checkpoint_every_samples=1",
        "data.url=s3://elsewhere/copy",
        "data.interleave=64",  # the default
        "data.prefetch_batches=9",
        "data.storage_options={anon=true}",
        "monitor.tensorboard=false",
        "health.nonfinite=stop",
        "evaluate.every_samples=10",
        "cluster.workers=4",
        'plugins=["mine"]',
    ],
)
def test_change_that_does_not_affect_the_result_is_accepted_on_resume(load, override):
    old, new = load(), load(override)
    assert old != new
    require_unchanged(old, new, "runs/x")
    assert old.digest() == new.digest()


def test_run_may_be_extended_with_any_schedule(load):
    falling = "optim.generator.learning_rate={start=1.0, end=0.0, samples=1000}"
    require_unchanged(load(falling), load(falling, "run.total_samples=2000"), "runs/x")


# Secrets


SECRETS = """
[run]
total_samples = 1000
storage_options = { key = "AKIA", secret = "${env:BUCKET_SECRET}", anon = false }
[data]
url = "s3://${env:BUCKET}/x"
[data.storage_options.client_kwargs]
endpoint_url = "http://host:9000"
aws_session_token = "abc"
headers = { Authorization = "Bearer abc" }
"""


def test_secrets_are_masked_and_references_kept(load):
    config = load(toml=SECRETS)
    public = config.redacted()
    assert public["run"]["storage_options"] == {
        "key": "***",
        "secret": "${env:BUCKET_SECRET}",
        "anon": False,
    }
    assert public["data"]["storage_options"]["client_kwargs"] == {
        "endpoint_url": "http://host:9000",
        "aws_session_token": "***",
        "headers": {"Authorization": "***"},
    }
    assert public["data"]["url"] == "s3://${env:BUCKET}/x"
    assert "AKIA" not in json.dumps(public)
    assert "abc" not in json.dumps(public)
    assert config.run.storage_options["key"] == "AKIA", "the run itself needs it"


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://me:hunter2@host/x", "https://me:***@host/x"),
        ("https://me:${env:PASSWORD}@host/x", "https://me:${env:PASSWORD}@host/x"),
        ("https://host/x?v=1&sig=abc%2F", "https://host/x?v=***&sig=***"),
        ("https://host/x?sig=${env:SIGNATURE}", "https://host/x?sig=${env:SIGNATURE}"),
        ("abfss://container@account.dfs.host/x", "abfss://container@account.dfs.host/x"),
        ("s3://bucket/a:b@c?d=e", "s3://bucket/a:b@c?d=e"),
        ("https://t0ken@host/x", "https://***@host/x"),
        ("https://me:p@ss@host/x", "https://me:***@host/x"),
        ("https://${env:ME}:${env:PASSWORD}@host/x", "https://${env:ME}:${env:PASSWORD}@host/x"),
        ("https://${env:TOKEN}@host/x", "https://${env:TOKEN}@host/x"),
        ("abfs://container@account.example/x", "abfs://container@account.example/x"),
    ],
)
def test_secrets_in_a_url_are_masked_and_references_kept(load, url, public):
    config = load(toml=SECRETS.replace("s3://${env:BUCKET}/x", url))
    assert config.redacted()["data"]["url"] == public
    assert config.data.url == url, "the run itself needs it"


def test_redacted_configuration_is_valid(load):
    config = load(toml=SECRETS)
    require_unchanged(parse_config(config.redacted()), config, "runs/x")


def test_references_are_listed_and_expanded_when_used(load, monkeypatch):
    monkeypatch.setenv("BUCKET", "mine")
    monkeypatch.setenv("BUCKET_SECRET", "s")
    found = env_values(load(toml=SECRETS).model_dump_json())
    assert found == {"BUCKET": "mine", "BUCKET_SECRET": "s"}
    monkeypatch.setenv("EMPTY", "")
    assert expand_env("s3://${env:BUCKET}/x${env:EMPTY}/${env:BUCKET}") == "s3://mine/x/mine"
    assert expand_env("$BUCKET ${BUCKET} ${env:}") == "$BUCKET ${BUCKET} ${env:}"


def test_reference_to_an_unset_variable_is_rejected(monkeypatch):
    monkeypatch.delenv("ABSENT", raising=False)
    assert refusal(expand_env, "s3://${env:ABSENT}/x").subject == "${env:ABSENT}"


# Plugins and folders


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder; modules imported from it are removed afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_plugin_in_the_current_folder_is_imported(folder):
    (folder / "my_networks_a.py").write_text("loaded = True")
    import_plugins(["my_networks_a"])
    assert sys.modules["my_networks_a"].loaded


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'my_networks_b'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError: invalid syntax"),
        ("import absent_library", "ModuleNotFoundError: No module named 'absent_library'"),
    ],
)
def test_plugin_that_fails_to_import_is_reported(folder, source, reason):
    if source:
        (folder / "my_networks_b.py").write_text(source)
    with pytest.raises(PluginError) as caught:
        import_plugins(["my_networks_b"])
    assert is_of(caught.value, "plugins", "my_networks_b")
    assert reason in str(caught.value)
    assert caught.value.exit_status == 2


def test_cache_folder_is_the_users_unless_configured(monkeypatch):
    monkeypatch.setenv("GATDIST_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("GATDIST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/gatdist")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/gatdist")


# Small helpers


@pytest.mark.parametrize(("name", "quoted"), [("fud", 1), ("precision", 0)])
def test_nearest(name, quoted):
    hint = nearest(name, ["kid", "fid"])
    assert hint.count("'fid'") == quoted
    assert "fid, kid" in hint


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}


def test_every_key_that_scripts_set_exists():
    known = set(flatten(load_config("digits").model_dump()))
    contract = """
        run.total_samples run.global_batch run.seed run.log_every_samples
        run.checkpoint_every_samples
        run.reduction data.url data.resolution game.loss game.update_rule
        game.ema_half_life_samples precision.dtype evaluate.metrics evaluate.num_samples
        plugins
    """
    assert not set(contract.split()) - known


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("run." + "tick_samples", "run.log_every_samples"),
        ("data." + "lanes", "data.interleave"),
        ("cluster." + "late_s", "cluster.straggler_warn_s"),
        ("optim.generator.warmup" + "_samples", "optim.generator.learning_rate.warmup"),
        ("game.penalties.r1.final" + "_strength", "game.penalties.r1.strength.end"),
    ],
)
def test_key_of_an_earlier_version_is_rejected_with_its_new_name(old, new):
    with refused(ConfigError, old) as found:
        load_config("digits", [f"{old}=8"])
    assert new in str(found.value)
