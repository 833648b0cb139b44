"""OpenTelemetry spans of requests, with verdicts as evaluation results; nothing at all without `opentelemetry-api`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rm_ood.decision import Decision

# Semantic conventions: HTTP is stable, those for generative AI are in development.
METHOD, ROUTE, STATUS = "http.request.method", "http.route", "http.response.status_code"
OPERATION, RESULT = "gen_ai.operation.name", "gen_ai.evaluation.result"
NAME, VALUE = "gen_ai.evaluation.name", "gen_ai.evaluation.score.value"
LABEL, EXPLANATION = "gen_ai.evaluation.score.label", "gen_ai.evaluation.explanation"
_PARENT = ("traceparent", "tracestate")
EVALUATION = "out_of_distribution"


class Tracing:
    """Spans by whatever tracer provider the process has."""

    def __init__(self) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            self._trace: Any = None
            return
        # Of the caller's headers no more than these two: baggage is text, and what is wrong with it goes to a log.
        self._trace, self._extract = trace, TraceContextTextMapPropagator().extract

    @contextmanager
    def request(self, method: str, endpoint: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """A server span, a child of the caller's where its headers say so."""
        if self._trace is None:
            yield Span(None)
            return
        tracer = self._trace.get_tracer("rm_ood.serve")
        # An error's message and its traceback may hold what was being read.
        options = {"record_exception": False, "set_status_on_exception": False}
        parent = self._extract({name: headers[name] for name in _PARENT if name in headers})
        with tracer.start_as_current_span(
            f"{method} {endpoint}", parent, self._trace.SpanKind.SERVER,
            {METHOD: method, ROUTE: endpoint}, **options,
        ) as span:  # fmt: skip
            yield Span(span)


class Span:
    """One request's span, or none."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def answered(self, status: int) -> None:
        """The reply's status."""
        if self._span is not None:
            self._span.set_attribute(STATUS, status)

    def verdicts(self, decisions: Sequence[Decision]) -> None:
        """One evaluation result per item: the p-value, its label, its reasons."""
        if self._span is None or not self._span.is_recording():
            return
        self._span.set_attribute(OPERATION, "evaluate")
        for d in decisions:
            label = "ood" if d.is_ood else "in"
            attributes = {NAME: EVALUATION, VALUE: d.p_value, LABEL: label, EXPLANATION: ", ".join(d.reasons)}
            self._span.add_event(RESULT, attributes)
