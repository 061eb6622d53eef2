"""Tiny random LLMs of every supported family, clips and conversations for the identities."""

from functools import cache

import torch

from pal.backbone.llm import Backbone
from pal.registry import build
from pal.types import AUDIO, IGNORE, AudioFeatures, Tokens
from tests.identities.reference import Decoder, Stream, lay_out

E = 10
VOCAB = 48
STRIDE = 3
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 7},
    "gemma": {"head_dim": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
INTEGRATIONS = {
    "plits": {"name": "plits"},
    "lal": {"name": "lal"},
    "lal_first": {"name": "lal", "layers": "first_third"},
    "lal_some": {"name": "lal", "layers": [0, 2], "tokens_per_position": 3},
    "lal_shared": {"name": "lal", "projector": "low_rank", "rank": 5, "shared": True},
    "pal": {"name": "pal", "stride": STRIDE},
    "pal_slow": {"name": "pal", "stride": STRIDE, "tokens_per_position": 3},
    "flamingo": {"name": "flamingo", "every": 2, "ffn": 24},
    "lal_audio_query": {"name": "lal_audio_query"},
    "lal_gated": {"name": "lal", "gate": -1.5, "gate_by": "head", "positions": "shared"},
    "pal_gated": {"name": "pal", "stride": STRIDE, "gate": -1.2, "gate_by": "head", "positions": "shared"},
    "pal_together": {"name": "pal", "stride": STRIDE, "positions": "shared", "tokens_per_position": 2},
    "query_gated": {"name": "lal_audio_query", "gate": -1.0, "positions": "shared"},
}
CROSSED = [
    (family, name)
    for family in FAMILIES
    for name in INTEGRATIONS
    if family in ("llama", "mistral") or name in ("lal", "pal")
]
"""For costly tests: each integration with and without windows, each family with two integrations."""
PLACEMENTS = {
    "before": [AUDIO, 5, 6, 7, 8],
    "middle": [5, 6, 7, AUDIO, 8, 9, 10],
    "end": [5, 6, 7, AUDIO],
    "two": [5, AUDIO, 6, AUDIO, 7, 8],
    "adjacent": [5, AUDIO, AUDIO, 7, 8],
    "turns": [5, AUDIO, 6, 7, 11, 12, 8, AUDIO, 9, 13, 14],
    "none": [5, 6, 7, 8, 9],
}


def fields(family, layers=3):
    kind = dict(FAMILIES[family])
    if "layer_types" in kind:
        kind["layer_types"] = kind["layer_types"][:layers]
    return {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        **kind,
    }


def make_backbone(family, layers=3, dtype=torch.float32, seed=0, **more):
    """Weights large enough that every mistake shows, no norm and no bias at its neutral start."""
    torch.manual_seed(seed)
    llm = Backbone.load(fields(family, layers) | more, dtype=dtype)
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return llm.eval()


def make_integration(name, llm, seed=1, **options):
    torch.manual_seed(seed)
    return opened(build("integration", INTEGRATIONS[name] | options, in_width=E, llm=llm))


def opened(integration):
    """The same, with gates that let something through: Flamingo's start at zero; those of scores differ."""
    with torch.no_grad():
        for parameter_name, parameter in integration.named_parameters():
            if "gate.scale" in parameter_name:
                parameter.copy_(torch.linspace(0.03, 0.07, parameter.numel()).view_as(parameter))
            elif "gate.weight" in parameter_name:
                parameter.copy_(torch.linspace(-0.01, 0.03, parameter.numel()).view_as(parameter))
            elif "gate" in parameter_name:
                parameter.fill_(0.8)
    return integration


@cache
def shared(family, name, layers=3):
    """A backbone and an integration that tests only read."""
    llm = _shared_backbone(family, layers)
    return llm, make_integration(name, llm)


@cache
def _shared_backbone(family, layers):
    return make_backbone(family, layers)


def features(*lengths, seed=2, garbage=True):
    """Clips of so many tokens; what lies beyond a clip's end is large, so that any leak shows."""
    generator = torch.Generator().manual_seed(seed)
    x_BAE = torch.randn(len(lengths), max(lengths), E, generator=generator)
    mask_BA = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    if garbage:
        x_BAE = torch.where(mask_BA[..., None], x_BAE, 1e3)
    return AudioFeatures(x_BAE, lengths, 0.04)


def conversation(ids, clips=(0, 1), labels=None):
    return Tokens(list(ids), list(clips[: list(ids).count(AUDIO)]), labels)


def expected_logits(llm, integration, row, audio, keys=True, rows=True, decoder=None):
    """The reference's logits of a conversation's text rows."""
    decoder = decoder or Decoder(llm.lm.config, llm.lm.state_dict())
    return decoder.logits(_scene(decoder, integration, row, audio, keys, rows))


def expected_next(llm, integration, row, audio, first):
    """The reference's logits [N + 1, vocabulary] of what follows `row.ids[:first]`, and then each later id."""
    decoder = Decoder(llm.lm.config, llm.lm.state_dict())
    scene = _scene(decoder, integration, row, audio, asked=(first,))
    return decoder.every(scene)[-(len(row.ids) - first + 1) :]


def expected_score(llm, integration, row, audio):
    """The reference's log-likelihood of a conversation's labelled ids; the first row's is none, nothing predicts it."""
    decoder = Decoder(llm.lm.config, llm.lm.state_dict())
    labelled = [place for place, label in enumerate(row.labels) if label != IGNORE]
    scene = _scene(decoder, integration, row, audio, asked=labelled)
    log_p = decoder.every(scene).log_softmax(-1)
    texts = [number for number, (_, _, is_text) in enumerate(scene.rows) if is_text]
    numbers = dict(zip([i for i, token in enumerate(row.ids) if token != AUDIO], texts, strict=True))
    found = [log_p[numbers[place] - 1, row.ids[place]] for place in labelled if numbers[place] > 0]
    return torch.stack([torch.zeros((), dtype=torch.float64), *found]).sum()


def _scene(decoder, integration, row, audio, keys=True, rows=True, asked=()):
    weights = [route.state_dict() for route in integration.routes()]
    streams = [
        Stream(
            type(route).__name__,
            own,
            getattr(route, "layers", ()),
            STRIDE,
            getattr(route.config, "positions", "reserved") == "shared",
            getattr(route.config, "gate", None),
            getattr(route.config, "tokens_per_position", 1),
        )
        for route, own in zip(integration.routes(), weights, strict=True)
    ]
    heard = audio if isinstance(audio, list) else [audio]
    clips = [[features.x_BAE[clip, : features.lengths[clip]] for features in heard] for clip in row.clips]
    return lay_out(streams, row.ids, clips, decoder.embed, keys, rows, asked)


def text_rows(llm, integration, row, inputs, logits_BTV, at):
    """The logits of row `at` where text stands, without padding and audio rows."""
    real = inputs.attention_mask_BT[at].bool()
    if inputs.audio_context is not None:
        real = real & ~inputs.audio_context.audio_rows_BT[at]
    elif row.clips:  # PLITS: the audio rows are those whose embedding is no token's
        table_VD = llm.embed(torch.arange(VOCAB))
        is_token = (inputs.inputs_embeds_BTD[at][:, None] == table_VD).all(-1).any(-1)
        real = real & is_token
    return logits_BTV[at][real]
