"""Imports run one way, in the order of the picture in the package's docstring, and `import rm_ood` is quiet."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rm_ood

ROOT = Path(rm_ood.__file__).parent

# A module imports only from modules before it.
LINES = (
    "errors channels canaries",
    "strict_json atomic artifact hub",
    "rows dialogue preferences rewriting spans frames template read_back text skew wrappers readers reward_model fingerprint",
    "vectors ops.reference ops.arithmetic ops.streams ops.triangle ops.linalg ops.packing ops.distance_kernel",
    "ops.distance_launch ops.distance ops.metric ops.scatter_kernel ops.scatter_launch ops.scatter ops moments covariance",
    "detectors.base detectors.learned detectors.mahalanobis detectors.gaussian detectors.contrasted detectors.sklearn",
    "detectors.relative detectors.conditional detectors.baselines detectors.subspace detectors.rewards detectors.projected",
    "detectors.registry detectors",
    "length conformal calibration power batch_tests traffic bets flag_rate monitor_state monitor_file monitor_inputs monitor",
    "config hooks capture embed identity fitting drawing copies collected workers gang one_pass decision state fit",
    "card_values markup card_page card",
    "calls outputs inputs scoring turns recalibration suspects guard penalty selection",
    "integrations.transport replies client integrations.read_out integrations.vllm_plugin integrations.engines",
    "integrations.vllm_vectors integrations.engine_check integrations.model_files",
    "integrations.judges integrations.processes integrations.passes integrations.trl_callbacks integrations.trl",
    "integrations.together integrations.rollout_reward integrations.openrlhf integrations.verl",
    "integrations",
    "study.rewards study.reliability study.metrics study.detection study.bootstrap study.score_files study.paper",
    "study.pairs study.scripts study.noise study.registry study.builtin study.rewarding",
    "study.aligned study.translate study.shifts",
    "study.conversations study.planted study.svg study.plots study.findings study.report",
    "study.cache study.scorer study.judged study.numbers study.scored_rows study.study study.vector_baselines",
    "study.command study.terminal study",
    "choice doctor batch demo",
    "serve serve.hangup serve.settings serve.refusal serve.worker serve.batcher serve.scorer serve.schemas serve.reading",
    "serve.policy serve.logs serve.metrics serve.traffic serve.tracing serve.service serve.gate serve.openapi serve.app",
    "serve.protocol serve.server serve.engine_refusal serve.engine",
    "serve.shared_traffic serve.behind_proxy serve.ray_replica serve.ray_serve",
)
ORDER = " ".join(LINES).split()
# The package's own names come from all of the above; the command line is their reader.
LAST = ("", "commands", "cli", "distributed", "ray_data")
# What a server is made of is loaded by `rm-ood serve` alone.
SERVING = {"fastapi", "pydantic", "starlette", "uvicorn", "h11", "prometheus_client", "opentelemetry"}
# Tensors only: they work on vectors that came from anywhere.
STATISTICS = " ".join(LINES[3:9]).split()
MODEL_COLUMN = {
    "dialogue",
    "preferences",
    "spans",
    "template",
    "text",
    "skew",
    "wrappers",
    "reward_model",
    "fingerprint",
    "config",
    "hooks",
    "capture",
    "embed",
    "fit",
    "guard",
}
OPTIONAL = {
    "datasets",
    "yaml",
    "pandas",
    "matplotlib",
    "triton",
    "pyarrow",
    "gguf",
    "chatterbot_corpus",
    "httpx2",
    "vllm",
    "trl",
    "ray",
    *SERVING,
}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            module = str(node.module)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner.removeprefix("rm_ood.") in known else module)
    own = {name for name in found if name.split(".")[0] == "rm_ood"}
    return {name.removeprefix("rm_ood").removeprefix(".") for name in own}


def top_level(path: Path) -> set[str]:
    """Packages that importing a file imports at once: those outside its functions."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    found: set[str] = set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    assert len(ORDER) == len(set(ORDER))
    assert {*ORDER, *LAST} == set(modules()), "a module is missing in ORDER, or gone: say where it stands"


def test_imports_run_one_way() -> None:
    files = modules()
    place = {name: i for i, name in enumerate((*ORDER, *LAST))}
    wrong = [
        f"{name or 'rm_ood'} imports {other or 'rm_ood'}"
        for name, path in files.items()
        for other in imports(path, set(files))
        if place[other] >= place[name]
    ]
    assert wrong == []


def test_the_statistics_column_knows_no_model() -> None:
    files = modules()
    for name in STATISTICS:
        assert not imports(files[name], set(files)) & MODEL_COLUMN, name
        assert "transformers" not in files[name].read_text(encoding="utf-8"), name


def test_extras_are_imported_where_they_are_used() -> None:
    for name, path in modules().items():
        # The demo trains a model, and nothing else imports it.
        late = OPTIONAL if name == "demo" else OPTIONAL | {"transformers"}
        # A kernel is a function of Triton's; only its launcher imports it, when it launches.
        late = late - {"triton"} if name.endswith("_kernel") else late
        late = late - SERVING if name.startswith("serve.") else late
        assert not top_level(path) & late, name


def test_importing_the_package_is_quiet_and_needs_no_extra() -> None:
    code = f"""
import sys, warnings
warnings.simplefilter("error")
import rm_ood
loaded = {sorted(OPTIONAL)}
found = [name for name in loaded if name in sys.modules]
assert not found, found
import torch
assert not torch.cuda.is_initialized()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


@pytest.mark.parametrize("name", sorted(rm_ood.__all__))
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    value = getattr(rm_ood, name)
    assert name == "__version__" or value.__doc__
