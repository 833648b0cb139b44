"""The server as a Ray Serve application: replicas that batch for themselves, one traffic monitor over all of them.

    serve run rm_ood.serve.ray_serve:app guard=guard model=my-reward-model min_replicas=1 max_replicas=8

or `serve.run(deployment("guard", "my-reward-model", replicas=(1, 8)))`. Routes, replies, modes and limits are those of
`rm-ood serve`; the README's section on many machines says what Ray's proxies leave open. Each replica has the reward model:
in front of an inference engine there is little to scale, and `rm-ood serve --engine` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rm_ood.errors import InputError
from rm_ood.guard import OODGuard
from rm_ood.serve.ray_replica import Plan, RayWatch, Replica
from rm_ood.serve.settings import ServeSettings, read_api_key

NAME, WATCH = "rm_ood", "rm_ood_watch"
# After the last reply, for the last verdicts to be told.
_SHUTDOWN_S = 10.0
# Of the largest requests that fill a replica's queue: with fewer at each, Ray adds none.
_BUSY = 0.75


def deployment(
    guard: str,
    model: str,
    settings: ServeSettings | None = None,
    *,
    replicas: int | tuple[int, int] = 1,
    target_ongoing_requests: float | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    max_ongoing_requests: int | None = None,
    max_queued_requests: int | None = None,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A Ray Serve application, for `serve.run` and `serve run module:name`.

    Args:
        guard, model: folders or Hub ids that every machine sees.
        settings: as for `rm-ood serve`, of each replica; `monitor_state` is a folder. `max_connections` has no effect. Without
            `api_key` the key is that of the environment variable `RM_OOD_API_KEY`, if there is one, where this is called.
        replicas: how many, or the least and the most.
        target_ongoing_requests: requests, of however many items, at each replica; with more Ray adds one, between the least
            and the most. By default three quarters of the requests of `settings.max_items` items that fill
            `settings.max_queue`, and at most a batch: a replica answers 429 before it holds more. Where requests are smaller
            than `max_items`, set that to what they have, or this to the requests of a batch: with fewer Ray adds replicas before
            a batch is full.
        autoscaling: further settings of Ray's `AutoscalingConfig`.
        cpus, gpus: of each replica; without a GPU the model is on the CPU.
        max_ongoing_requests: requests that Ray sends to a replica at once, by default `settings.max_queue`: of one item each
            they fill its queue, and further ones wait at the proxy; of larger ones the replica answers 429 to those whose items
            have no room. max_queued_requests: that wait at a proxy, by default as many; more are answered 503.
        model_options: of `load_reward_model`. options: of `OODGuard.from_pretrained`.

    The guard is the deployment's `user_config`: a Serve config that names another one, `{guard: PATH}`, has it put in the
    place of this one while requests run (`Replica.reconfigure`).

    Raises:
        InputError: an option out of range.
        FileNotFoundError, FormatError, IntegrityError: the guard cannot be read.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise InputError(f"this needs {error.name}: pip install 'rm_ood[ray-serve]'") from error

    settings = ServeSettings() if settings is None else settings
    if settings.api_key is None:
        settings = replace(settings, api_key=read_api_key(None))
    most = settings.max_queue if max_ongoing_requests is None else max_ongoing_requests
    queued = most if max_queued_requests is None else max_queued_requests
    for name, count in (("max_ongoing_requests", most), ("max_queued_requests", queued)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{name}={count!r}: expected a whole number from 1")
    if not (cpus >= 0 and gpus >= 0):
        raise InputError(f"cpus={cpus!r}, gpus={gpus!r}: expected numbers from 0")
    # A broken guard is told before any replica loads a model.
    own = OODGuard.from_pretrained(guard).config.batch_size
    batch = own if settings.batch_size is None else min(own, settings.batch_size)
    busy = min(batch, _BUSY * (settings.max_queue // settings.max_items))

    scaling = _scaling(replicas, autoscaling, target_ongoing_requests, busy, most)
    # Ray counts GPUs, and hides none from a replica that asked for none.
    where = {} if gpus else {"device": "cpu"}
    plan = Plan(model, settings, {**where, **(model_options or {})}, options)
    folder = None if settings.monitor_state is None else str(settings.monitor_state)
    watch = serve.deployment(
        RayWatch,
        name=WATCH,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1_000,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        logging_config={"enable_access_log": False},
    ).bind(folder, settings.monitor_save_s)
    return serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        user_config={"guard": guard},
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=most,
        max_queued_requests=queued,
        backpressure_config={"status_code": 503, "retry_after_s": 1.0},
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _SHUTDOWN_S,
        # Ours has a line for each request, and names no path that a sender made up.
        logging_config={"enable_access_log": False},
        **scaling,
    ).bind(plan, watch)


def _scaling(
    replicas: int | tuple[int, int], more: Mapping[str, Any] | None, target: float | None, busy: float, most: int
) -> dict[str, Any]:
    """How many replicas: options of `serve.deployment`."""
    from ray.serve.config import AutoscalingConfig

    low, high = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not (0 <= low <= high and high >= 1):
        raise InputError(f"replicas={replicas!r}: expected a number from 1, or the least and the most of them")
    if isinstance(replicas, int):
        if more or target is not None:
            raise InputError(f"autoscaling of replicas={replicas}: give the least and the most of them, such as (1, 8)")
        return {"num_replicas": replicas}
    target = float(min(busy, most)) if target is None else target
    if not 0 < target <= most:
        raise InputError(
            f"target_ongoing_requests={target}: expected more than 0 and at most max_ongoing_requests={most}, above which no "
            "replica ever is"
        )
    given = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": target}
    others = sorted(set(AutoscalingConfig.model_fields) - set(given))
    unknown = sorted(set(more or {}) - set(others))
    if unknown:
        raise InputError(f"autoscaling: no settings {unknown}; expected some of {others}")
    try:
        return {"autoscaling_config": AutoscalingConfig(**given, **(more or {}))}
    except ValidationError as error:
        raise _told("autoscaling", error) from None


def app(args: dict[str, Any]) -> Any:
    """What `serve run rm_ood.serve.ray_serve:app NAME=VALUE...` and a Serve config's `args` build.

    Args:
        args: `guard` and `model`; `replicas`, or `min_replicas` and `max_replicas`; the other options of `deployment`;
            `trust_remote_code`, `dtype`, `device`, `allow_dtype_change`, `channels`, `api_key_file` as for `rm-ood serve`; and
            the settings by their names in `ServeSettings`. Values may be text, as a command line gives them: `a,b` for
            several, JSON for `autoscaling`. The key is in `api_key_file`, or in the
            environment variable `RM_OOD_API_KEY` of the process that runs this: for a Serve config a worker of the cluster.

    Raises:
        InputError: an unknown or missing argument, or a value out of range.
    """
    settings = {name: kind for name, kind in get_type_hints(ServeSettings).items() if name != "api_key"}
    if "api_key" in args:
        raise InputError("api_key: whoever sees Ray's dashboard would see it: use api_key_file=FILE")
    known = {**_ARGUMENTS, **settings}
    unknown = sorted(set(args) - set(known))
    if unknown:
        raise InputError(f"no arguments {unknown}; expected guard, model and some of {sorted(known)}")
    given = {name: _read(name, value, known[name]) for name, value in args.items()}
    missing = [name for name in ("guard", "model") if name not in given]
    if missing:
        raise InputError(f"missing {missing}: pass guard=FOLDER model=FOLDER")
    low, high = given.pop("min_replicas", None), given.pop("max_replicas", None)
    if (low is None) != (high is None) or (low is not None and "replicas" in given):
        raise InputError("replicas: pass replicas, or both min_replicas and max_replicas")
    if low is not None:
        given["replicas"] = (low, high)
    api_key = read_api_key(given.pop("api_key_file", None))
    model_options: dict[str, Any] = {
        name: given.pop(name) for name in ("trust_remote_code", "dtype", "device") if name in given
    }
    chosen = ServeSettings(**{name: given.pop(name) for name in settings if name in given}, api_key=api_key)
    return deployment(settings=chosen, model_options=model_options, **given)


_ARGUMENTS: dict[str, Any] = {
    "guard": str, "model": str, "replicas": int, "min_replicas": int, "max_replicas": int, "target_ongoing_requests": float,
    "autoscaling": dict[str, Any], "cpus": float, "gpus": float, "max_ongoing_requests": int, "max_queued_requests": int,
    "trust_remote_code": bool, "dtype": str, "device": str, "allow_dtype_change": bool, "channels": str, "api_key_file": str,
}  # fmt: skip


def _read(name: str, value: Any, kind: Any) -> Any:
    adapter = TypeAdapter(kind)
    try:
        if get_origin(kind) is dict and isinstance(value, str):
            return adapter.validate_json(value)
        if get_origin(kind) is tuple and isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        return adapter.validate_python(value)
    except ValidationError as error:
        raise _told(name, error) from None


def _told(name: str, error: ValidationError) -> InputError:
    """What pydantic found, without the values."""
    found = "; ".join(": ".join([".".join(map(str, e["loc"])), e["msg"]]).lstrip(": ") for e in error.errors())
    return InputError(f"{name}: {found}")
