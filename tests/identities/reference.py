"""A decoder in plain matmuls, float64, one conversation at a time; it shares no code with the product.

Audio and text are entities with a time and with positions. Rows are entities that run through all layers; keys
are entities that exist only as input of a layer's key and value projections. A query sees an entity iff its
time is not later and, on windowed layers, its position is less than the window away.
"""

import math
from dataclasses import dataclass, field

import torch

AUDIO = -1


@dataclass
class Scene:
    rows: list = field(default_factory=list)
    """(embedding [D], position, is_text)"""
    times: list = field(default_factory=list)
    """Time of each row."""
    now: int = 0
    keys: dict = field(default_factory=dict)
    """layer -> list of (u [D], position, position for RoPE, gate, time); gate: bias on its scores [H] or [1], factor
    on its keys [G] or [1]"""
    crossed: list = field(default_factory=list)
    """Flamingo's clips: (weights, layers, time, features [A, E])"""
    updated: list = field(default_factory=list)
    """Clips of audio queries: (layers, u [A, D], positions [A], positions for RoPE [A], layer -> gate, times [A])"""
    row_gates: dict = field(default_factory=dict)
    """Number of an audio row -> biases of its scores as a key [layers, H or 1]."""
    asks: dict = field(default_factory=dict)
    """Number of a row that asks again behind clips -> number of the text row that it repeats."""

    def tick(self):
        """The next time."""
        self.now += 1
        return self.now

    def row(self, x, position, is_text):
        self.rows.append((x, position, is_text))
        self.times.append(self.tick())


def mlp(weights, prefix, x):
    w = {k: weights[f"{prefix}.{k}"].double() for k in ("0.weight", "0.bias", "2.weight", "2.bias")}
    hidden = x.double() @ w["0.weight"].T + w["0.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ w["2.weight"].T + w["2.bias"]


@dataclass
class Stream:
    """How the tokens of one encoder enter: the class's name, its weights, its layers, the hybrid's stride."""

    method: str
    weights: dict
    layers: tuple
    stride: int
    shared: bool = False
    """A clip takes no positions: its keys are rotated to those before the text that follows."""
    gate: float | None = None
    """Bias on the scores of keys at the start; its weights add 100 times themselves."""
    pace: int = 1
    """Places of a clip that share a position."""


def lay_out(streams, ids, clips, embed, keys=True, rows=True, asked=()):
    """Put a conversation's text and clips at the positions of DESIGN section 1, step by step.

    clips: for each placeholder, in order, the features [A, E] of each stream, without padding.
    keys=False or rows=False leaves that half of the hybrid out; positions stay.
    asked: places in `ids` before which a row must have heard all clips; it is one that repeats the last text
    where the last stream makes no rows.
    """
    scene = Scene()
    p = 0
    clips = list(clips)
    said = None
    for number, token in enumerate([*ids, None]):
        behind = number in asked and number > 0 and ids[number - 1] == AUDIO
        rows_last = streams and streams[-1].method in ("PLITS", "PAL") and not streams[-1].shared
        if behind and said is not None and not rows_last:
            scene.asks[len(scene.rows)] = said
            scene.row(scene.rows[said][0], p - 1, False)
        if token is None:
            break
        if token != AUDIO:
            said = len(scene.rows)
            scene.row(embed(token), p, True)
            p += 1
            continue
        for stream, a in zip(streams, clips.pop(0), strict=True):
            p = place(scene, p, stream, a, keys, rows)
    assert not clips
    return scene


def place(scene, p, stream, a, keys, rows):
    """One clip of one stream at position `p`; returns the position after it."""
    r, weights, method = stream.stride, stream.weights, stream.method
    if method == "PLITS":
        for u in mlp(weights, "projector", a):
            scene.row(u, p, False)
            p += 1
        return p
    if method == "Flamingo":
        scene.crossed.append((weights, stream.layers, scene.tick(), a.double()))
        return p
    none = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    gates = dict.fromkeys(stream.layers, none)
    if stream.gate is not None:
        both = stream.gate + 100 * weights["gate.weight_LH"].double(), 0.1 + 10 * weights["gate.scale_LG"].double()
        gates = dict(zip(stream.layers, zip(*both, strict=True), strict=True))
    if method == "LALAudioQuery":
        taken = math.ceil(len(a) / stream.pace)
        turned = p + torch.arange(len(a)) // stream.pace - (taken if stream.shared else 0)
        at = torch.full((len(a),), p) if stream.shared else turned
        times = torch.tensor([scene.tick() for _ in a])
        scene.updated.append((stream.layers, mlp(weights, "projector", a), at, turned, gates, times))
        return p if stream.shared else p + taken
    groups = [range(i, min(i + r, len(a))) for i in range(0, len(a), r)] if method == "PAL" else [range(len(a))]
    S = len(groups) if method == "PAL" else 0
    taken = math.ceil((S * (r + 1) if S else len(a)) / stream.pace)
    first = p - taken if stream.shared else p
    started, times = scene.now, {}
    for i, group in enumerate(groups):  # a group's tokens, then its summary
        times |= {j: started + j + i + 1 for j in group}
    for layer in stream.layers if keys else ():
        for j, u in enumerate(per_layer(weights, layer, a)):
            turned = first + (j + (j // r if method == "PAL" else 0)) // stream.pace
            at = p if stream.shared else turned
            scene.keys.setdefault(layer, []).append((u, at, turned, gates[layer], times[j]))
    scene.now = started + len(a)
    if method == "LAL":
        return p if stream.shared else p + taken
    kernel, bias = weights["summarize.weight"].double(), weights["summarize.bias"].double()
    for i in range(S):
        total = bias.clone()
        for j in range(i * r, min((i + 1) * r, len(a))):
            total = total + kernel[:, :, j - i * r] @ a[j].double()
        scene.now = times[groups[i][-1]]
        if rows:
            if stream.gate is not None:
                scene.row_gates[len(scene.rows)] = stream.gate + 100 * weights["row_gate.weight_LH"].double()
            scene.row(mlp(weights, "projector", total[None])[0], first + ((i + 1) * r + i) // stream.pace, False)
        scene.now = times[groups[i][-1]] + 1
    return p if stream.shared else p + taken


def per_layer(weights, layer, a):
    if "projectors.shared.0.weight" in weights:  # low rank, one for all layers
        w = {k: weights[f"projectors.shared.{k}"].double() for k in ("0.weight", "1.weight", "1.bias")}
        return (a.double() @ w["0.weight"].T) @ w["1.weight"].T + w["1.bias"]
    return mlp(weights, f"projectors.{layer}", a)


def layer_norm(weights, name, x):
    y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return y * weights[f"{name}.weight"].double() + weights[f"{name}.bias"].double()


class Decoder:
    """Llama, Qwen2, Qwen3, Mistral, Gemma or Gemma3 from its configuration and a state dict."""

    def __init__(self, config, state):
        self.c = config
        self.w = {name: tensor.detach().double() for name, tensor in state.items()}
        self.kind = config.model_type
        self.gemma = self.kind.startswith("gemma")
        self.C = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.hidden = lambda layer, which: torch.zeros(0, dtype=torch.bool)
        """What no other entity sees in a layer: of "rows", "keys" or "crossed", True for each that is hidden."""
        self.asks = {}
        self.times = None
        self.row_gates = {}
        self.weights = {}
        """Layer -> softmax of the rows over rows, then keys [H, N, K]; "crossed" and layer -> those of a block."""

    def embed(self, token):
        e = self.w["model.embed_tokens.weight"][token]
        return e * math.sqrt(self.c.hidden_size) if self.gemma else e

    def norm(self, name, x):
        weight = self.w[name + ".weight"]
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.c.rms_norm_eps)
        return y * (1 + weight) if self.gemma else y * weight

    def linear(self, name, x):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def layer_kind(self, layer):
        if self.kind == "mistral":
            return "sliding_attention" if self.c.sliding_window else "full_attention"
        return (getattr(self.c, "layer_types", None) or ["full_attention"] * self.c.num_hidden_layers)[layer]

    def rope(self, x, positions, layer):
        """x [N, heads, C]"""
        parameters = self.c.rope_parameters
        theta = (
            parameters[self.layer_kind(layer)]["rope_theta"] if self.kind == "gemma3_text" else parameters["rope_theta"]
        )
        half = self.C // 2
        angle = positions.double()[:, None] / theta ** (torch.arange(half).double() / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)

    def keys_values(self, layer, x, positions):
        p = f"model.layers.{layer}."
        x = self.norm(p + "input_layernorm", x)
        k = self.linear(p + "self_attn.k_proj", x).view(len(x), -1, self.C)
        v = self.linear(p + "self_attn.v_proj", x).view(len(x), -1, self.C)
        if p + "self_attn.k_norm.weight" in self.w:
            k = self.norm(p + "self_attn.k_norm", k)
        return self.rope(k, positions, layer), v

    def attention(self, layer, x, positions, extra, updating=False):
        p = f"model.layers.{layer}."
        k, v = self.keys_values(layer, x, positions)
        key_positions = positions
        if extra:
            u = torch.stack([one[0] for one in extra])
            at, turned, heard = (torch.tensor([one[i] for one in extra]) for i in (1, 2, 4))
            k2, v2 = self.keys_values(layer, u, turned)
            k2 = k2 * torch.stack([one[3][1].expand(k.shape[1]) for one in extra])[..., None]
            k, v, key_positions = torch.cat([k, k2]), torch.cat([v, v2]), torch.cat([positions, at])
        q = self.linear(p + "self_attn.q_proj", self.norm(p + "input_layernorm", x)).view(len(x), -1, self.C)
        if p + "self_attn.q_norm.weight" in self.w:
            q = self.norm(p + "self_attn.q_norm", q)
        q = self.rope(q, positions, layer)
        scale = (self.c.query_pre_attn_scalar if self.kind == "gemma3_text" else self.C) ** -0.5
        distance = positions[:, None] - key_positions[None, :]
        times = positions if updating else self.times
        seen = times[:, None] >= (torch.cat([times, heard]) if extra else times)[None]
        if self.layer_kind(layer) == "sliding_attention":
            seen = seen & (distance < self.c.sliding_window)
        if not updating:
            hidden = [self.hidden(layer, which) for which in ("rows", "keys")]
            for number in hidden[0].nonzero()[:, 0].tolist() if len(hidden[0]) else ():
                seen[torch.arange(len(x)) != number, number] = False
            if extra and len(hidden[1]):
                seen[:, len(x) :] &= ~hidden[1]
            for ask, repeated in self.asks.items():
                seen[torch.arange(len(x)) != ask, ask] = False
                seen[ask, repeated] = False
        groups = q.shape[1] // k.shape[1]
        out, weights = [], []
        for head in range(q.shape[1]):
            score = q[:, head] @ k[:, head // groups].T * scale
            for number, (_, _, _, (bias, _), _) in enumerate(extra):
                score[:, len(x) + number] += bias[head % len(bias)]
            for number, bias in {} if updating else self.row_gates.items():
                score[:, number] += bias[layer][head % len(bias[layer])]
            weights.append(torch.softmax(score.masked_fill(~seen, -torch.inf), -1))
            out.append(weights[-1] @ v[:, head // groups])
        if not updating:
            self.weights[layer] = torch.stack(weights)
        return self.linear(p + "self_attn.o_proj", torch.cat(out, -1))

    def cross(self, layer, x, positions, clips):
        """Flamingo's block before a layer: rows hear all clips before them, or pass unchanged."""
        w, width = {k: v.double() for k, v in clips[0][0].items()}, self.C
        block = f"cross.{layer}."
        k, v, at, turns = [], [], [], []
        for _, _, time, a in clips:
            a = layer_norm(w, block + "audio_norm", a)
            k.append((a @ w[block + "k.weight"].T).view(len(a), -1, width))
            v.append((a @ w[block + "v.weight"].T).view(len(a), -1, width))
            at += [time] * len(a)
            turns += range(len(a))
        k, v = self.rope(torch.cat(k), torch.tensor(turns), layer), torch.cat(v)
        q = (layer_norm(w, block + "norm", x) @ w[block + "q.weight"].T).view(len(x), -1, width)
        seen = self.times[:, None] >= torch.tensor(at)[None]
        hidden = self.hidden(layer, "crossed")
        if len(hidden):
            seen = seen & ~hidden
        groups = q.shape[1] // k.shape[1]
        heads, weights = [], []
        for head in range(q.shape[1]):
            score = q[:, head] @ k[:, head // groups].T / math.sqrt(width)
            weights.append(torch.softmax(score.masked_fill(~seen, -1e30), -1))
            heads.append(weights[-1] @ v[:, head // groups])
        self.weights["crossed", layer] = torch.stack(weights) * seen.any(1)[:, None]
        y = x + torch.tanh(w[block + "gate"]) * (torch.cat(heads, -1) @ w[block + "out.weight"].T)
        f = layer_norm(w, block + "ffn.0", y) @ w[block + "ffn.1.weight"].T
        f = 0.5 * f * (1 + torch.erf(f / math.sqrt(2)))
        y = y + torch.tanh(w[block + "ffn_gate"]) * (f @ w[block + "ffn.3.weight"].T)
        return torch.where(seen.any(1, keepdim=True), y, x)

    def mlp(self, layer, x):
        p = f"model.layers.{layer}.mlp."
        gate = self.linear(p + "gate_proj", x)
        if self.gemma:
            gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate * torch.sigmoid(gate)
        return self.linear(p + "down_proj", gate * self.linear(p + "up_proj", x))

    def logits(self, scene):
        """Logits [text rows, vocabulary] of a scene's text, in order."""
        return self.every(scene)[torch.tensor([is_text for _, _, is_text in scene.rows])]

    def every(self, scene):
        """Logits [rows, vocabulary] of all rows, in order."""
        self.asks, self.row_gates, self.times = scene.asks, scene.row_gates, torch.tensor(scene.times)
        x = torch.stack([row.double() for row, _, _ in scene.rows])
        positions = torch.tensor([position for _, position, _ in scene.rows])
        for layer in range(self.c.num_hidden_layers):
            p = f"model.layers.{layer}."
            crossed = [clip for clip in scene.crossed if layer in clip[1]]
            for weights in {id(clip[0]): clip[0] for clip in crossed}.values():  # stream after stream
                x = self.cross(layer, x, positions, [clip for clip in crossed if clip[0] is weights])
            extra = list(scene.keys.get(layer, []))
            for i, (layers, u, at, turned, gates, times) in enumerate(scene.updated):
                if layer not in layers:
                    continue
                extra += zip(u, at.tolist(), turned.tolist(), [gates[layer]] * len(u), times.tolist(), strict=True)
                change = self.attention(layer, u, turned, [], updating=True)
                if self.kind == "gemma3_text":
                    change = self.norm(p + "post_attention_layernorm", change)
                scene.updated[i] = (layers, u + change, at, turned, gates, times)
            a = self.attention(layer, x, positions, extra)
            if self.kind == "gemma3_text":
                x = x + self.norm(p + "post_attention_layernorm", a)
                f = self.mlp(layer, self.norm(p + "pre_feedforward_layernorm", x))
                x = x + self.norm(p + "post_feedforward_layernorm", f)
            else:
                x = x + a
                x = x + self.mlp(layer, self.norm(p + "post_attention_layernorm", x))
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return self.norm("model.norm", x) @ head.T
