"""`ServerConfig` and `ReplicaConfig`: what a server is told, in the units in which a user says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from pal.audio import Limits
from pal.config import StrictConfig
from pal.serve.decode_process import MEMORY_BYTES, SECONDS
from pal.serve.engine import Engine
from pal.serve.served import ServeOptions

if TYPE_CHECKING:
    from pal.model import PalModel

_OTHERS = 16
"""Requests of a replica beside those that its engines hold: health, metrics, the page's files."""
_CHECK_SECONDS = 5.0
"""Between two checks of a replica's health."""
_STARTS = 3
"""Tries to start a replica before the deployment counts as failed."""


class ServerConfig(StrictConfig):
    """Options of a server, with those of its engines."""

    api_key: str | None = None
    """Bearer token that clients must send."""
    batch: int = Field(64, ge=1)
    """Most answers of a model that are generated at once."""
    queue: int = Field(128, ge=1)
    """Most requests of a model that wait."""
    cache_gb: float = Field(1.0, ge=0)
    """Gigabytes of audio keys and values kept, a model."""
    max_seconds: float = Field(600.0, ge=0.1)
    """Longest clip."""
    max_body_mb: float = Field(64.0, ge=0.001)
    """Largest request in megabytes."""
    max_tokens: int = Field(256, ge=1)
    """Of an answer, where a request says nothing."""
    decoders: int = Field(2, ge=0)
    """Processes that decode clips at once; 0 decodes in the server's own."""

    @field_validator("api_key")
    @classmethod
    def _some_key(cls, api_key: str | None) -> str | None:
        if api_key is not None and not api_key.strip():
            raise ValueError("the API key is empty; give --api-key or PAL_API_KEY a value, or leave it out")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key has other characters than printable ASCII, which headers cannot hold")
        return api_key

    def options(self) -> ServeOptions:
        """Options of the application."""
        body = round(self.max_body_mb * 1e6)
        return ServeOptions(
            api_key=self.api_key,
            max_body=body,
            limits=Limits(max_seconds=self.max_seconds, max_bytes=body),
            max_tokens=self.max_tokens,
            decoders=self.decoders,
            decoder_memory=max(MEMORY_BYTES, 4 * body),  # decoders copy parts of a file
            decoder_seconds=max(SECONDS, self.max_seconds / 30),
        )

    def engine(self, name: str, model: PalModel) -> Engine:
        """A new engine for a model."""
        return Engine(name, model, batch=self.batch, queue=self.queue, cache_bytes=round(self.cache_gb * 1e9))


class ReplicaConfig(ServerConfig):
    """Options of a server with replicas."""

    models: dict[str, str] = Field(min_length=1)
    """Bundle folder or Hub id of each model, by the name that clients use; each replica loads all of them."""
    other_weights: bool = False
    """Go on where the LLM or encoder found has other weights than the model was made with."""
    replicas: int = Field(1, ge=1)
    """Replicas; with `max_replicas` the least."""
    max_replicas: int | None = Field(None, ge=1)
    """Most replicas, whose number then follows the load; None keeps `replicas`."""
    target_requests: float | None = Field(None, gt=0)
    """Unanswered requests of a replica that the number of replicas aims at; None is half of `batch`."""
    cpus: float = Field(1.0, ge=0)
    """Processor cores of a replica."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of a replica; 0 answers on the CPU."""
    grace: float = Field(60.0, ge=1)
    """Seconds to finish what runs where a replica ends."""

    @model_validator(mode="after")
    def _more(self) -> ReplicaConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below replicas, which is {self.replicas}")
        return self

    def deployment(self) -> dict[str, Any]:
        """Options of Ray Serve's deployment."""
        held = (self.batch + self.queue) * len(self.models)
        replicas: dict[str, Any] = {"num_replicas": self.replicas}
        if self.max_replicas is not None:
            target = self.target_requests or max(1.0, self.batch / 2)
            between = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
            replicas = {"autoscaling_config": {**between, "target_ongoing_requests": target}}
        return {
            **replicas,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
            "max_ongoing_requests": held + _OTHERS,  # so that a full engine answers itself, by status 429
            "max_queued_requests": self.queue,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
            "graceful_shutdown_timeout_s": self.grace,
            "health_check_period_s": _CHECK_SECONDS,
            "max_constructor_retry_count": _STARTS,
        }
