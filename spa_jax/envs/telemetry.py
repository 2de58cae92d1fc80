"""What a server says about itself: Prometheus metrics, and a log of one JSON object a line."""

import datetime
import json
import logging
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from spa_jax.envs.worker import CAUSES

disable_created_metrics()  # when a counter began: Prometheus does not need it

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_SESSION_ENDS = (
    "Sessions that ended, by how: closed, gone (the connection), idle (reaped), turned_away, "
    "shutdown."
)
_WORKER_ENDS = (
    "Environment processes that ended and are replaced when needed, by cause: died, deadline, "
    "memory, failed, worn_out."
)


class Metrics:
    """The counts of one server; /metrics shows them in Prometheus' text format."""

    def __init__(self, capacity: int) -> None:
        self._registry = registry = CollectorRegistry()
        self.sessions = Gauge("spa_env_sessions", "Sessions that are open.", registry=registry)
        self.workers = Gauge("spa_env_workers", "Environment processes.", registry=registry)
        most = Gauge("spa_env_capacity", "Sessions that may be open.", registry=registry)
        most.set(capacity)
        self.session_ends = Counter(
            "spa_env_session_ends", _SESSION_ENDS, ["how"], registry=registry
        )
        self.steps = Counter("spa_env_steps", "Steps that were answered.", registry=registry)
        self.resets = Counter("spa_env_resets", "Resets that were answered.", registry=registry)
        self.seconds = Histogram(
            "spa_env_seconds",
            "What a call of an environment took.",
            ["call"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.worker_ends = Counter(
            "spa_env_worker_restarts", _WORKER_ENDS, ["cause"], registry=registry
        )
        for cause in CAUSES:
            self.worker_ends.labels(cause)  # a rate needs the zero before the first
        self.errors = Counter(
            "spa_env_errors", "Error answers, by code.", ["code"], registry=registry
        )
        self.refused = Counter(
            "spa_env_refused",
            "Requests of no client, by why: token (a wrong one), no_token, host, origin.",
            ["why"],
            registry=registry,
        )
        self.waiting = Gauge(
            "spa_env_waiting", "Connections that have not reset yet.", registry=registry
        )

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)


class JsonLines(logging.Formatter):
    """A record as one line: time, level, event, and the fields that `note` was given."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def note(logger: logging.Logger, event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs an event with its fields."""
    logger.log(level, event, extra={"fields": fields})


def log_json() -> None:
    """Makes everything that is logged from now on one JSON object a line on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # It tells of every connection; sessions are told of by us.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
