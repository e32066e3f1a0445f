"""Schedules of configuration values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gatdist.common.errors import ConfigError
from gatdist.config import Schedule, load_config, parse_config, require_unchanged
from support import refused

values = st.floats(1e-6, 1e3)


@given(values, values, st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 10_000))
@pytest.mark.parametrize("shape", ["cosine", "linear", "exponential"])
def test_value_moves_monotonically_from_start_to_end(shape, start, end, samples, delay, seen):
    schedule = Schedule(start=start, end=end, samples=samples, shape=shape, delay=delay)
    now, later = schedule.at(seen), schedule.at(seen + 7)
    assert min(start, end) * (1 - 1e-12) <= now <= max(start, end) * (1 + 1e-12)
    assert (later - now) * (end - start) >= -1e-9
    if seen < delay:
        assert now == start
    if seen >= delay + samples:
        assert now == end


def test_half_way_is_the_mean_of_each_shape():
    middles = {
        shape: Schedule(start=4.0, end=1.0, samples=200, shape=shape, delay=100).at(200)
        for shape in ("cosine", "linear", "exponential")
    }
    assert middles == pytest.approx({"cosine": 2.5, "linear": 2.5, "exponential": 2.0})


@pytest.mark.parametrize("value", [1e-300, 1e-37, 1e37])
def test_exponential_changes_stay_between_values_of_any_size(value):
    schedule = Schedule(start=value, end=value, samples=100, shape="exponential")
    assert schedule.at(50) == pytest.approx(value, rel=1e-12)
    rising = Schedule(start=1e-300, end=1e30, samples=100, shape="exponential")
    assert rising.at(50) == pytest.approx(1e-135, rel=1e-9)


def test_zero_samples_give_a_step_function():
    schedule = Schedule(start=0.0, end=5.0, samples=0, delay=100)
    assert [schedule.at(seen) for seen in (0, 99, 100, 101)] == [0.0, 0.0, 5.0, 5.0]


def test_warmup_rises_linearly_from_zero():
    schedule = Schedule(start=2.0, end=2.0, samples=0, warmup=100)
    assert [schedule.at(seen) for seen in (0, 49, 99, 100, 200)] == [0.02, 1.0, 2.0, 2.0, 2.0]
    assert not schedule.is_constant


# R3GAN for FFHQ-64, cosine over 20 M images: base + (1 − ½(1 + cos(π n / N))) (final − base).
PUBLISHED = {
    "optim.generator.learning_rate": (2e-4, 5e-5),
    "optim.discriminator.learning_rate": (2e-4, 5e-5),
    "optim.generator.betas.1": (0.9, 0.99),
    "optim.discriminator.betas.1": (0.9, 0.99),
    "game.penalties.r1.strength": (2.0, 0.2),
    "game.penalties.r2.strength": (2.0, 0.2),
    "game.ema_half_life_samples": (0.0, 500_000.0),
}


@pytest.mark.parametrize("seen", [0, 1_000_000, 5_000_000, 10_000_000, 19_999_744, 50_000_000])
def test_r3gan_follows_the_published_schedules(seen):
    schedules = load_config("r3gan-64").schedules()
    left = 0.5 * (1 + math.cos(math.pi * seen / 2e7)) if seen <= 2e7 else 0.0
    for key, (base, final) in PUBLISHED.items():
        assert schedules[key].at(seen) == pytest.approx(base + (1 - left) * (final - base)), key


def test_plain_number_and_its_schedule_are_one_configuration():
    plain = load_config("digits", ["optim.generator.learning_rate=0.5"])
    table = load_config("digits", ["optim.generator.learning_rate={start=0.5}"])
    assert plain == table
    assert plain.optim.generator.learning_rate.is_constant
    assert plain.model_dump(mode="json")["optim"]["generator"]["learning_rate"] == 0.5


@pytest.mark.parametrize("preset", ["digits", "r3gan-64", "stylegan2-256"])
def test_a_saved_configuration_reads_back_equal(preset):
    config = load_config(preset)
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("-1.0", ""),
        ("0", ""),
        ("nan", ""),
        ("fast", ""),
        ("[1.0]", ""),
        ("true", ""),
        ("{start=1.0, end=-1.0, samples=5}", ""),
        ("{start=0.0, end=1.0, samples=5, shape='exponential'}", ""),
        ("1" + "0" * 400, ""),
        ("1e39", ""),  # single precision, in which a device reads it, has no such number
        ("{start=1.0, end=1e39, samples=5}", ".end"),
        ("{end=1.0, samples=5}", ".start"),
        ("{start=1.0, end=2.0}", ".samples"),
        ("{start=1.0, samples=2}", ".end"),
        ("{start=1.0, end=2.0, samples=-5}", ".samples"),
        ("{start=1.0, end=2.0, samples=5, shape='square'}", ".shape"),
        ("{start=1.0, ende=2.0, samples=5}", ".ende"),
    ],
)
def test_invalid_schedules_are_rejected_with_their_key(value, key):
    with refused(ConfigError, f"optim.generator.learning_rate{key}"):
        load_config("digits", [f"optim.generator.learning_rate={value}"])


def test_decay_rates_stay_below_one():
    with refused(ConfigError, "optim.generator.betas.1"):
        load_config("digits", ["optim.generator.betas=[0.0, {start=0.9, end=1.0, samples=5}]"])


def test_a_changed_schedule_is_reported_as_a_whole():
    key = "game.penalties.r1.strength"
    plain = load_config("digits", [f"{key}=1.0"])
    table = load_config("digits", [f"{key}={{start=1.0, end=2.0, samples=5}}"])
    other = load_config("digits", [f"{key}={{start=1.0, end=2.0, samples=6}}"])
    for old, new in ((table, plain), (plain, table)):
        with refused(ConfigError, key) as caught:
            require_unchanged(old, new, "run")
        assert "None" not in str(caught.value)
    with refused(ConfigError, f"{key}.samples"):
        require_unchanged(table, other, "run")


def test_schedule_is_immutable():
    with pytest.raises(ValidationError):
        Schedule.constant(1.0).start = 2.0
