"""The application: which deployment asks which. `longtake serve` starts it here, a Serve config by its import path."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from longtake.serve.api import Api
from longtake.serve.settings import Settings
from longtake.serve.stages import Decode, Refine, Stage1, Text
from longtake.serve.videos import Videos

VIDEOS_CPUS = 0.5


def build(given: dict[str, Any]) -> Application:
    """Of `Settings` as a Serve config's `args`. ValueError that names the field."""
    return application(Settings.checked(given))


def application(settings: Settings) -> Application:
    """Of settings that were checked."""
    drain: dict[str, Any] = dict(graceful_shutdown_timeout_s=settings.drain)
    text = Text.options(**settings.text.options(), **drain).bind(settings)
    stage1 = Stage1.options(**settings.stage1.options(), **drain).bind(settings)
    refiner = None
    if settings.refines:
        refiner = Refine.options(**settings.refiner.options(), **drain).bind(settings, stage1)
    decoder = Decode.options(**settings.decoder.options(), **drain).bind(settings, stage1, refiner)
    one = dict(num_replicas=1, max_ongoing_requests=10_000, graceful_shutdown_timeout_s=1.0)
    place = {} if settings.database_node is None else {settings.database_node: 0.001}
    actor = dict(num_cpus=VIDEOS_CPUS, resources=place)
    videos = Videos.options(**one, ray_actor_options=actor).bind(settings, text, decoder)
    return Api.options(**settings.api.options()).bind(settings, videos)
