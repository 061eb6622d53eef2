"""Metrics in Prometheus' text format, in a registry of the application's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pal.serve.decode_process import DecodeProcesses
from pal.serve.engine import Engine
from pal.serve.replica import Replica

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """What `/metrics` shows.

    Args:
        engines: by the names of their models.
        processes: that decode clips.
        replica: this server where it is one of several; its name is then a label of everything.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        processes: DecodeProcesses | None = None,
        replica: Replica | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self.labels = {} if replica is None else {"replica": replica.name}
        self.registry.register(_OfEngines(engines))
        if processes is not None:
            self.registry.register(_OfDecoders(processes))
        self.first_token = Histogram(
            "pal_time_to_first_token_seconds",
            "From the arrival of a request to the first token of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "pal_request_seconds",
            "From the arrival of a request to the end of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """The page."""
        labelled = CollectorRegistry(auto_describe=False)
        labelled.register(_Labelled(self.registry, self.labels))
        return generate_latest(labelled)


class _Labelled(Collector):
    """The metrics of a registry with more labels."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self.registry, self.labels = registry, labels

    def collect(self) -> Iterator[Metric]:
        """The registry's metrics, now."""
        for metric in self.registry.collect():
            metric.samples = [one._replace(labels={**one.labels, **self.labels}) for one in metric.samples]
            yield metric


class _OfEngines(Collector):
    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines

    def collect(self) -> Iterator[Metric]:
        """The engines' own numbers, now."""
        gauges = {
            "pal_queue_requests": ("Requests that wait.", lambda engine: engine.waiting),
            "pal_batch_answers": ("Answers that are being generated.", lambda engine: engine.running),
            "pal_cache_bytes": ("Bytes in the cache.", lambda engine: engine.cache.nbytes),
            "pal_cache_entries": ("Clips and read beginnings in the cache.", lambda engine: len(engine.cache)),
        }
        counters = {
            "pal_steps": ("Decoding steps.", lambda engine: engine.stats.steps),
            "pal_step_rows": ("Sum of the batch sizes of all steps.", lambda engine: engine.stats.rows),
            "pal_prompt_tokens": ("Tokens of prompts, audio included.", lambda engine: engine.stats.prompt_tokens),
            "pal_completion_tokens": ("Tokens of answers.", lambda engine: engine.stats.completion_tokens),
            "pal_audio_seconds": ("Seconds of audio encoded.", lambda engine: engine.stats.audio_seconds),
            "pal_clip_cache_hits": ("Clips found in the cache.", lambda engine: engine.stats.clip_hits),
            "pal_clip_cache_misses": ("Clips that were encoded.", lambda engine: engine.stats.clip_misses),
            "pal_prefix_cache_hits": (
                "Prompts whose beginning was read already.",
                lambda engine: engine.stats.prefix_hits,
            ),
            "pal_requests_answered": ("Requests answered.", lambda engine: engine.stats.answered),
            "pal_requests_failed": ("Requests that failed in the engine.", lambda engine: engine.stats.failed),
            "pal_requests_cancelled": ("Requests whose client left.", lambda engine: engine.stats.cancelled),
        }
        for name, (said, value) in gauges.items():
            gauge = GaugeMetricFamily(name, said, labels=["model"])
            for model, engine in self.engines.items():
                gauge.add_metric([model], value(engine))
            yield gauge
        for name, (said, value) in counters.items():
            counter = CounterMetricFamily(name, said, labels=["model"])
            for model, engine in self.engines.items():
                counter.add_metric([model], value(engine))
            yield counter


class _OfDecoders(Collector):
    def __init__(self, processes: DecodeProcesses) -> None:
        self.processes = processes

    def collect(self) -> Iterator[Metric]:
        """The decoders' counters, now."""
        stats = self.processes.stats
        for name, said, value in (
            ("pal_decoder_clips", "Clips decoded, or refused with their fault.", stats.clips),
            ("pal_decoder_timeouts", "Clips whose decoding took too long.", stats.timeouts),
            ("pal_decoder_out_of_memory", "Clips whose decoding took too much memory.", stats.out_of_memory),
            ("pal_decoder_crashes", "Clips at which a decoder crashed or was killed.", stats.crashes),
        ):
            yield CounterMetricFamily(name, said, value)
