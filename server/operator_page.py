"""The operator's page and metrics, for this machine alone."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from homefire.server.status import Status

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
LOOPBACK_HOSTS = ["127.0.0.1", "localhost"]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(status: Callable[[], Status]) -> Starlette:
    """The page as an ASGI app; it changes nothing.

    Args:
        status: Tells how the server is; may take a while.
    """

    async def tell(request: Request) -> Response:
        found = await run_in_threadpool(status)
        return JSONResponse(asdict(found), headers=HEADERS)

    async def measure(request: Request) -> Response:
        found = await run_in_threadpool(status)
        return Response(metrics(found), media_type="text/plain; version=0.0.4", headers=HEADERS)

    async def show(request: Request) -> Response:
        return FileResponse(PAGE / FILES[request.url.path], headers=HEADERS)

    return Starlette(
        routes=[
            Route("/status.json", tell),
            Route("/metrics", measure),
            *[Route(path, show) for path in FILES],
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS)],
    )


def metrics(status: Status) -> bytes:
    """A status in Prometheus' text format.

    Guarantees:
        Allow-list: what is told is what is named here; labels are reasons and processes, which come
            from fixed sets.
    """
    registry = CollectorRegistry()
    registry.register(_Once(_families(status)))
    return generate_latest(registry)


class _Once:
    """Gives what it was made of."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """All of it."""
        return self._families


def _families(status: Status) -> list[Metric]:
    gauges: list[tuple[str, str, float | None]] = [
        ("homefire_devices_enrolled", "Devices that are enrolled", status.enrolled),
        ("homefire_devices_online", "Devices that are here", status.online),
        ("homefire_tickets_open", "Tickets that can still be redeemed", status.tickets),
        ("homefire_rounds_released", "Rounds that were released", status.released),
        ("homefire_rounds_burnt", "Rounds that were spent without a release", status.burnt),
        ("homefire_rounds_planned", "Rounds of the run", status.planned_rounds),
        ("homefire_trouble", "Things to look at", len(status.trouble)),
        ("homefire_halted", "1 where something keeps rounds from being opened", int(status.halted)),
        ("homefire_certificate_days", "For which the certificate is good", status.certificate_days),
    ]
    if status.published:
        newest = status.published[-1]["number"]
        gauges.append(("homefire_releases_published", "Releases of all runs", newest))
    if (budget := status.budget) is not None:
        gauges += [
            ("homefire_epsilon_now", "Epsilon of the releases so far", budget.epsilon_now),
            ("homefire_epsilon_end", "Epsilon of all planned releases", budget.epsilon_end),
            ("homefire_rounds_left", "Rounds that are left", budget.rounds_left),
        ]
    if status.rounds:
        last = status.rounds[-1]
        gauges += [
            ("homefire_round_seconds", "Wall time of the newest round", last["seconds"]),
            ("homefire_round_cohort", "Devices asked in the newest round", last["cohort"]),
            ("homefire_round_accepted", "Contributions in its sum", last["accepted"]),
        ]
    found: list[Metric] = [
        GaugeMetricFamily(name, said, value=value)
        for name, said, value in gauges
        if value is not None
    ]
    found += [
        CounterMetricFamily("homefire_bytes_up", "Of contributions", value=status.bytes_up),
        CounterMetricFamily("homefire_bytes_down", "Of releases in plans", value=status.bytes_down),
        _labelled("homefire_contributions_dropped", "By reason", "reason", status.dropped),
        _labelled("homefire_plans_refused", "By reason", "reason", status.refused),
        _labelled(
            "homefire_requests_refused", "By reason", "reason", status.door.get("refused", {})
        ),
        _labelled(
            "homefire_registry_answered", "By call", "call", status.registry.get("answered", {})
        ),
        _labelled(
            "homefire_registry_refused", "By reason", "reason", status.registry.get("refused", {})
        ),
        CounterMetricFamily(
            "homefire_registry_bytes",
            "Of downloads",
            value=status.registry.get("bytes_sent", 0),
        ),
        _labelled(
            "homefire_process_starts",
            "By process",
            "process",
            {name: each["starts"] for name, each in status.processes.items()},
        ),
    ]
    return found


def _labelled(name: str, said: str, label: str, values: dict[str, Any]) -> Metric:
    family = CounterMetricFamily(name, said, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family
