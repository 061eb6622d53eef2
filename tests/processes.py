"""Processes of a test's own, forked from one that has imported torch and transformers, but nothing of ours."""

import functools
from multiprocessing.context import ForkServerContext

import torch.multiprocessing


@functools.cache
def fresh() -> ForkServerContext:
    """Each starts in a fraction of a second; a spawned one spends most of five on those imports."""
    context: ForkServerContext = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "accelerate", "transformers.models.llama.modeling_llama"])
    return context
