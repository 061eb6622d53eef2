"""Goals of `pal bench`: what they are compared with, and on which cards they are checked."""

from dataclasses import replace
from typing import Any

from pal.bench.checks import checks
from pal.bench.goals import GOALS
from pal.bench.presets import PRESETS, preset_of
from pal.bench.report import to_dict
from pal.bench.result import BenchResult, Measurement
from pal.bench.run import run


class _Anything(dict):  # type: ignore[type-arg]
    def __missing__(self, key: Any) -> Any:
        from pal.bench.closed_form import ClosedForm

        return ClosedForm(1, 1, 1)


def test_goals_on_a_gpu() -> None:
    """Each on either side of its bound."""

    def row(
        variant: str, phase: Any, seconds: float, length: Any = 1500, batch: int = 8, saved: int = 1
    ) -> Measurement:
        return Measurement(variant, "llm", phase, length, 128, batch, seconds, 0.0, 1, saved, 10**12, 1.0, 0, 1)

    train = [row("plits", "train", 9.0, saved=1000), row("lal", "train", 2.1, saved=121), row("pal", "train", 4.4)]
    short = [row("plits", "train", 9.0, 750), row("lal", "train", 3.5, 750), row("lal_third", "train", 3.1, 750)]
    ragged = [row(name, "train", s, "ragged") for name, s in (("plits", 9.0), ("lal", 3.1), ("lal_third", 2.2))]
    ask = [
        row("plits", "prefill", 1.3, batch=1),
        row("lal", "prefill", 1.0, batch=1),
        row("pal", "prefill", 1.1, batch=1),
    ]
    write = [row("lal", "decode", 1.2), row("lal", "decode_graph", 0.24)]
    result = BenchResult(
        PRESETS["gpu-quick"], {"product_flops_per_second": 1e12}, [*train, *short, *ragged, *ask, *write],
        [row("plain", "train", 8.9), row("plain", "train", 8.7, 750), row("plain", "decode", 1.0)],
    )  # fmt: skip
    made = [check for check in checks(replace(result, paper=_Anything())) if check.kind == "goal"]
    found = {(one.variant, one.phase, one.audio_tokens, one.against, one.quantity): one.ok for one in made}
    assert found == {
        ("lal", "train", 1500, "plits", "seconds"): False,
        ("lal", "train", 1500, "plits", "saved_bytes"): False,
        ("pal", "train", 1500, "plits", "seconds"): True,
        ("pal", "train", 1500, "plits", "saved_bytes"): True,
        ("lal", "train", "ragged", "plits", "seconds"): False,
        ("lal_third", "train", "ragged", "plits", "seconds"): True,
        ("lal", "train", 750, "plits", "seconds"): True,
        ("lal", "train", 750, "plits", "saved_bytes"): False,
        ("lal_third", "train", 750, "plits", "seconds"): False,
        ("plits", "train", 750, "plain", "seconds"): False,
        ("plits", "train", 750, "product", "rate"): False,
        ("lal", "train", 750, "product", "rate"): False,
        ("plits", "train", 1500, "plain", "seconds"): True,
        ("plits", "train", 1500, "product", "rate"): False,
        ("lal", "train", 1500, "product", "rate"): True,
        ("lal", "prefill", 1500, "plits", "seconds"): True,
        ("pal", "prefill", 1500, "plits", "seconds"): False,
        ("lal", "decode", 1500, "plain", "seconds"): False,
        ("lal", "decode_graph", 1500, "plain", "seconds"): True,
    }


def test_shares_of_a_products_rate() -> None:
    preset = preset_of(
        "cpu-small", variants=["plits"], audio_tokens=[20], phases=["prefill"], scopes=["llm"], repeats=1
    )
    result = run(preset)
    assert result.rate is not None and result.rate > 1e8
    (ratio,), (one,) = to_dict(result)["ratios"], result.rows
    assert one.seconds is not None
    assert ratio["flops_per_second"] == one.flops / one.seconds
    assert ratio["of_product"] == ratio["flops_per_second"] / result.rate


def test_goals_are_checked_where_they_are_set() -> None:
    def row(variant: str, seconds: float, saved: int) -> Measurement:
        return Measurement(variant, "llm", "train", 1500, 128, 1, seconds, 0.0, 1, saved, 1, 1.0, 0, 1)

    result = BenchResult(PRESETS["cpu"], {}, [row("plits", 9.0, 1000), row("lal", 2.0, 119), row("pal", 4.5, 501)])
    made = [check for check in checks(replace(result, paper=_Anything())) if check.kind == "goal"]
    assert {(check.variant, check.quantity): check.ok for check in made} == {
        ("lal", "seconds"): True,
        ("lal", "saved_bytes"): True,
        ("pal", "seconds"): False,
        ("pal", "saved_bytes"): False,
    }
    assert len(GOALS) == 14
