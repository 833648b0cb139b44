"""The vLLM plugin on tensors, and its registration against the recorded signatures of vLLM 0.33."""

from __future__ import annotations

import copy
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import preference_rows
from torch import nn

import rm_ood
from rm_ood import EngineError, InputError, MismatchError, OODGuard
from rm_ood.integrations import vllm_plugin
from rm_ood.integrations.vllm_plugin import UNSCORABLE, GuardedClassifier, guard_number, register

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")


@pytest.fixture(scope="module")
def fitted(
    shared_decoder: Any, decoder_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[OODGuard, str]:
    guard = OODGuard(copy.deepcopy(shared_decoder), decoder_tokenizer, alpha=0.1, channels="final", axes=("response",))
    guard.fit(preference_rows(300), calibration=0.5, progress=False)
    path = tmp_path_factory.mktemp("guard") / "guard"
    guard.save_pretrained(path)
    return guard, str(path)


@pytest.fixture
def head(shared_decoder: Any) -> nn.Linear:
    linear: nn.Linear = copy.deepcopy(shared_decoder.score)
    return linear


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def test_distances_number_and_reward_last(fitted: tuple[OODGuard, str], head: nn.Linear, x: torch.Tensor) -> None:
    guard, path = fitted
    classifier = GuardedClassifier(head, path)
    detector = guard.state.detectors["final"]
    assert classifier.columns == ("sq_distance_chosen", "sq_distance_rejected", "guard", "reward")
    with torch.inference_mode():
        out = classifier(x)
        assert out.dtype == torch.float32
        assert out.shape == (5, 4)
        assert torch.equal(out[:, 3], head(x)[:, 0])
    assert torch.equal(out[:, :2], detector.sq_distances(x))
    assert out[:, 2].tolist() == [-float(guard_number(detector))] * 5
    assert 1 <= guard_number(detector) <= 2**24
    assert classifier(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_has_no_distance_is_far_and_fits_into_json(
    bad: float, fitted: tuple[OODGuard, str], head: nn.Linear, x: torch.Tensor
) -> None:
    classifier = GuardedClassifier(head, fitted[1])
    expected = classifier(x)
    spoilt = x.clone()
    spoilt[2, 7] = bad
    out = classifier(spoilt)
    assert out[2, :2].tolist() == [UNSCORABLE] * 2
    others = [0, 1, 3, 4]
    torch.testing.assert_close(out[others], expected[others])


def test_a_layer_that_returns_its_bias_and_one_label_of_several(
    shared_decoder: Any, fitted: tuple[OODGuard, str], x: torch.Tensor, tmp_path: Path
) -> None:
    guard = OODGuard.from_pretrained(fitted[1])
    guard._state = guard.state.with_settings({"reward": "logits:1"})
    guard.save_pretrained(tmp_path / "guard")
    linear = nn.Linear(32, 3, bias=False)

    class Replicated(nn.Module):
        weight = linear.weight

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return linear(x), None

    out = GuardedClassifier(Replicated(), str(tmp_path / "guard"))(x)
    assert torch.equal(out[:, -1], linear(x)[:, 1])


def test_half_precision_vectors(fitted: tuple[OODGuard, str], head: nn.Linear, x: torch.Tensor) -> None:
    out = GuardedClassifier(head.bfloat16(), fitted[1])(x.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out[:, :2], fitted[0].state.detectors["final"].sq_distances(x.bfloat16()))


def test_building_under_another_default_device_and_dtype(
    fitted: tuple[OODGuard, str], head: nn.Linear, x: torch.Tensor
) -> None:
    expected = GuardedClassifier(head, fitted[1])(x)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            classifier = GuardedClassifier(head, fitted[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(classifier(x), expected)


def test_heads_whose_input_the_guard_does_not_know(fitted: tuple[OODGuard, str]) -> None:
    mlp = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    for wrong in (mlp, None):
        with pytest.raises(InputError, match=f"with {type(wrong).__name__}, not with one linear layer"):
            GuardedClassifier(wrong, fitted[1])
    with pytest.raises(MismatchError, match="vectors of 32 features, this model's head 16"):
        GuardedClassifier(nn.Linear(16, 1), fitted[1])
    with pytest.raises(FileNotFoundError):
        GuardedClassifier(nn.Linear(32, 1), fitted[1] + "-gone")


def test_one_class_has_one_distance(
    shared_decoder: Any, decoder_tokenizer: Any, head: nn.Linear, tmp_path: Path
) -> None:
    guard = OODGuard(
        copy.deepcopy(shared_decoder),
        decoder_tokenizer,
        alpha=0.1,
        channels="final",
        axes=("response",),
        one_class=True,
    )
    guard.fit(preference_rows(300), calibration=0.5, progress=False).save_pretrained(tmp_path / "guard")
    classifier = GuardedClassifier(head, str(tmp_path / "guard"))
    assert classifier.columns == ("sq_distance", "guard", "reward")
    assert classifier(torch.zeros(2, 32)).shape == (2, 3)


# -- registration


class Head:
    """`ClassifierPoolerHead` of vLLM 0.33: pooled vectors in the head's dtype through the classifier, then the activation."""

    def __init__(self, classifier: Any) -> None:
        self.classifier = classifier

    def __call__(self, pooled: torch.Tensor, use_activation: bool) -> torch.Tensor:
        logits = self.classifier(pooled.to(torch.float32))
        return logits.sigmoid() if use_activation else logits


@pytest.fixture
def pooler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`vllm.model_executor.layers.pooler` with the recorded signature of `DispatchPooler.for_seq_cls`."""

    class DispatchPooler:
        def __init__(self, poolers_by_task: dict[str, Any]) -> None:
            self.poolers_by_task = poolers_by_task

        @classmethod
        def for_seq_cls(cls, pooler_config: Any, *, pooling: Any = None, classifier: Any = None) -> Any:
            made = cls({"token_classify": Head(classifier), "classify": Head(classifier)})
            made.pooling = pooling
            return made

    module: Any = ModuleType("vllm.model_executor.layers.pooler")
    module.DispatchPooler = DispatchPooler
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def config(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"logit_mean": None, "logit_sigma": None, **values})


def test_the_plugin_puts_the_guard_into_every_sequence_classifier(
    pooler: Any, fitted: tuple[OODGuard, str], head: nn.Linear, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RM_OOD_GUARD", fitted[1])
    register()
    once = pooler.DispatchPooler.for_seq_cls
    # vLLM calls plugins in every process, and more than once.
    register()
    assert pooler.DispatchPooler.for_seq_cls == once

    class Own(pooler.DispatchPooler):  # type: ignore[misc]
        pass

    for kind in (pooler.DispatchPooler, Own):
        made = kind.for_seq_cls(config(), pooling="LAST", classifier=head)
        assert type(made) is kind
        assert made.pooling == "LAST"
        out = made.poolers_by_task["classify"](x.bfloat16(), use_activation=False)
        torch.testing.assert_close(out, GuardedClassifier(head, fitted[1])(x.bfloat16().float()))
    for name in ("logit_mean", "logit_sigma"):
        with pytest.raises(InputError, match=rf"\['{name}'\], which vLLM would apply to the distances"):
            pooler.DispatchPooler.for_seq_cls(config(**{name: 1.0}), classifier=head)


def test_without_the_variable_nothing_is_touched(pooler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pooler.DispatchPooler.__dict__["for_seq_cls"]
    for value in (None, ""):
        monkeypatch.delenv("RM_OOD_GUARD", raising=False)
        if value is not None:
            monkeypatch.setenv("RM_OOD_GUARD", value)
        register()
        assert pooler.DispatchPooler.__dict__["for_seq_cls"] is before


def test_another_vllm_is_refused(pooler: Any, fitted: tuple[OODGuard, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_OOD_GUARD", fitted[1])
    del pooler.DispatchPooler.for_seq_cls
    with pytest.raises(EngineError, match=r"no DispatchPooler\.for_seq_cls .* vLLM 0\.33"):
        register()


def test_the_entry_point_names_the_function_and_importing_it_imports_no_engine() -> None:
    project = tomllib.loads((Path(rm_ood.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = project["project"]["entry-points"]["vllm.general_plugins"]["rm_ood"].partition(":")
    assert getattr(import_module(module), name) is vllm_plugin.register
    code = (
        f"import sys, {module}; {module}.{name}(); assert not {{'vllm', 'httpx2', 'transformers'}} & set(sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(rm_ood.__file__).parents[1]
    )
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
