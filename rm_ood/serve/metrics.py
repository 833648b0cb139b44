"""Prometheus metrics: few, with labels from fixed sets only, so that no client can make series.

Every series is there from the start, at 0: `increase()` and `rate()` do not see an event that makes its own series.
"""

from __future__ import annotations

import math
from typing import Any

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from rm_ood.decision import Decisions
from rm_ood.penalty import verdict_scores
from rm_ood.serve.batcher import Ran
from rm_ood.serve.scorer import Scorer

SCORING = ("/v1/score", "/get_reward", "/classify")
OTHER = "other"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)
_WAITS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_P_VALUES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
_SCORES = (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
_REWARDS = (-20.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
# What stands first among the reasons of an item without a usable score.
_UNSCORED = ("non_finite", "read_out_mismatch", "scoring_failed")
# What the scoring endpoints, and all others together, can be answered.
_EVERYWHERE = (200, 400, 401, 403, 405, 408, 413, 421, 499, 500, 503)
_STATUSES = {**dict.fromkeys(SCORING, (*_EVERYWHERE, 415, 422, 429, 502, 504)), OTHER: (*_EVERYWHERE, 404, 431)}
RELOADS = ("replaced", "rolled_back")
MONITOR_CALLS = ("watch", "save")


class Metrics:
    """All that `/metrics` shows, in a registry of its own."""

    def __init__(self) -> None:
        # Their times of creation would double the series.
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def make(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            return kind(f"rm_ood_{name}", text, labels, registry=self.registry, **more)

        self.requests = make(
            Counter, "requests", "Requests by endpoint (scoring ones, other) and status.", ("endpoint", "status")
        )
        self.duration = make(
            Histogram,
            "request_duration_seconds",
            "From a request's head to its reply.",
            ("endpoint",),
            buckets=_SECONDS,
        )
        self.in_flight = make(Gauge, "requests_in_flight", "Requests being answered.")
        self.connections = make(Gauge, "connections", "Open connections.")
        self.items = make(Counter, "scored_items", "Items scored, by verdict.", ("decision",))
        self.unscored = make(Counter, "unscored_items", "Items without a usable score, which are flagged.", ("reason",))
        self.withheld = make(Counter, "withheld_rewards", "Rewards that were not given out.")
        self.score = make(Histogram, "score", "Standardised OOD score of items; larger = more OOD.", buckets=_SCORES)
        self.p_value = make(Histogram, "p_value", "p-value of items; small = OOD.", buckets=_P_VALUES)
        self.reward = make(Histogram, "reward", "Rewards of items.", buckets=_REWARDS)
        self.batch_size = make(Histogram, "batch_size", "Items in a forward.", buckets=_SIZES)
        self.batch_wait = make(
            Histogram, "batch_wait_seconds", "How long a batch's oldest item waited.", buckets=_WAITS
        )
        self.batch_duration = make(Histogram, "batch_duration_seconds", "Of the model call.", buckets=_SECONDS)
        self.tokens = make(Counter, "tokens", "Tokens through the model, those of the texts and padding.", ("kind",))
        self.queue_depth = make(Gauge, "queue_depth", "Items that wait for the model.")
        self.ready = make(Gauge, "ready", "1 while /readyz says so.")
        self.detector = make(
            Gauge, "detector_info", "The guard that is served; always 1.", ("version", "layer", "n_fit", "guard")
        )
        self.reloads = make(Counter, "guard_reloads", "Guard swaps on SIGHUP.", ("outcome",))
        self.alarm = make(Gauge, "monitor_alarm", "1 once the traffic has changed (lifetime alarm).")
        self.evidence = make(Gauge, "monitor_e_value", "Evidence that the traffic has changed.")
        self.threshold = make(Gauge, "monitor_threshold", "Evidence at which it alarms.")
        self.recurring = make(Gauge, "monitor_recurring_alarms", "Recurring alarms so far.")
        self.uncounted = make(
            Gauge,
            "monitor_uncounted_items",
            "Items in a row that the monitor did not count: their sessions had counted.",
        )
        self.flag_rate = make(Gauge, "monitor_flag_rate", "Share of the counted items that is flagged.")
        self.monitor_failures = make(Counter, "monitor_failures", "What the monitor could not do.", ("what",))
        for labelled, values in (
            (self.items, ("in", "ood")), (self.unscored, _UNSCORED), (self.tokens, ("text", "padding")),
            (self.reloads, RELOADS), (self.monitor_failures, MONITOR_CALLS), (self.duration, SCORING),
        ):  # fmt: skip
            for value in values:
                labelled.labels(value)
        for endpoint, statuses in _STATUSES.items():
            for status in statuses:
                self.requests.labels(endpoint, str(status))

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request; those to other endpoints than the scoring ones together."""
        kept = endpoint if endpoint in SCORING else OTHER
        self.requests.labels(kept, str(status) if status in _STATUSES[kept] else OTHER).inc()
        if endpoint in SCORING:
            self.duration.labels(endpoint).observe(seconds)

    def ran(self, batch: Ran) -> None:
        """Count a batch."""
        self.batch_size.observe(batch.size)
        self.batch_wait.observe(batch.waited_s)
        self.batch_duration.observe(batch.took_s)
        self.tokens.labels("text").inc(batch.tokens)
        self.tokens.labels("padding").inc(batch.padded - batch.tokens)

    def scored(self, decisions: Decisions) -> None:
        """Count verdicts."""
        flagged = int(decisions.is_ood.sum())
        self.items.labels("ood").inc(flagged)
        self.items.labels("in").inc(len(decisions) - flagged)
        for reasons in decisions.reasons:
            if reasons and reasons[0] in _UNSCORED:
                self.unscored.labels(reasons[0]).inc()
        scores = verdict_scores(decisions, None)
        for score, p, reward in zip(scores, decisions.p_values, decisions.rewards, strict=True):
            self.score.observe(score if math.isfinite(score) else math.inf)
            self.p_value.observe(p)
            if math.isfinite(reward):
                self.reward.observe(reward)

    def serves(self, scorer: Scorer, version: str) -> None:
        """Name the guard that is served."""
        self.detector.clear()
        fit = scorer.card.values["fit"]
        layers = ",".join(scorer.config.joined)
        self.detector.labels(version, layers, str(fit["prompts"]), scorer.digest[:12]).set(1)

    def text(self, accept: str, registry: Any = None) -> tuple[bytes, str]:
        """The exposition and its content type; of another registry where there is one."""
        try:
            encode, content_type = prometheus.exposition.choose_encoder(accept)
        except (TypeError, ValueError):
            # A version that is none.
            encode, content_type = prometheus.exposition.choose_encoder("")
        return encode(self.registry if registry is None else registry), content_type
