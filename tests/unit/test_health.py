"""Policies: numbers in, decisions out."""

import pytest

from gatdist.config import ConvergenceConfig, HealthConfig
from gatdist.training.health import Convergence, alarms, nonfinite_verdict

WELL = {
    "gradient_norm/generator": 0.5,
    "gradient_norm/discriminator": 2.0,
    "diversity/ratio": 0.9,
    "logits/pairs_ranked_rightly": 0.7,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        ({"gradient_norm/generator": 1e-9}, {"vanishing_gradient_generator"}),
        ({"gradient_norm/discriminator": 1e9}, {"exploding_gradient_discriminator"}),
        ({"diversity/ratio": 0.01}, {"collapse"}),
        ({"logits/pairs_ranked_rightly": 0.999}, {"discriminator_won"}),
    ],
)
def test_each_trouble_raises_its_alarm_and_says_what_to_try(change, expected):
    raised = alarms(HealthConfig(), WELL | change)
    assert {alarm.name for alarm in raised} == expected
    assert all("try" in alarm.message for alarm in raised)


def test_skip_allows_its_budget_and_stop_allows_none():
    assert nonfinite_verdict(HealthConfig(nonfinite="skip", nonfinite_budget=3), 3) is None
    assert "4 steps" in nonfinite_verdict(HealthConfig(nonfinite="skip", nonfinite_budget=3), 4)
    assert nonfinite_verdict(HealthConfig(nonfinite="stop"), 0) is None
    assert "'stop' allows 0" in nonfinite_verdict(HealthConfig(nonfinite="stop"), 1)


def test_convergence_waits_for_its_patience_and_names_the_rule():
    convergence = Convergence(
        ConvergenceConfig(metric="fid", patience_samples=300, min_improvement=0.1)
    )
    assert convergence.update(100, {"fid": 10.0}) is None
    assert convergence.update(200, {"fid": 9.5}) is None  # better, but by less than a tenth
    assert convergence.update(300, {"kid": 0.0}) is None  # another metric
    reason = convergence.update(400, {"fid": 9.5})
    assert "fid has not improved on 10 for 300 samples" in reason


def test_convergence_starts_anew_with_each_improvement_and_survives_a_checkpoint():
    convergence = Convergence(ConvergenceConfig(metric="fid", patience_samples=200))
    convergence.update(100, {"fid": 10.0})
    convergence.update(200, {"fid": 5.0})
    restored = Convergence(convergence.config)
    restored.load(convergence.state())
    assert restored.update(300, {"fid": 7.0}) is None
    assert restored.update(400, {"fid": 7.0}) is not None


def test_without_a_rule_nothing_converges():
    assert Convergence(None).update(10**9, {"fid": 1.0}) is None
