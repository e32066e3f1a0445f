"""The configuration: what is refused and how it is told, what resumes, what enters no file."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatdist.config import (
    cache_folder,
    env_values,
    expand_env,
    flatten,
    import_plugins,
    load_config,
    nearest,
    parse_config,
    preset_names,
    require_unchanged,
)
from gatdist.errors import ConfigError, PluginError

MINIMAL = """
[run]
total_samples = 1000
[data]
url = "builtin:ring"
"""


@pytest.fixture
def load(tmp_path):
    """``load(*overrides, toml=MINIMAL)``."""

    def from_file(*overrides, toml=MINIMAL):
        file = tmp_path / "own.toml"
        file.write_text(toml, encoding="utf-8")
        return load_config(str(file), overrides)

    return from_file


def refusal(function, *arguments, **options):
    """The message of the ConfigError that the call must raise; a user sees one line of it."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


# Files


def test_a_file_needs_only_its_data_and_length(load):
    config = load()
    assert (config.run.total_samples, config.data.url) == (1000, "builtin:ring")
    assert config.cluster.workers == 1


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_json(name):
    config = load_config(name)
    assert parse_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert config.run.global_batch % config.lanes == 0


def test_an_unknown_preset_is_told_with_the_nearest():
    assert refusal(load_config, "digit").startswith(
        "preset = 'digit': not known. Did you mean 'digits'?"
    )


def test_a_file_that_is_not_there():
    assert refusal(load_config, "absent.toml").startswith(
        "absent.toml: can't read the file (No such file"
    )


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    assert "can't read the file" in refusal(load_config, str(tmp_path / "folder.toml"))


def test_broken_toml_tells_the_line(load):
    message = refusal(load, toml="[run]\ntotal_samples = \n")
    assert "own.toml: not valid TOML" in message
    assert "line 2" in message


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "own.toml").write_bytes(b'[data]\nurl = "\xff\xfe"\n')
    assert "not valid TOML" in refusal(load_config, str(tmp_path / "own.toml"))


def test_a_file_may_use_any_language(load):
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
    told = refusal(load_config, str(tmp_path / "own.toml"))
    assert f"own.toml: is encoded as {encoding[:6].upper()}" in told
    assert "UTF-8" in told


def test_encoding_is_not_blamed_for_a_stray_nul(tmp_path):
    (tmp_path / "own.toml").write_text(MINIMAL + "# \0\n")
    told = refusal(load_config, str(tmp_path / "own.toml"))
    assert "line" in told
    assert "UTF-16" not in told


# Keys and values


def test_integers_that_no_tensor_holds_are_refused():
    told = refusal(load_config, "ring", [f"game.penalties.r1.change_samples=1{'0' * 400}"])
    assert "game.penalties.r1.change_samples" in told


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("run.global_bach", "Did you mean 'global_batch'?"),
        ("rum", "Did you mean 'run'?"),
        ("optim.generator.learning_rat", "Did you mean 'learning_rate'?"),
        ("game.penalties.r1.strenght", "Did you mean 'strength'?"),
        ("data.zzz", "Known: bad_sample_budget, block_bytes,"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(load, key, hint):
    assert refusal(load, f"{key}=1").startswith(f"{key}: unknown key. {hint}")


def test_an_unknown_key_of_an_optional_table(load):
    message = refusal(load, "run.convergence={patience=5}")
    assert message.startswith("run.convergence.patience: unknown key. Did you mean")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=one", "run.seed = 'one': input should be a valid integer"),
        ("run.seed=true", "run.seed = True: input should be a valid integer"),
        ("run.total_samples=1e5", "run.total_samples = 100000.0: input should be a valid integer"),
        ("data.url=3", "data.url = 3: input should be a valid string"),
        ("monitor.tensorboard=1", "monitor.tensorboard = 1: input should be a valid boolean"),
        ("evaluate.metrics=fid", "evaluate.metrics = 'fid': input should be a valid list"),
        ('evaluate.metrics=["fid", 3]', "evaluate.metrics.1 = 3: input should be a valid string"),
        ("optim=3", "optim = 3: must be a table of keys"),
        ("run=3", "run = 3: must be a table of keys"),
        ("game.penalties.r1=3", "game.penalties.r1 = 3: must be a table of keys"),
        ("run.storage_options=3", "run.storage_options: must be a table of keys"),
        ("model.generator=mlp", "model.generator = 'mlp': must be a table of keys"),
        ("data.resolution=big", "data.resolution = 'big': input should be a valid integer"),
    ],
)
def test_a_value_of_the_wrong_type(load, override, message):
    assert refusal(load, override) == message


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("run.total_samples", "0", "input should be greater than 0"),
        ("run.seed", "-1", "input should be greater than or equal to 0"),
        ("run.seed", str(2**63), "input should be less than 9223372036854775808"),
        ("optim.generator.learning_rate", "-1", "input should be greater than 0"),
        ("optim.generator.learning_rate", "nan", "input should be a finite number"),
        ("optim.generator.betas", "[0.1]", "list should have at least 2 items"),
        ("data.resolution", "[8, 8, 8]", "list should have at most 2 items"),
        ("precision.dtype", "'float8'", "input should be 'float32'"),
        ("health.won_accuracy", "0.5", "input should be greater than 0.5"),
    ],
)
def test_a_value_out_of_range(load, key, value, rule):
    assert refusal(load, f"{key}={value}").startswith(f"{key} = {value}: {rule}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.resolution=[8, -2]", "data.resolution.1 = -2: input should be greater than 0"),
        (
            "optim.generator.betas=[0, 1]",
            "optim.generator.betas.1 = 1: input should be less than 1",
        ),
    ],
)
def test_the_entry_of_a_list_that_is_wrong_is_named(load, override, message):
    assert refusal(load, override) == message


@pytest.mark.parametrize(
    ("toml", "key"),
    [
        ("", "run.total_samples"),
        ("[run]\ntotal_samples = 1000", "data.url"),
        (MINIMAL + "[model]\ngenerator = {width = 3}", "model.generator.name"),
        (MINIMAL + "[game.penalties.r1]\nevery_steps = 3", "game.penalties.r1.strength"),
    ],
)
def test_a_key_that_is_missing(load, toml, key):
    assert refusal(load, toml=toml) == (
        f"{key}: is required. Add it to the file or say --set {key}=VALUE."
    )


def test_an_unknown_key_is_told_before_the_one_that_is_missing_for_it(load):
    assert refusal(load, toml="[data]\nurll = 'x'").startswith("data.urll: unknown key")


def test_a_network_takes_options_of_its_own(load):
    network = load('model.generator={name="mlp", width=7, activation="tanh"}').model.generator
    assert network.options == {"width": 7, "activation": "tanh"}


def test_a_configuration_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().run.seed = 3


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
def test_a_bare_word_is_a_string_and_anything_else_toml(load, override, value):
    assert load(override).data.url == value


def test_set_takes_numbers_lists_tables_and_creates_sections(load):
    config = load(
        "run.seed=1_000",
        "optim.generator.learning_rate=2",
        "optim.discriminator={learning_rate=1e-3, betas=[0.5, 0.9]}",
        "game.penalties.r1.strength=0.5",
        'evaluate.metrics=["kid"]',
        'plugins=["mine.networks"]',
    )
    assert config.run.seed == 1000
    assert config.optim.generator.learning_rate == 2.0
    assert config.optim.discriminator.betas == [0.5, 0.9]
    assert config.game.penalties["r1"].every_steps == 1
    assert config.evaluate.metrics == ["kid"]
    assert config.plugins == ["mine.networks"]


def test_a_table_replaces_a_preset_s_and_a_key_only_itself():
    replaced = load_config("digits", ['model.generator={name="mlp"}'])
    assert replaced.model.generator.options == {}
    changed = load_config("digits", ["model.generator.width=5"])
    assert changed.model.generator.options["width"] == 5
    assert changed.model.generator.name == load_config("digits").model.generator.name


def test_of_two_overrides_the_later_counts(load):
    assert load("run.seed=1", "run.seed=2").run.seed == 2


@pytest.mark.parametrize("override", ["run.seed", "=3", "run..seed=3", ".seed=3", "run.=3", ""])
def test_set_without_key_or_value(load, override):
    assert refusal(load, override) == f"--set = {override!r}: must be section.key=value"


@pytest.mark.parametrize("value", ["", "a b", "[64,x]", "'open", "a#b"])
def test_set_with_neither_toml_nor_a_word(load, value):
    message = refusal(load, f"data.url={value}")
    assert message.startswith(f"--set data.url = {value!r}: not a TOML value")


def test_set_below_a_value(load):
    message = refusal(load, "run.seed=3", "run.seed.low=4")
    assert message == "--set run.seed.low = '4': seed is a value, not a table"


# Across fields


def test_a_run_shows_at_least_one_batch(load):
    assert refusal(load, "run.total_samples=63") == (
        "run.total_samples = 63: must be at least what one step shows (64)"
    )
    assert load("run.total_samples=64").run.total_samples == 64


def test_lanes_divide_the_batch_and_are_chosen_so(load):
    assert (
        refusal(load, "data.lanes=7") == "data.lanes = 7: must divide run.global_batch (64). Use 8."
    )
    assert load("data.lanes=16").lanes == 16


@given(st.integers(1, 1000))
def test_the_lanes_chosen_are_the_largest_divisor_up_to_64(batch):
    config = parse_config(
        {"run": {"total_samples": 1000, "global_batch": batch}, "data": {"url": "x"}}
    )
    assert batch % config.lanes == 0
    assert not [n for n in range(config.lanes + 1, min(64, batch) + 1) if batch % n == 0]


def test_convergence_needs_a_metric_that_is_measured(load):
    stop = 'run.convergence={metric="kid", patience_samples=100}'
    assert refusal(load, stop, 'evaluate.metrics=["fid"]') == (
        "run.convergence.metric = 'kid': must be one of evaluate.metrics (fid)"
    )
    assert refusal(load, stop).startswith("evaluate.every_samples = 0: must be above 0 where")
    assert load(stop, "evaluate.every_samples=100").run.convergence.metric == "kid"


@pytest.mark.parametrize(
    ("workers", "mend"),
    [
        (3, "Use 63 or 66, or --workers 2"),
        (48, "Use 48 or 96, or --workers 32"),
        (100, "Use 100, or --workers 64"),
    ],
)
def test_workers_share_the_batch_evenly(load, workers, mend):
    assert refusal(load().check_workers, workers) == (
        f"run.global_batch = 64: must be divisible by the {workers} workers. {mend}."
    )


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_workers_that_fit(load, workers):
    load().check_workers(workers)


# Resuming


@pytest.mark.parametrize(
    "override",
    [
        "run.global_batch=32",
        "run.seed=1",
        "data.lanes=32",
        "data.window_samples=64",
        "data.resolution=16",
        "model.latent_size=8",
        'model.generator={name="mlp"}',
        "game.update_rule=one_stage",
        "game.penalties.r1.strength=1.0",
        "game.averaging_half_life_samples=5",
        "optim.generator.learning_rate=1.0",
        "optim.generator.warmup_samples=10",
        "precision.dtype=float64",
    ],
)
def test_what_changes_the_mathematics_is_refused_on_resume(load, override):
    old, new = load(), load(override)
    key = override.partition("=")[0].removesuffix(".strength")
    assert old.digest() != new.digest()
    message = refusal(require_unchanged, old, new, "runs/x")
    assert message.startswith(key)
    assert "the run in runs/x was made with" in message
    assert message.endswith("Give the old value to resume, or another --run-dir to start afresh.")


def test_a_refused_change_names_both_values(load):
    assert refusal(require_unchanged, load(), load("run.seed=5"), "runs/x").startswith(
        "run.seed = 5: the run in runs/x was made with 0;"
    )


@pytest.mark.parametrize(
    "override",
    [
        "run.total_samples=2000",
        "run.tick_samples=1",
        "run.checkpoint_samples=1",
        "data.url=s3://elsewhere/copy",
        "data.lanes=64",  # what is chosen anyway
        "data.prefetch_batches=9",
        "data.storage_options={anon=true}",
        "monitor.tensorboard=false",
        "health.nonfinite=stop",
        "evaluate.every_samples=10",
        "cluster.workers=4",
        'plugins=["mine"]',
    ],
)
def test_what_does_not_change_the_mathematics_may_change(load, override):
    old, new = load(), load(override)
    assert old != new
    require_unchanged(old, new, "runs/x")
    assert old.digest() == new.digest()


def test_the_length_of_a_run_matters_where_the_rate_decays_towards_it(load):
    decay = "optim.generator.decay=linear"
    require_unchanged(load(decay), load(decay, "run.tick_samples=1"), "runs/x")
    message = refusal(
        require_unchanged, load(decay), load(decay, "run.total_samples=2000"), "runs/x"
    )
    assert message.startswith("run.total_samples = 2000: the run in runs/x was made with 1000")


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
    public = config.public()
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
    assert config.public()["data"]["url"] == public
    assert config.data.url == url, "the run itself needs it"


def test_what_is_public_is_a_configuration_again(load):
    config = load(toml=SECRETS)
    require_unchanged(parse_config(config.public()), config, "runs/x")


def test_references_are_listed_and_expanded_at_the_moment_of_use(load, monkeypatch):
    monkeypatch.setenv("BUCKET", "mine")
    monkeypatch.setenv("BUCKET_SECRET", "s")
    found = env_values(load(toml=SECRETS).model_dump_json())
    assert found == {"BUCKET": "mine", "BUCKET_SECRET": "s"}
    monkeypatch.setenv("EMPTY", "")
    assert expand_env("s3://${env:BUCKET}/x${env:EMPTY}/${env:BUCKET}") == "s3://mine/x/mine"
    assert expand_env("$BUCKET ${BUCKET} ${env:}") == "$BUCKET ${BUCKET} ${env:}"


def test_a_reference_to_what_is_not_set(monkeypatch):
    monkeypatch.delenv("ABSENT", raising=False)
    assert refusal(expand_env, "s3://${env:ABSENT}/x") == (
        "${env:ABSENT}: that environment variable is not set. export ABSENT=…."
    )


# Plugins and folders


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, where modules may be imported from and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_plugin_in_the_current_folder_imports(folder):
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
def test_a_plugin_that_does_not_import(folder, source, reason):
    if source:
        (folder / "my_networks_b.py").write_text(source)
    with pytest.raises(PluginError) as caught:
        import_plugins(["my_networks_b"])
    assert str(caught.value).startswith(
        f"plugins = 'my_networks_b': the module does not import ({reason}"
    )
    assert caught.value.exit_status == 2


def test_the_cache_folder_is_the_user_s_unless_they_say_otherwise(monkeypatch):
    monkeypatch.setenv("GATDIST_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("GATDIST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/gatdist")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/gatdist")


# Small helpers


@pytest.mark.parametrize(
    ("name", "hint"),
    [("fud", "Did you mean 'fid'? Known: fid, kid"), ("precision", "Known: fid, kid")],
)
def test_nearest(name, hint):
    assert nearest(name, ["kid", "fid"]) == hint


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}


def test_every_key_that_scripts_set_exists():
    known = set(flatten(load_config("digits").model_dump()))
    contract = """
        run.total_samples run.global_batch run.seed run.tick_samples run.checkpoint_samples
        run.reduction data.url data.resolution game.loss game.update_rule
        game.averaging_half_life_samples precision.dtype evaluate.metrics evaluate.num_samples
        plugins
    """
    assert not set(contract.split()) - known
