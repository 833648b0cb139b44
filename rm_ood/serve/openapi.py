"""The OpenAPI document: schemas of requests and replies, every refusal, examples that work."""

from __future__ import annotations

from fastapi import FastAPI

from rm_ood.serve.settings import ServeSettings


def describe(app: FastAPI, settings: ServeSettings) -> None:
    """Give the application its document, made on first use."""
