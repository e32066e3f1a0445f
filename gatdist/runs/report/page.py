"""The page of a run: samples, curves, problems, attempts, files and configuration."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from gatdist.common.errors import ConfigError
from gatdist.common.version import __version__
from gatdist.config import flatten, parse_config, redact_url
from gatdist.monitor.numbers import count, duration, number, size
from gatdist.monitor.tags import ALARMS, Chart, charts_of
from gatdist.runs.changes import HEAD
from gatdist.runs.report.curves import Curve, chart, color_of, legend, thinned
from gatdist.runs.report.findings import Findings, events, find
from gatdist.runs.report.previews import previews
from gatdist.storage import Store

_STACKED = "Seconds a step by phase"
_MAX_ROWS = 100
_REAL_SPLIT = (
    "<p>fid_real_split is the FID between two halves of the real samples, fid_over_real_split the "
    "ratio of fid to it. The ratio can be below 1: the bias of the FID falls with the number of "
    "samples, and the halves are smaller than the sets that fid compares.</p>"
)


def report(url: str, storage_options: dict[str, Any] | None = None) -> tuple[str, list[str]]:
    """Return a run's self-contained HTML page, and messages of what is missing or damaged.

    The run may be in progress, damaged or almost empty.
    """
    store = Store(url, storage_options or {})
    found = find(store)
    shown = previews(store.child("samples"), found.samples, found.lacks)
    sections = [
        ("Samples", _samples(shown)),
        *_charts(found),
        ("Health", _health(found)),
        ("Attempts", _attempts(found)),
        ("Files", _files(found)),
        ("Environment", _environment(found)),
        ("Configuration", _configuration(found)),
    ]
    merged: dict[str, str] = {}
    for title, html in sections:
        merged[title] = html + merged.get(title, "")
    found.lacks = [redact_url(lack) for lack in found.lacks]
    return _page(found, {title: html for title, html in merged.items() if html}), found.lacks


def _page(found: Findings, sections: dict[str, str]) -> str:
    own = files("gatdist.runs.report")
    style, script = (own / "page.css").read_text(), (own / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    url = redact_url(found.url)
    name = escape(url.rstrip("/").rsplit("/", 1)[-1])
    anchors = {title: re.sub(r"\W+", "-", title.lower()) for title in sections}
    links = "".join(f'<a href="#{anchors[title]}">{title}</a>' for title in sections)
    body = "".join(
        f'<section id="{anchors[title]}"><h2>{title}</h2>{html}</section>'
        for title, html in sections.items()
    )
    lacks = "".join(f"<li>{escape(lack)}</li>" for lack in found.lacks)
    notice = f'<div class="lacks"><b>Missing or damaged</b><ul>{lacks}</ul></div>' if lacks else ""
    return Template((own / "page.html").read_text()).substitute(
        name=name,
        url=escape(url),
        style=style,
        script=script,
        digest=digest,
        summary=_summary(found),
        links=links,
        body=notice + body,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _summary(found: Findings) -> str:
    seen, total = found.samples_seen, found.total_samples
    share = min(seen / total, 1.0) if total else 0.0
    last = found.logs[-1] if found.logs else {}
    state_s = found.state.get("wall_time_s")
    spent_s = last.get("wall_time_s", state_s)
    facts = {
        "samples seen": f"{count(seen)} of {count(total)}" if total else count(seen),
        "time spent": duration(spent_s) if isinstance(spent_s, int | float) else "",
        "samples per second": number(last.get("throughput/samples_per_s")) if last else "",
        "workers": _text(last.get("world_size")),
        "attempts": count(len(found.attempts)),
    }
    # In the order of evaluate.metrics.
    for tag in dict.fromkeys(t for log in found.logs for t in log if t.startswith("metric/")):
        if not tag.endswith("_real_split") and len(facts) < 8:
            values = [log[tag] for log in found.logs if isinstance(log.get(tag), int | float)]
            facts[tag.removeprefix("metric/")] = number(values[-1]) if values else ""
    rows = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>"
        for key, value in facts.items()
        if value
    )
    kind = found.status.replace(" ", "-")
    reason = found.state.get("reason")
    message = f" <span>{escape(str(reason))}</span>" if reason else ""
    return (
        f'<p class="status"><b class="{kind}">{found.status}</b>{message}</p>'
        f'<progress max="1" value="{share:.4f}">{share:.0%}</progress><dl>{rows}</dl>'
    )


def _samples(shown: Sequence[tuple[int | None, str]]) -> str:
    if not shown:
        return ""
    reals = fakes = ""
    for seen, html in shown:
        if seen is None:
            reals += f"<figure><figcaption>real</figcaption>{html}</figure>"
        else:
            title = f"generated, at {count(seen)} samples"
            fakes += f"<figure><figcaption>{title}</figcaption>{html}</figure>"
    return f'<div class="samples"><div class="frames">{fakes}</div><div>{reals}</div></div>'


def _charts(found: Findings) -> Iterable[tuple[str, str]]:
    """Yield titles of chart groups and their HTML."""
    tags = list(dict.fromkeys(tag for log in found.logs for tag in log if "/" in tag))
    resumed = [one.get("resumed_from") for one in found.attempts]
    marks = [seen for seen in resumed if isinstance(seen, int) and seen > 0]
    for title, charts in charts_of(tags).items():
        shown, constants = "", dict[str, str]()
        for one in charts:
            values = {tag: _constant(found.logs, tag) for tag in one.tags(tags)}
            if all(values.values()):
                constants |= values
            else:
                shown += _chart(found.logs, one, list(values), marks)
        html = _shares(found.logs) if title == "Time" else ""
        html += f'<div class="charts">{shown}</div>' if shown else ""
        if text := ", ".join(f"{tag} {value}" for tag, value in constants.items()):
            html += f'<p class="still">Constant: {escape(text)}</p>'
        if "metric/fid_real_split" in tags and title == "Metrics":
            html += _REAL_SPLIT
        yield title, html


def _constant(logs: list[dict[str, Any]], tag: str) -> str:
    """Return the value of a tag in all logs that have it; "" if it changes."""
    values = {log[tag] for log in logs if isinstance(log.get(tag), int | float)}
    return number(values.pop()) if len(values) == 1 and not re.fullmatch(ALARMS, tag) else ""


def _chart(logs: list[dict[str, Any]], one: Chart, tags: list[str], marks: list[int]) -> str:
    absent = 0.0 if one.pattern == ALARMS else None  # alarms are logged only while raised
    used = logs if absent is not None else [log for log in logs if any(t in log for t in tags)]
    seen, curves = [log["samples_seen"] for log in used], []
    x = np.zeros(0)
    for index, tag in enumerate(sorted(tags)):
        x, mean, low, high = thinned(seen, [log.get(tag, absent) for log in used])
        group, _, label = tag.partition("/")
        if group == "time":
            label = label.removesuffix("_s")
        elif group != "schedule":  # whose names are keys
            label = label.replace("_", " ")
        curves.append(Curve(label, color_of(label, index), mean, low, high))
    if not any(np.isfinite(curve.mean).any() for curve in curves):
        return ""
    return chart(one.title, x, curves, marks, stacked=one.title == _STACKED)


def _shares(logs: list[dict[str, Any]]) -> str:
    """Return the phases' shares of the step time over the whole run, as one bar."""
    phases = charts_of(["time/data_s"])["Time"][0]
    known = [t for t in logs if isinstance(t.get("time/step_s"), int | float)]
    total = sum(t["time/step_s"] for t in known)
    if not total:
        return ""
    shares: list[tuple[str, str, float]] = []  # CSS class, phase, share
    for index, tag in enumerate(sorted({tag for t in known for tag in phases.tags(t)})):
        spent = sum(t[tag] for t in known if isinstance(t.get(tag), int | float))
        label = tag.removeprefix("time/").removesuffix("_s")
        shares.append((color_of(label, index), label, spent / total))
    shares.append(("rest", "other", max(0.0, 1.0 - sum(share for *_, share in shares))))
    cells = "".join(f'<i class="{c}" style="width:{share:.2%}"></i>' for c, _, share in shares)
    shown = legend((c, label, f"{share:.1%}") for c, label, share in shares)
    return f'<div class="shares"><div>{cells}</div>{shown}</div>'


def _health(found: Findings) -> str:
    if not found.logs:
        return ""
    rows = [
        [one.what, count(one.first), "" if one.logs == 1 else count(one.last), count(one.logs)]
        for one in events(found.logs)
    ]
    if not rows:
        return "<p>No alarms, skipped steps or bad samples.</p>"
    return _table(["event", "at samples", "until", "log intervals"], rows)


def _attempts(found: Findings) -> str:
    rows = []
    for one in found.attempts[-_MAX_ROWS:]:
        hosts = one.get("hosts")
        named = ", ".join(sorted(set(map(str, hosts)))) if isinstance(hosts, list) else ""
        resumed = "start" if one.get("resumed_from") is None else _text(one["resumed_from"])
        attempt, at, workers = (_text(one.get(key)) for key in ("attempt", "time", "world_size"))
        rows.append([attempt, at, workers, named, resumed, _text(one.get("reason"))])
    titles = ["attempt", "time", "workers", "hosts", "resumed from", "reason"]
    html = _table(titles, rows) if rows else ""
    changes = [one.cells() for one in found.changes[-_MAX_ROWS:]]
    return html + (_table(["changes of workers", *HEAD[1:]], changes) if changes else "")


def _files(found: Findings) -> str:
    rows = [
        [one["name"], count(one["samples_seen"]), size(one["num_bytes"])]
        for one in found.checkpoints[-_MAX_ROWS:]
    ]
    html = _table(["checkpoint", "samples", "size"], rows) if rows else ""
    names = "".join(f"<li><code>{escape(name)}</code></li>" for name in found.files[:_MAX_ROWS])
    return html + (f"<ul>{names}</ul>" if names else "")


def _environment(found: Findings) -> str:
    if not found.attempts:
        return ""
    last = found.attempts[-1]
    versions = last.get("versions")
    facts = dict(versions) if isinstance(versions, dict) else {}
    facts |= {key: last[key] for key in ("platform", "cpus", "device") if key in last}
    return _table(["", ""], [[key, _text(value)] for key, value in facts.items()])


def _configuration(found: Findings) -> str:
    if not found.config:
        return ""
    flat = flatten(found.config)
    try:
        run, data = ({"total_samples": 2**40}, {"url": ""})
        usual = flatten(parse_config({"run": run, "data": data}).redacted())
        parse_config(found.config)
    except ConfigError as error:
        found.lacks.append(f"config.json is not valid for this version: {error}")
        usual = {}
    changed = [[key, json.dumps(v)] for key, v in flat.items() if usual.get(key, usual) != v]
    everything = [[key, json.dumps(value)] for key, value in flat.items()]
    return (
        _table(["changed", "value"], changed)
        + f"<details><summary>all {len(everything)} keys</summary>"
        + f"{_table(['key', 'value'], everything)}</details>"
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(redact_url(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return count(value)
    return "" if value is None else str(value)
