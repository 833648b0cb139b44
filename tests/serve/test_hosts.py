"""For whom a server answers: a page in a browser must not reach it under a name of the page's own."""

from __future__ import annotations

from typing import Any

import pytest
from serving import guard_scorer, serving

from rm_ood import InputError, OODGuard
from rm_ood.serve.server import Server
from rm_ood.serve.settings import ServeSettings, host_name, key_digest

KEY = "correct-horse-battery-staple"
ITEM = {"prompt": "question about the river", "response": "the answer is small"}


@pytest.mark.parametrize(
    ("settings", "taken", "refused"),
    [
        (
            {},
            ["localhost", "LOCALHOST:80", "localhost.:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"],
            [
                "evil.example",
                "evil.example:8000",
                "localhost.evil.example",
                "127.0.0.1.evil.example",
                "10.0.0.1",
                "[::2]",
                "[::1]evil.example",
                "",
            ],
        ),
        (
            {"allowed_hosts": ("guard.internal", "*.example.com", "fd00::7")},
            ["guard.internal:80", "a.b.example.com", "[fd00::7]:80", "localhost"],
            ["example.com", "evilexample.com", "evil.internal"],
        ),
        ({"allowed_hosts": ("*",)}, ["any.name"], []),
        ({"api_key": key_digest(KEY)}, ["any.name", "localhost"], []),
        ({"api_key": key_digest(KEY), "allowed_hosts": ("guard.internal",)}, ["guard.internal"], ["evil.example"]),
    ],
    ids=["no key", "names", "any", "key", "key and names"],
)
def test_who_may_ask_under_which_name(
    minilm_guard: OODGuard, settings: dict[str, Any], taken: list[str], refused: list[str]
) -> None:
    key = KEY if "api_key" in settings else None
    with serving(guard_scorer(minilm_guard), **settings) as (client, _):
        for name in taken:
            assert client.post("/v1/score", ITEM, key=key, headers={"Host": name}).status == 200, name
        for name in refused:
            answer = client.post("/v1/score", ITEM, key=key, headers={"Host": name})
            assert (answer.status, answer.json["type"]) == (421, "other_host"), name
            assert "--allowed-host" in answer.json["error"]
            assert "evil" not in answer.json["error"]
            assert client.get("/metrics", key=key, headers={"Host": name}).status == 421
            # A probe by address, of what is no secret.
            assert client.get("/livez", headers={"Host": name}).status == 200


def test_a_server_answers_for_the_name_that_it_is_bound_to(minilm_guard: OODGuard) -> None:
    server = Server(
        guard_scorer(minilm_guard),
        ServeSettings(api_key=key_digest(KEY), allowed_hosts=("a.b",)),
        host="0.0.0.0",
        port=0,
    )
    server.socket.close()
    assert server.service.settings.allowed_hosts == ("a.b", "0.0.0.0")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Guard.Internal:8000", "guard.internal"),
        ("localhost.", "localhost"),
        ("[::1]", "::1"),
        ("[::1]:80", "::1"),
        ("[::1]evil.example", ""),
        ("[::1].evil:80", ""),
        ("[::1]:80]", ""),
        ("[::1]:evil", ""),
        ("[::1", ""),
        ("localhost:80.evil", ""),
        ("", ""),
    ],
)
def test_a_name_is_all_of_the_header_but_its_port(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize("name", ["http://guard", "guard:8000", "a b", "", "ex*mple", "*example"])
def test_a_name_that_could_never_match_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="allowed_hosts"):
        ServeSettings(allowed_hosts=(name,))
