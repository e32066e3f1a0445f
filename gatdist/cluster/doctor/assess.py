"""Findings about a cluster's hosts, derived from measurements. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from gatdist.cluster.doctor.report import Finding, duration, rate
from gatdist.cluster.preflight import MAX_CLOCK_S, HostInfo, faults

# Beyond this, log lines of several hosts can't be put in order.
_NOTED_CLOCK_S = 1.0
# A link below this share of the other hosts' rate slows down all of them.
_SLOW = 1 / 3
# What a commit of a large run to slow storage may take; and Ray's default.
_STOP_S, _DEFAULT_STOP_S = 60, 3
_PORTS = "Open all TCP ports between them (firewall, security group, routes)"


def clock(ahead_s: float, round_trip_s: float) -> Finding:
    """Assess a clock that is ``ahead_s`` ahead of the driver's, ± half the round trip."""
    way = "ahead of" if ahead_s > 0 else "behind"
    message = f"{duration(abs(ahead_s))} {way} the driver's, ± {duration(round_trip_s / 2)}"
    ok = False if abs(ahead_s) > MAX_CLOCK_S else None if abs(ahead_s) > _NOTED_CLOCK_S else True
    return Finding("clock", message, ok, "" if ok else "Set the clock there (chrony or NTP)")


def job_stop(wait_s: str | None) -> Finding:
    """Assess the head's RAY_JOB_STOP_WAIT_TIME_S, after which ``ray job stop`` kills a run."""
    value = wait_s if wait_s and wait_s.strip().isdecimal() else ""
    ok = True if value and int(value) >= _STOP_S else None
    message = f"ray job stop waits {value or _DEFAULT_STOP_S} s for the last checkpoint"
    hint = f"Start the head with RAY_JOB_STOP_WAIT_TIME_S={2 * _STOP_S}"
    return Finding("job stop", message, ok, "" if ok else hint)


def round_trip(sent_s: float, there_s: float, back_s: float) -> tuple[float, float]:
    """Return the round-trip time of a question, and how far ahead the other clock is.

    The other clock is assumed to be read halfway.
    """
    return back_s - sent_s, there_s - (sent_s + back_s) / 2


def versions(found: Sequence[HostInfo]) -> tuple[dict[str, Finding], Finding]:
    """Return a finding per address whose versions differ from the most common, and one on all."""
    odd: dict[str, list[str]] = {}
    for host, about, rule, _ in faults(found, 0.0):
        if about == "versions":
            odd.setdefault(host.address, []).append(rule)
    own = {
        address: Finding("versions", "; ".join(rules), False, "Install the same on all hosts")
        for address, rules in odd.items()
    }
    usual = next((one.versions for one in found if one.address not in odd), {})
    message = ", ".join(f"{name} {version}" for name, version in usual.items())
    names = ", ".join(one.host for one in found if one.address in odd)
    value = f"{names} differ from {message}" if odd else f"the same on all: {message}"
    return own, Finding("versions", value, None if odd else True)


def devices(with_gpu: Collection[str], without: Collection[str]) -> Finding | None:
    """Return a finding if some hosts have GPUs and others none."""
    if not with_gpu or not without:
        return None
    value = f"GPUs on {', '.join(with_gpu)}; none on {', '.join(without)}"
    return Finding("devices", value, None, "Workers that use GPUs start on some hosts only")


def reach(names: Mapping[str, str], failed: Mapping[tuple[str, str], str]) -> list[Finding]:
    """Assess the connections between hosts, given their names by address and failures by pair.

    Returns one finding if none failed; else one for each host that reaches no other, and one for
    each other pair without a connection.
    """
    if not failed:
        *most, last = names.values()
        message = " and ".join(filter(None, [", ".join(most), last]))
        return [Finding("connections", f"{message} reach one another", True)]
    pairs = {tuple(sorted(pair)) for pair in failed}
    alone = [
        one
        for one in names
        if len(names) > 2 and all(tuple(sorted((one, o))) in pairs for o in names if o != one)
    ]
    messages = []
    for one in alone:
        why = next(why for pair, why in failed.items() if one in pair)
        messages.append(f"{names[one]} ({one}) has a connection to no other host ({why})")
    for first, second in sorted(pairs):
        if first in alone or second in alone:
            continue
        a, b = f"{names[first]} ({first})", f"{names[second]} ({second})"
        there, back = failed.get((first, second)), failed.get((second, first))
        if there and back:
            messages.append(f"{a} and {b} can't reach each other ({there})")
        else:
            messages.append(
                f"{a} can't reach {b} ({there})" if there else f"{b} can't reach {a} ({back})"
            )
    return [Finding("connections", message, False, _PORTS) for message in messages]


def sending(names: Mapping[str, str], rates: Mapping[str, tuple[str, float]]) -> dict[str, Finding]:
    """Assess each host's link; returns findings by address.

    ``rates`` has the receiver's address and bytes per second that arrived, by the sender's.
    """
    found = {}
    for address, (to, bytes_per_s) in rates.items():
        usual = median([other for each, (_, other) in rates.items() if each != address] or [0.0])
        message = f"{rate(bytes_per_s)} to {names[to]}, by one connection"
        if bytes_per_s < _SLOW * usual:
            message += f"; the others send {rate(usual)}"
            hint = f"Look at the link from {names[address]} to {names[to]}: it slows down all"
            found[address] = Finding("sends", message, None, hint)
        else:
            found[address] = Finding("sends", message, True)
    return found
