"""Drains this Ray node when the cloud gives notice of preemption.

``notice.py CLOUD ADDRESS`` runs on each worker and polls the cloud's metadata service. At a notice
it drains the node at the Ray cluster's ADDRESS, so that a run with workers here writes a checkpoint
before the deadline. AWS gives two minutes, Google and Azure half a minute; none guarantees it.

Sources: AWS, "Spot Instance interruption notices"; Google Cloud, "Handle preemption of Spot VMs";
Azure, "Scheduled Events for Linux VMs".
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_LINK_LOCAL = "http://169.254.169.254"
_POLL_S = 3.0
_SHORT_S = 30.0  # that Google and Azure give


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """Return the answer; "" for status 404."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=_POLL_S) as answer:
            return answer.read(100_000).decode()
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                return ""
        raise


def of_aws(service: str) -> float | None:
    """Return the seconds until AWS takes this machine away; None without a notice.

    ``service`` is the URL of the metadata service. Raises OSError if it does not answer.
    """
    seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask(f"{service}/latest/api/token", seconds, "PUT")
    headers = {"X-aws-ec2-metadata-token": token}
    message = _ask(f"{service}/latest/meta-data/spot/instance-action", headers)
    if not message:
        return None
    when = datetime.fromisoformat(json.loads(message)["time"])
    return (when - datetime.now(UTC)).total_seconds()


def of_gcp(service: str) -> float | None:
    """As :func:`of_aws`, on Google Cloud."""
    url = f"{service}/computeMetadata/v1/instance/preempted"
    message = _ask(url, {"Metadata-Flavor": "Google"})
    return _SHORT_S if message.strip() == "TRUE" else None


def of_azure(service: str) -> float | None:
    """As :func:`of_aws`, on Azure, where all machines of a group see the events of all."""
    headers = {"Metadata": "true"}
    message = _ask(f"{service}/metadata/scheduledevents?api-version=2020-07-01", headers)
    events = json.loads(message or "{}").get("Events", [])
    events = [event for event in events if event["EventType"] == "Preempt"]
    if not events:
        return None
    query = "api-version=2021-02-01&format=text"
    name = _ask(f"{service}/metadata/instance/compute/name?{query}", headers).strip()
    for event in events:
        if name in event["Resources"]:
            if not event["NotBefore"]:  # it has begun
                return 0.0
            when = parsedate_to_datetime(event["NotBefore"])
            return (when - datetime.now(UTC)).total_seconds()
    return None


CLOUDS = {"aws": of_aws, "gcp": of_gcp, "azure": of_azure}


def main() -> None:
    """Wait for a notice, drain the node, and end."""
    parser = argparse.ArgumentParser(description="Drain this node when the cloud gives notice.")
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("address", help="of the Ray cluster, HOST:PORT")
    parser.add_argument("--service", default=_LINK_LOCAL, help="URL of the metadata service")
    given = parser.parse_args()
    silent = False
    while True:
        try:
            left_s = CLOUDS[given.cloud](given.service)
            silent = False
        except (OSError, ValueError, KeyError) as error:
            left_s = None
            if not silent:
                print(f"{given.service} gives no valid answer: {error}", flush=True)
            silent = True
        if left_s is not None:
            print(f"notice: {left_s:.0f} s are left", flush=True)
            from gatdist.cluster.drain import drain  # takes a second: Ray

            drain(max(0.0, left_s), given.address)
            return
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main()
