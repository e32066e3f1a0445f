"""In the one-stage step, D's gradients are reduced while G's are computed."""

from benchmarks.cases.overlap import events_of
from support import spawn


def when(events, player, kind):
    return sorted(e.start_s for e in events if (e.player, e.kind) == (player, kind))


def one_stage(comm):
    return events_of(comm, "one_stage")


def alternating(comm):
    return events_of(comm, "alternating")


def test_one_stage_sends_all_of_ds_buckets_before_the_first_gradient_of_g_is_ready():
    for events in spawn(2, one_stage):
        buckets = when(events, "discriminator", "bucket")
        assert len(buckets) > 1
        assert buckets[-1] < when(events, "generator", "ready")[0]
        # The first is sent during D's own backward pass.
        assert buckets[0] < when(events, "discriminator", "ready")[-1]


def test_alternating_reduces_ds_gradients_before_gs_phase():
    for events in spawn(2, alternating):
        arrived = max(e.end_s for e in events if (e.player, e.kind) == ("discriminator", "bucket"))
        assert arrived < when(events, "generator", "ready")[0]
