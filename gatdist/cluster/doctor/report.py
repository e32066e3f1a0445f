"""Findings of the doctor, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_SOFTWARE = ("Python", "torch", "Ray", "gatdist")
_MARKS = {True: "ok", False: "BAD", None: "--"}


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    value: str
    ok: bool | None  # None where it depends on what is trained
    hint: str = ""


class HostReport(NamedTuple):
    """The findings on one host, in the order to be shown."""

    name: str
    address: str
    findings: list[Finding]


class Exchange(NamedTuple):
    """An all-reduce of one message size between all hosts; the time is a median."""

    bytes: int
    seconds: float
    bandwidth_bytes_per_s: float  # of each link; in a ring of p hosts 2 (p − 1) / p · bytes / s


class Report(NamedTuple):
    """The findings about this machine or a cluster as a whole, its hosts and its network."""

    findings: list[Finding]
    hosts: Sequence[HostReport] = ()
    network: Sequence[Exchange] = ()  # the smallest message first

    @property
    def all_findings(self) -> list[tuple[str, Finding]]:
        """All findings, each with the name of its host or ""."""
        own = [("", finding) for finding in self.findings]
        return [(host.name, finding) for host in self.hosts for finding in host.findings] + own

    @property
    def bad(self) -> list[str]:
        """Names of failed checks, with their hosts."""
        return [f"{host} {f.name}".strip() for host, f in self.all_findings if f.ok is False]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values that ``--json`` prints."""
        hosts = [
            host._asdict() | {"findings": [finding._asdict() for finding in host.findings]}
            for host in self.hosts
        ]
        return {
            "ok": not self.bad,
            "hosts": hosts,
            "findings": [finding._asdict() for finding in self.findings],
            "network": [exchange._asdict() for exchange in self.network],
        }


def described(report: Report) -> str:
    """Return the report as text: host by host, then what concerns all."""
    width = max(len(finding.name) for _, finding in report.all_findings)
    blocks = [
        _block(f"{host.name} ({host.address})", _folded(host.findings), width)
        for host in report.hosts
    ]
    blocks.append(_block("all hosts" if report.hosts else "", report.findings, width))
    if report.network:
        rows = (
            f"      {size(one.bytes):>9} {duration(one.seconds):>9} "
            f"{rate(one.bandwidth_bytes_per_s):>11}"
            for one in report.network
        )
        head = f"      {'message':>9} {'time':>9} {'bandwidth':>11}"
        blocks.append("\n".join(["all-reduce between hosts", head, *rows]))
    return "\n\n".join(blocks)


def _folded(findings: Sequence[Finding]) -> list[Finding]:
    """Put software that is fine into one line."""
    well = [f for f in findings if f.name in _SOFTWARE and f.ok]
    message = ", ".join(f"{f.name} {f.value}" for f in well)
    folded = [Finding("software", message, True)] if well else []
    return folded + [f for f in findings if f not in well]


def _block(title: str, findings: Sequence[Finding], width: int) -> str:
    lines = [title] if title else []
    for finding in findings:
        lines.append(f"{_MARKS[finding.ok]:>4}  {finding.name:<{width}}  {finding.value}")
        if finding.hint:
            lines.append(f"{'':6}{'':{width}}  → {finding.hint}")
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Return bytes in units of 1,000, with three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def rate(bytes_per_s: float) -> str:
    """Return bytes per second in MB/s."""
    in_mb = bytes_per_s / 1e6
    return f"{in_mb:,.0f} MB/s" if in_mb >= 10 else f"{in_mb:.2g} MB/s"


def duration(seconds: float) -> str:
    """Return a time with three digits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
