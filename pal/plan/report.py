"""A plan as text, and as plain JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pal.plan.estimate import ANSWER_SHARE, Plan, StagePlan


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-compatible values: FLOPs of a step, bytes, seconds."""
    return {
        "gpu": asdict(plan.gpu),
        "assumed": {
            "clip_seconds": plan.clip_seconds,
            "text_tokens": plan.text_tokens,
            "answer_share": ANSWER_SHARE,
            "utilisation": plan.utilisation,
        },
        "parallel": asdict(plan.parallel),
        "parameters": {**plan.parameters, "all": sum(plan.parameters.values())},
        "kv_bytes": plan.kv_bytes,
        "conversation": {"turns": plan.turns, "kv_bytes": plan.conversation_bytes},
        "fits": plan.fits,
        "stages": [_stage_dict(stage) for stage in plan.stages],
    }


def _stage_dict(stage: StagePlan) -> dict[str, Any]:
    return {
        "name": stage.name,
        "objective": stage.objective,
        "parameters": stage.parameters,
        "trained": stage.trained,
        "trained_share": stage.trained_share,
        "forward_pass": {
            "clips": stage.clips,
            "conversations": stage.conversations,
            "audio_tokens": stage.audio_tokens,
            "sequence": stage.sequence,
            "passes_a_step": stage.passes,
        },
        "flops": {
            "forward": stage.forward,
            "backward": stage.backward,
            "by_part": {part: {"forward": c.forward, "backward": c.backward} for part, c in stage.costs.items()},
        },
        "memory_bytes": {**asdict(stage.memory), "total": stage.memory.total},
        "fits": stage.fits,
        "estimated_step_seconds": stage.seconds,
        "estimated_exchange_seconds": stage.exchange_seconds,
        "steps": stage.steps,
    }


def to_text(plan: Plan) -> str:
    """The plan as text."""
    whole = sum(plan.parameters.values())
    parts = ", ".join(f"{part} {_count(n)}" for part, n in plan.parameters.items())
    lines = [
        f"parameters  {_count(whole)}: {parts}",
        f"clip        {plan.clip_seconds:g} s; its keys and values in bf16: {_bytes(plan.kv_bytes)}",
        f"text        {plan.text_tokens} tokens a question, {ANSWER_SHARE:.0%} of them its answer (assumed)",
        f"turns       {plan.turns} of clip and text; keys and values in bf16: {_bytes(plan.conversation_bytes)}",
    ]
    for number, stage in enumerate(plan.stages, 1):
        lines += ["", *_stage_lines(number, stage, plan)]
    misfits = [stage.name for stage in plan.stages if not stage.fits]
    more = "" if plan.parallel.sharded else ", or shard the weights (--gpus N --shard)"
    verdict = f"does not fit: {', '.join(misfits)}; raise batch.accumulate{more}" if misfits else "fits"
    several = "" if plan.parallel.gpus == 1 else f"{plan.parallel.gpus} x "
    lines += ["", f"{several}{plan.gpu.name}, {_bytes(plan.gpu.memory)}: {verdict}"]
    if plan.gpu.bf16 is None:
        lines.append(f"note: {plan.gpu.name} has no bfloat16; the times are those of float32")
    return "\n".join(lines)


def _stage_lines(number: int, stage: StagePlan, plan: Plan) -> list[str]:
    trained = ", ".join(f"{part} {_count(n)}" for part, n in stage.trained.items())
    several = plan.parallel.gpus > 1
    sizes = asdict(stage.memory)
    if not several:
        del sizes["buffers"]
    memory = ", ".join(f"{name} {_bytes(size)}" for name, size in sizes.items())
    tokens = " + ".join(str(n) for n in stage.audio_tokens)
    by_part = ", ".join(f"{part} {_flops(c.forward + c.backward)}" for part, c in stage.costs.items())
    fits = "fits" if stage.fits else "does not fit"
    length = "" if stage.steps is None else f"; {stage.steps} steps: {stage.steps * stage.seconds / 3600:.2f} h"
    each = ", each GPU" if several else ""
    exchange = f" (exchanges between GPUs: {stage.exchange_seconds:.3g} s)" if several else ""
    return [
        f"stage {number}: {stage.name} ({stage.objective})",
        f"  trains    {trained}: {stage.trained_share:.2%} of all",
        f"  pass      {stage.clips} clips of {tokens} tokens, "
        f"{stage.conversations} conversations of {stage.sequence} rows; {stage.passes} a step{each}",
        f"  a step    {_flops(stage.forward)} forward, {_flops(stage.backward)} backward ({by_part})",
        f"  memory    {_bytes(stage.memory.total)} of {_bytes(plan.gpu.memory)}, {fits}: {memory}",
        f"  estimate  {stage.seconds:.3g} s a step at {plan.utilisation:.0%} of the peak{exchange}{length}",
    ]


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M" if n >= 1e5 else str(n)


def _bytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def _flops(n: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1e6:.3g} MFLOP"
