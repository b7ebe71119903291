"""What a server is told: one checked value, from a command line or from a Serve config's `args`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from longtake.model import presets, weights
from longtake.model.config import WorldModelConfig
from longtake.serve.requests import Limits


class _Strict(BaseModel):
    """Ray Serve lets misspelt keys pass; this does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Scaling(_Strict):
    """Of one deployment. together: requests that a replica works on at once; more than that of all replicas wait, and
    make another one start after `up_after` seconds, up to `most`; a replica without work ends after `down_after`.
    """

    least: int = Field(default=1, ge=1)
    most: int = Field(default=1, ge=1)
    together: int = Field(default=1, ge=1)
    up_after: float = Field(default=5.0, ge=0)
    down_after: float = Field(default=60.0, ge=0)
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        if self.most < self.least:
            raise ValueError(f"most {self.most} is less than least {self.least}")
        return self

    def options(self) -> dict[str, Any]:
        """As Ray Serve's `deployment.options` takes them."""
        return dict(
            max_ongoing_requests=self.together,
            autoscaling_config=dict(
                min_replicas=self.least,
                max_replicas=self.most,
                target_ongoing_requests=self.together,
                upscale_delay_s=self.up_after,
                downscale_delay_s=self.down_after,
            ),
            ray_actor_options=dict(num_cpus=self.num_cpus, num_gpus=self.num_gpus),
        )


class Settings(_Strict):
    """preset, weights: of a model that makes one chunk after another. random_weights: of the preset's sizes, beside
    random features of texts, to see what a machine can do. quantization: fp8 rounds what the large matrix products of
    both stages take. refine: whether it can be asked to refine, by default where
    the preset's refiner works by blocks. store: folder or s3:// prefix of all files that are made. database: SQLite
    file of what was asked for; by default in `store`, which then must be a folder. database_node: a custom resource
    that, of all of Ray's nodes, only the one with the database's disk has. keys: JSON file of API keys, as
    serve/README.md says; without one anybody may ask, and only this machine should reach the port.

    max_seconds: of a video. max_running: videos that are made at once; max_queued: that wait, of all keys together.
    max_upload: bytes of a request's body. max_sessions: live ones at once; session_idle: seconds without a word after
    which one ends; look_ahead: chunks whose actions may wait for the one that is being made. stalled: seconds without a
    word of any stage after which a video is begun anew, from what is there of it. drain: seconds that a stage which is
    to end may go on with what it has.
    """

    preset: str = "tiny-streaming"
    weights: str | None = None
    random_weights: bool = False
    quantization: Literal["fp8"] | None = None
    refine: bool | None = None
    store: str = "runs/serve"
    database: str | None = None
    database_node: str | None = None
    keys: str | None = None
    max_seconds: float = Field(default=60.0, gt=0)
    max_running: int = Field(default=4, ge=1)
    max_queued: int = Field(default=64, ge=0)
    max_upload: int = Field(default=16 << 20, ge=1 << 10)
    max_sessions: int = Field(default=4, ge=0)
    session_idle: float = Field(default=60.0, gt=0)
    look_ahead: int = Field(default=2, ge=0)
    stalled: float = Field(default=120.0, gt=0)
    drain: float = Field(default=30.0, ge=0)
    api: Scaling = Scaling(together=64, num_cpus=0.5)
    text: Scaling = Scaling(together=4, num_cpus=0.5)
    stage1: Scaling = Scaling(most=2, together=4)
    refiner: Scaling = Scaling(most=2, together=4)
    decoder: Scaling = Scaling(most=2, together=4)

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_given_stays(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Of a deployment, too."""
        own = {
            name: field.default.model_dump() for name, field in cls.model_fields.items() if field.annotation is Scaling
        }
        return {k: own[k] | v if k in own and isinstance(v, dict) else v for k, v in given.items()}

    @classmethod
    def checked(cls, given: dict[str, Any]) -> Settings:
        """ValueError that names the field, before anything starts or loads."""
        from longtake.model.pipeline import check_folder  # slow to import, and not for those who only read settings

        try:
            settings = cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        config = settings.config
        if not config.chunk_causal or config.most_latent_frames is not None:
            raise ValueError(
                f"preset: {config.name!r} makes no endless video: choose tiny-streaming or another streaming"
            )
        if settings.refine and config.refiner.block_size is None:
            raise ValueError(f"refine: the refiner of {config.name!r} sees whole clips: leave refine away")
        at_once = settings.max_running + settings.max_sessions
        for name in ("stage1", "decoder", *(("refiner",) if settings.refines else ())):
            scaling: Scaling = getattr(settings, name)
            if (room := scaling.most * scaling.together) < at_once:
                more = f"max_running + max_sessions = {at_once} are more: raise {name}.most or {name}.together"
                raise ValueError(f"{name}: {scaling.most} replicas of {scaling.together} hold {room} videos, {more}")
        if settings.random_weights and settings.weights is not None:
            raise ValueError("random_weights: leave weights away, or this")
        if settings.folder is not None:
            check_folder(config, settings.folder, settings.parts)
        if settings.database is None and "://" in settings.store:
            raise ValueError("database: give the path of a file, where store is not a folder")
        if settings.keys is not None and not Path(settings.keys).is_file():
            raise ValueError(f"keys: there is no file {settings.keys}")
        return settings

    @cached_property
    def config(self) -> WorldModelConfig:
        preset = presets.get(self.preset)
        return preset if self.folder is None else weights.config_for(preset, self.folder)

    @cached_property
    def folder(self) -> Path | None:
        """Of the weights; None where they are random."""
        return None if self.random_weights else weights.resolve(presets.get(self.preset), self.weights)

    @property
    def refines(self) -> bool:
        return self.config.refiner.block_size is not None if self.refine is None else self.refine

    @property
    def limits(self) -> Limits:
        return Limits(self.config, self.max_seconds, self.refines, self.max_running + self.max_queued)

    @property
    def parts(self) -> tuple[str, ...]:
        refiner = ("refiner", "refiner_text") if self.config.refiner_reads_own_text else ("refiner",)
        return ("text", "vae", "dit", *(refiner if self.refines else ()))

    @property
    def ledger(self) -> Path:
        return Path(self.database or Path(self.store) / "videos.sqlite")
