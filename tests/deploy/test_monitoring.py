"""Alarms and dashboard: Prometheus accepts them, and the metrics that they query exist."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import gatdist
from gatdist.cluster.metrics import ABOUT, ABOUT_COUNTERS, metric_name
from gatdist.config import HealthConfig, parse_config
from gatdist.training.health import alarms
from support import need

MONITORING = Path(__file__).resolve().parents[2] / "deploy/monitoring"
RULES = yaml.safe_load((MONITORING / "rules.yml").read_text())
BOARD = json.loads((MONITORING / "grafana/gatdist.json").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
NETWORK = {"name": "mlp", "width": 8, "depth": 2}
EVERYTHING_WRONG = (
    {"gradient_norm/generator": 0.0, "gradient_norm/discriminator": 0.0},
    {"gradient_norm/generator": 1e30, "gradient_norm/discriminator": 1e30},
    {"diversity/ratio": 0.0, "logits/pairwise_accuracy": 1.0},
)


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    (program,) = need("promtool")
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def expressions() -> Iterator[str]:
    """Return all queries of the dashboard."""
    for panel in BOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (annotation["expr"] for annotation in BOARD["annotations"]["list"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return names of the metrics that a run exports, as Prometheus scrapes them."""
    run_dir = tmp_path_factory.mktemp("run")
    config = parse_config(
        {
            "run": {"total_samples": 64, "global_batch": 16, "log_every_samples": 32},
            "data": {"url": "builtin:ring"},
            "model": {"latent_size": 4, "generator": NETWORK, "discriminator": NETWORK},
            "game": {"penalties": {"r1": {"strength": 0.1}}},
            "evaluate": {"metrics": ["fid"], "num_samples": 64},
            "monitor": {"tensorboard": False},
        }
    )
    gatdist.train(config, str(run_dir), local=True)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tags = {tag for line in lines for tag, value in line.items() if isinstance(value, int | float)}
    raised = (alarm for wrong in EVERYTHING_WRONG for alarm in alarms(HealthConfig(), wrong))
    tags |= {f"health/{alarm.name}" for alarm in raised}
    names = {metric_name(tag) for tag in (*tags, "total_samples")} | set(ABOUT)
    return {f"ray_{name}" for name in names | {f"{name}_total" for name in ABOUT_COUNTERS}}


def test_prometheus_accepts_configuration_and_rules() -> None:
    checked = promtool("check", "config", MONITORING / "prometheus.yml")
    assert checked.returncode == 0, checked.stderr
    assert f"SUCCESS: {len(ALERTS) + 1} rules found" in checked.stdout


def test_each_alarm_fires_exactly_when_it_should() -> None:
    tests = yaml.safe_load((MONITORING / "rules-test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {c["alertname"] for c in cases if c.get("exp_alerts")} == {r["alert"] for r in ALERTS}
    done = promtool("test", "rules", MONITORING / "rules-test.yml")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ray_gatdist_steps[10m]", "ray_gatdist_step[10m]"),
        ("storage_wait_seconds) > 30", "storage_wait_seconds) > 60"),
    ],
)
def test_changed_rule_is_detected(right: str, wrong: str, tmp_path: Path) -> None:
    text = (MONITORING / "rules.yml").read_text()
    assert right in text
    (tmp_path / "rules.yml").write_text(text.replace(right, wrong, 1))
    (tmp_path / "rules-test.yml").write_text((MONITORING / "rules-test.yml").read_text())
    assert promtool("test", "rules", tmp_path / "rules-test.yml").returncode == 1


def test_each_alarm_links_to_its_runbook_section() -> None:
    headings = set(re.findall(r"^### (Gatdist\w+)$", (MONITORING / "README.md").read_text(), re.M))
    assert headings == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        anchor = f"deploy/monitoring/README.md#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook"] == anchor
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def names_in(expression: str) -> tuple[set[str], set[str]]:
    """Return names of gatdist's metrics, and patterns of names."""
    patterns = set(re.findall(r'__name__=~"(ray_gatdist[^"]*)"', expression))
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\bray_gatdist_\w+", bare)), patterns


def test_rules_and_dashboard_query_existing_metrics(exported: set[str]) -> None:
    asked = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    asked += [*expressions(), *(v["definition"] for v in BOARD["templating"]["list"][1:])]
    found = [names_in(expression) for expression in asked]
    names = {name for one, _ in found for name in one}
    assert names - exported == set()
    assert len(names) > 25
    patterns = {pattern for _, one in found for pattern in one}
    assert len(patterns) > 4
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in exported), pattern


def test_queried_metrics_of_ray_nodes_exist() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    names = {name for e in expressions() for name in re.findall(r"\bray_(node_\w+)", e)}
    assert names
    assert names <= METRICS_GAUGES.keys()


def test_prometheus_accepts_queries_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{i}", "expr": expression.replace("$run", ".+")}
        for i, expression in enumerate(expressions())
    ]
    file = tmp_path / "board.yml"
    file.write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    checked = promtool("check", "rules", file)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
