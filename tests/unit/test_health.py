"""Health policies: numbers in, decisions out."""

import pytest

from gatdist.config import ConvergenceConfig, HealthConfig
from gatdist.training.health import Convergence, Counts, alarms, decide

WELL = {
    "gradient_norm/generator": 0.5,
    "gradient_norm/discriminator": 2.0,
    "diversity/ratio": 0.9,
    "logits/pairwise_accuracy": 0.7,
}
WON = {"logits/pairwise_accuracy": 0.999}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        ({"gradient_norm/generator": 1e-9}, {"vanishing_gradient_generator"}),
        ({"gradient_norm/discriminator": 1e9}, {"exploding_gradient_discriminator"}),
        ({"diversity/ratio": 0.01}, {"collapse"}),
        (WON, {"discriminator_won"}),
        (WON | {"loss/generator": 5.0, "loss/terms": 4.0}, set()),
        (WON | {"loss/generator": 5.0, "loss/terms": 2.0}, {"discriminator_won"}),
        (WON | {"loss/generator": -5.0, "loss/terms": 2.0}, set()),
        (WON | {"loss/generator": -5.0, "loss/terms": 0.0}, {"discriminator_won"}),
    ],
)
def test_each_problem_raises_its_alarm(change, expected):
    raised = alarms(HealthConfig(), WELL | change)
    assert {alarm.name for alarm in raised} == expected


NONE = Counts(0, 0, 0)


@pytest.mark.parametrize(
    ("policy", "counts", "new", "action", "message"),
    [
        ({"nonfinite": "skip", "nonfinite_budget": 3}, (3, 0, 0), (3, 0, 0), "go_on", ""),
        ({"nonfinite": "skip", "nonfinite_budget": 3}, (4, 0, 0), (1, 0, 0), "stop", "4 steps"),
        ({"nonfinite": "stop"}, (0, 0, 0), (0, 0, 0), "go_on", ""),
        ({"nonfinite": "stop"}, (1, 0, 0), (1, 0, 0), "stop", "health.nonfinite = 'stop'"),
        ({"nonfinite": "rollback"}, (1, 0, 0), (1, 0, 0), "rollback", "1 step "),
        ({"nonfinite": "rollback"}, (1, 0, 0), (0, 0, 0), "go_on", ""),
        ({"nonfinite": "rollback"}, (1, 0, 5), (1, 0, 0), "stop", "5 rollbacks"),
        ({"spike": "off"}, (0, 999, 0), (0, 999, 0), "go_on", ""),
        ({"spike": "skip", "spike_budget": 9}, (0, 9, 0), (0, 9, 0), "go_on", ""),
        ({"spike": "skip", "spike_budget": 9}, (0, 10, 0), (0, 1, 0), "stop", "20 ×"),
        ({"spike": "rollback"}, (0, 2, 0), (0, 2, 0), "rollback", "2 steps "),
        ({"spike": "stop"}, (0, 1, 0), (0, 1, 0), "stop", "health.spike = 'stop'"),
        ({"spike": "rollback"}, (21, 2, 0), (21, 2, 0), "stop", "health.nonfinite"),
    ],
)
def test_nonfinite_steps_are_skipped_rolled_back_or_end_the_run(
    policy, counts, new, action, message
):
    decision = decide(HealthConfig(**policy), Counts(*counts), Counts(*new))
    assert decision.action == action
    assert message in decision.message
    skipped = any(new) and "off" not in policy.values()
    assert bool(decision.message) == (action != "go_on" or skipped)


def test_counts_are_subtracted():
    assert Counts(5, 4, 3).since(Counts(1, 1, 1)) == Counts(4, 3, 2)
    assert NONE.since(NONE) == NONE


def test_convergence_requires_patience_and_names_the_rule():
    convergence = Convergence(
        ConvergenceConfig(metric="fid", patience_samples=300, min_improvement=0.1)
    )
    assert convergence.update(100, {"fid": 10.0}) is None
    assert convergence.update(200, {"fid": 9.5}) is None  # better, but by less than a tenth
    assert convergence.update(300, {"kid": 0.0}) is None  # another metric
    reason = convergence.update(400, {"fid": 9.5})
    for fact in ("fid", " 10 ", "300 samples"):
        assert fact in reason


def test_patience_restarts_with_each_improvement_and_survives_a_checkpoint():
    convergence = Convergence(ConvergenceConfig(metric="fid", patience_samples=200))
    convergence.update(100, {"fid": 10.0})
    convergence.update(200, {"fid": 5.0})
    restored = Convergence(convergence.config)
    restored.load(convergence.state())
    assert restored.update(300, {"fid": 7.0}) is None
    assert restored.update(400, {"fid": 7.0}) is not None


def test_without_a_rule_nothing_converges():
    assert Convergence(None).update(10**9, {"fid": 1.0}) is None
