"""What the facts about a cluster's hosts mean. Pure functions: they look at nothing themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from gatdist.cluster.doctor.report import Finding, duration, rate
from gatdist.cluster.preflight import MAX_CLOCK_S, HostInfo, faults

# Lines of several hosts' logs can't be put in order beyond it.
_NOTED_CLOCK_S = 1.0
# Of what the other hosts send: below, a host's link holds all of them up.
_SLOW = 1 / 3
# What a commit of a large run to slow storage may take; and Ray's default.
_STOP_S, _DEFAULT_STOP_S = 60, 3
_PORTS = "Open all TCP ports between them (firewall, security group, routes)"


def clock(ahead_s: float, round_trip_s: float) -> Finding:
    """The verdict on a clock that is so far ahead of the driver's, give or take half the way."""
    way = "ahead of" if ahead_s > 0 else "behind"
    message = f"{duration(abs(ahead_s))} {way} the driver's, ± {duration(round_trip_s / 2)}"
    ok = False if abs(ahead_s) > MAX_CLOCK_S else None if abs(ahead_s) > _NOTED_CLOCK_S else True
    return Finding("clock", message, ok, "" if ok else "Set the clock there (chrony or NTP)")


def job_stop(wait_s: str | None) -> Finding:
    """The verdict on how long `ray job stop` waits before it kills a run.

    Args:
        wait_s: the head's RAY_JOB_STOP_WAIT_TIME_S; None where it is not set.
    """
    value = wait_s if wait_s and wait_s.strip().isdecimal() else ""
    ok = True if value and int(value) >= _STOP_S else None
    message = f"ray job stop waits {value or _DEFAULT_STOP_S} s for the last checkpoint"
    hint = f"Start the head with RAY_JOB_STOP_WAIT_TIME_S={2 * _STOP_S}"
    return Finding("job stop", message, ok, "" if ok else hint)


def round_trip(sent_s: float, there_s: float, back_s: float) -> tuple[float, float]:
    """How long a question was under way, and how far ahead the answer's clock is.

    The answer is taken to have been given halfway.

    Args:
        sent_s: when it was asked, by the clock here.
        there_s: the answer, by the clock there.
        back_s: when it came, by the clock here.
    """
    return back_s - sent_s, there_s - (sent_s + back_s) / 2


def versions(found: Sequence[HostInfo]) -> tuple[dict[str, Finding], Finding]:
    """By address, those hosts whose versions differ from most others'; and the verdict on all."""
    odd: dict[str, list[str]] = {}
    for host, about, rule, _ in faults(found, 0.0):
        if about == "versions":
            odd.setdefault(host.address, []).append(rule)
    hint = "Install the same on all hosts"
    own = {
        address: Finding("versions", "; ".join(rules), False, hint)
        for address, rules in odd.items()
    }
    alike = next((one for one in found if one.address not in odd), None)
    message = (
        ", ".join(f"{name} {version}" for name, version in alike.versions.items()) if alike else ""
    )
    names = [one.host for one in found if one.address in odd]
    value = f"{', '.join(names)} differ from {message}" if odd else f"alike: {message}"
    return own, Finding("versions", value, None if odd else True)


def devices(with_gpu: Collection[str], without: Collection[str]) -> Finding | None:
    """Whether hosts that train all have GPUs, or none; names of both. None where they are alike."""
    if not with_gpu or not without:
        return None
    value = f"GPUs on {', '.join(with_gpu)}; none on {', '.join(without)}"
    return Finding("devices", value, None, "Workers that use GPUs start on some hosts only")


def reach(names: Mapping[str, str], failed: Mapping[tuple[str, str], str]) -> list[Finding]:
    """The verdict on connections between hosts.

    Args:
        names: of the hosts, by address.
        failed: by addresses from and to, why there was no connection.

    Returns:
        Good news in one finding; else one for each host that has no connection to any other, and
        for each pair that has none.
    """
    if not failed:
        message = f"{_listed(list(names.values()))} reach one another"
        return [Finding("connections", message, True)]
    pairs = {tuple(sorted(pair)) for pair in failed}
    alone = [
        one
        for one in names
        if len(names) > 2 and all(tuple(sorted((one, o))) in pairs for o in names if o != one)
    ]
    found = [
        Finding(
            "connections",
            f"{names[one]} ({one}) has a connection to no other host "
            f"({next(why for pair, why in failed.items() if one in pair)})",
            False,
            _PORTS,
        )
        for one in alone
    ]
    for first, second in sorted(pairs):
        if first in alone or second in alone:
            continue
        a, b = f"{names[first]} ({first})", f"{names[second]} ({second})"
        there, back = failed.get((first, second)), failed.get((second, first))
        if there and back:
            message = f"{a} and {b} can't reach each other ({there})"
        else:
            message = f"{a} can't reach {b} ({there})" if there else f"{b} can't reach {a} ({back})"
        found.append(Finding("connections", message, False, _PORTS))
    return found


def sending(names: Mapping[str, str], rates: Mapping[str, tuple[str, float]]) -> dict[str, Finding]:
    """The verdict on each host's link, by address.

    Args:
        names: of the hosts, by address.
        rates: by the sender's address, the receiver's, and bytes per second that arrived.
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


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
