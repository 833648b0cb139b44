"""The README's support table, from the suites that test its rows: `python tests/support.py` writes it into README.md."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_OUTCOMES = {"-refused": "refused by name", "-detected": "an error that says what to do"}
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"


def table() -> str:
    """Markdown of all rows: families (2.1), published models (2.3), ways of running (2.4), engines."""
    return "\n".join(
        [
            "| reward model, or way of running it | read how | status |",
            "|---|---|---|",
            *_families(),
            *_published(),
            *_ways(),
            *_engines(),
        ]
    )


def _families() -> list[str]:
    from families import FAMILIES

    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for family in FAMILIES:
        seen = "one pooled vector" if family.pooled else "every token"
        padding = {"yes": "left or right padding", "with position_ids": "left padding with `position_ids`"}
        groups[family.head, seen, padding.get(family.left, "left padding refused")].append(family.name)
    return [
        f"| {', '.join(names)} | `{head}` reads {seen}; {padding} | tested live |"
        for (head, seen, padding), names in groups.items()
    ]


def _published() -> list[str]:
    from test_readers import ROWS

    rows = [
        f"| {row.name} | `{row.head}`"
        + (f" ({', '.join(f'{k}={v!r}' for k, v in row.options.items())})" if row.options else "")
        + " | tested live on a stand-in of the published structure |"
        for row in ROWS
    ]
    return [
        *rows,
        "| PairRM, SteamSHP and other rankers of pairs | no vector of one response: refused by name | tested live |",
    ]


def _ways() -> list[str]:
    import test_ways

    rows = {}
    for test in vars(test_ways).values():
        for mark in getattr(test, "pytestmark", []):
            if mark.name == "parametrize" and mark.args[0] == "way":
                name = mark.args[1][0].removeprefix("2.4-")
                told = next((t for end, t in _OUTCOMES.items() if name.endswith(end)), "supported")
                for end in _OUTCOMES:
                    name = name.removesuffix(end)
                rows[name] = f"| {name.replace('-', ' ')} | {told} | tested live |"
    return list(rows.values())


def _engines() -> list[str]:
    return [
        "| SGLang (`/v1/score`), vLLM (`/classify`): clients and plugin registration | final vectors, or distances | recorded |",
        "| vLLM plugin's classifier | tensors on a CPU | tested live |",
        "| vLLM, SGLang: start commands, prefix caching, hidden-state extraction | `rm_ood/integrations/README.md` | read only |",
    ]


def readme(text: str) -> str:
    """The README with its table as the suites have it now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
