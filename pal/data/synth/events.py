"""Synthesis of each kind of event: one function per kind with random parameters, in numpy alone.

Each function takes a generator, a length in samples and a fundamental in Hz (musical kinds) and returns
[N] float64 at no particular level; `render` sets the level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pal.data.synth.waves import (
    RATE,
    Rng,
    Signal,
    add,
    angle,
    band,
    decay,
    harmonics,
    hits,
    peak,
    phase_of,
    seconds_of,
    shaped_noise,
    swell,
    wander,
)

# Musical kinds -----------------------------------------------------------------------------------------------


def partials_below(hz: float, most: int, limit: float = 7600.0) -> int:
    """Number of harmonics of `hz` below `limit` Hz, at most `most`."""
    return int(min(most, max(1, limit // hz)))


def piano(rng: Rng, n: int, hz: float) -> Signal:
    """Dark, slowly decaying strings after a soft hammer."""
    t, count = seconds_of(n), partials_below(hz, 9)
    stretch, fall, slope = rng.uniform(1e-4, 4e-4), rng.uniform(1.2, 2.2), rng.uniform(1.6, 2.1)
    x = np.zeros(n)
    for k in range(1, count + 1):
        string_N = np.sin(angle(hz * k * np.sqrt(1 + stretch * k**2) * t + rng.random()))
        x += k**-slope * decay(t, fall * (1 + 0.35 * k)) * string_N
    knock = shaped_noise(rng, n, band(80, 500)) * decay(t, 60) * 0.15
    return (x + knock) * swell(n, rng.uniform(0.004, 0.01), 0.08)


def guitar(rng: Rng, n: int, hz: float) -> Signal:
    """A bright pluck whose high partials die first, with the gaps that the plucking point leaves."""
    t, count = seconds_of(n), partials_below(hz, 24)
    place = rng.uniform(0.13, 0.28)
    k = np.arange(1, count + 1)
    weight_K = np.abs(np.sin(np.pi * k * place)) * k ** -rng.uniform(0.35, 0.6)
    bend_N = 1 + rng.uniform(0.004, 0.012) * decay(t, 12)
    # each partial decays a little faster than the one below it: powers of one curve
    envelope_N, faster_N = decay(t, rng.uniform(2.0, 3.5)), decay(t, rng.uniform(0.5, 0.9))
    angle_N, x = angle(phase_of(hz * bend_N, n)), np.zeros(n)
    for order, weight in zip(k, weight_K, strict=True):
        envelope_N = envelope_N * faster_N
        x += float(weight) * envelope_N * np.sin(np.float32(order) * angle_N)
    pick = shaped_noise(rng, n, band(2500, 7000)) * decay(t, 180) * 0.5
    return (x + pick) * swell(n, 0.002, 0.05)


def flute(rng: Rng, n: int, hz: float) -> Signal:
    """Nearly a pure tone with vibrato and breath, slow to start."""
    t = seconds_of(n)
    rate, depth = rng.uniform(4.5, 6.5), rng.uniform(0.006, 0.014)
    vibrato_N = np.sin(2 * np.pi * (rate * t + rng.random()))
    phase = phase_of(hz * (1 + depth * vibrato_N * np.clip(t * 4, 0, 1)), n)
    x = harmonics(phase, [1, rng.uniform(0.1, 0.25), rng.uniform(0.02, 0.08)]) * (1 + 0.2 * vibrato_N)
    breath = shaped_noise(rng, n, band(1500, 6000, 2)) * rng.uniform(0.025, 0.05)
    return (x + breath) * swell(n, rng.uniform(0.08, 0.14), rng.uniform(0.08, 0.15))


def organ(rng: Rng, n: int, hz: float) -> Signal:
    """Steady pipes in octaves and fifths, on and off at once."""
    ranks = np.zeros(partials_below(hz, 16))
    for k, low, high in ((1, 0.8, 1), (2, 0.6, 1), (3, 0.3, 0.6), (4, 0.5, 0.9), (6, 0.2, 0.5), (8, 0.4, 0.8)):
        if k <= len(ranks):
            ranks[k - 1] = rng.uniform(low, high)
    if len(ranks) >= 16:
        ranks[11], ranks[15] = rng.uniform(0.1, 0.3), rng.uniform(0.2, 0.4)
    detune = 1 + rng.uniform(0.001, 0.003)
    x = harmonics(phase_of(hz, n), ranks) + 0.5 * harmonics(phase_of(hz * detune, n), ranks[: len(ranks) // 2 + 1])
    return x * swell(n, rng.uniform(0.015, 0.03), rng.uniform(0.02, 0.05))


def bell(rng: Rng, n: int, hz: float) -> Signal:
    """Inharmonic partials of a struck bell around the strike note `hz`, with a metallic clang."""
    t, x = seconds_of(n), np.zeros(n)
    ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.51, 2.66, 3.01, 4.17, 5.43, 6.79, 8.21])
    weights = np.array([0.35, 1.0, 0.8, 0.35, 0.9, 0.4, 0.4, 0.45, 0.45, 0.4, 0.35, 0.3]) * rng.uniform(0.7, 1.2, 12)
    slow = rng.uniform(0.8, 1.4)
    for ratio, weight in zip(ratios * rng.uniform(0.995, 1.005, 12), weights, strict=True):
        if ratio * hz < 7600:
            # a bell is never quite round: a partial is two that beat
            tone_N = np.sin(angle(ratio * hz * t + rng.random()))
            if ratio < 2.6:
                tone_N += 0.3 * np.sin(angle((ratio * hz + rng.uniform(3, 8)) * t))
            x += float(weight) * decay(t, slow * ratio**0.6) * tone_N
    clang = shaped_noise(rng, n, band(3000, 7500)) * decay(t, 90) * 0.6
    return (x + clang) * swell(n, 0.002, 0.1)


# Signals and machines ----------------------------------------------------------------------------------------


def siren(rng: Rng, n: int, hz: float) -> Signal:
    """A tone that glides up and down over more than an octave."""
    t = seconds_of(n)
    low, high = rng.uniform(450, 650), rng.uniform(1300, 1800)
    turn = (rng.uniform(1.3, 2.6) * t + rng.random()) % 1.0
    curve = 1 - np.abs(2 * turn - 1) if rng.random() < 0.5 else 0.5 - 0.5 * np.cos(2 * np.pi * turn)
    x = harmonics(phase_of(low * (high / low) ** curve, n), [1, 0.3, 0.25, rng.uniform(0.05, 0.15)])
    return x * swell(n, 0.03, 0.05)


def alarm(rng: Rng, n: int, hz: float) -> Signal:
    """Short equal beeps of one high tone, with silence between."""
    t = seconds_of(n)
    on_N = (rng.uniform(4.5, 7.5) * t) % 1.0 < rng.uniform(0.45, 0.6)
    # edges of 2 ms, else the beeps click over the whole band
    edge_N = np.convolve(on_N, np.full(32, 1 / 32), "same")
    return harmonics(phase_of(rng.uniform(2000, 3200), n), [1, rng.uniform(0, 0.3)]) * edge_N


def telephone(rng: Rng, n: int, hz: float) -> Signal:
    """Rings that trill fast between two tones."""
    t = seconds_of(n)
    low = rng.uniform(700, 1000)
    trill = np.sin(2 * np.pi * rng.uniform(14, 20) * t) > 0
    phase = phase_of(np.where(trill, low * rng.uniform(1.22, 1.35), low), n)
    ring, pause = rng.uniform(0.32, 0.42), rng.uniform(0.1, 0.16)
    on = np.convolve(t % (ring + pause) < ring, np.full(96, 1 / 96), "same")
    return harmonics(phase, [1, 0.2, 0.5, 0.1, 0.25]) * on


def engine(rng: Rng, n: int, hz: float) -> Signal:
    """A buzzing row of low harmonics whose speed drifts."""
    idle = rng.uniform(45, 85)
    speed_N = idle * (1 + rng.uniform(-0.15, 0.35) * np.linspace(0, 1, n) + 0.06 * wander(rng, n, 4))
    phase = phase_of(speed_N, n)
    x = harmonics(phase, np.arange(1, 19) ** -0.7 * rng.uniform(0.4, 1.0, 18))
    stroke = 0.5 + 0.5 * np.sin(2 * np.pi * phase)
    return (x + shaped_noise(rng, n, band(150, 1800, 2)) * stroke * rng.uniform(0.4, 0.8)) * swell(n, 0.06, 0.08)


# Strokes -----------------------------------------------------------------------------------------------------


def knocking(rng: Rng, n: int, hz: float) -> Signal:
    """Quick dry knocks on wood."""
    x, length = np.zeros(n), int(0.07 * RATE)
    t = seconds_of(length)
    tones = rng.uniform(350, 600) * np.array([1, rng.uniform(1.6, 1.9), rng.uniform(2.4, 2.9)])
    for start in hits(rng, n, rng.uniform(4.5, 6.5), 0.1, 0.07):
        ring = sum(np.sin(2 * np.pi * f * t) * np.exp(-t * rng.uniform(80, 120)) for f in tones)
        click = shaped_noise(rng, length, band(600, 3000, 2)) * np.exp(-t * 400)
        add(x, (ring + click) * rng.uniform(0.75, 1.0), start)
    return x


def footsteps(rng: Rng, n: int, hz: float) -> Signal:
    """Slow steps: a dull heel, then a scrape."""
    x, length = np.zeros(n), int(0.26 * RATE)
    t = seconds_of(length)
    thud, scrape_at = rng.uniform(70, 110), rng.uniform(0.08, 0.11)
    for start in hits(rng, n, rng.uniform(2.4, 3.2), 0.08, 0.2):
        heel = np.sin(2 * np.pi * thud * t) * np.exp(-t * 45) + 0.3 * shaped_noise(
            rng, length, band(100, 900, 2)
        ) * np.exp(-t * 120)
        scrape = shaped_noise(rng, length, band(2500, 6500)) * np.exp(-(((t - scrape_at - 0.04) / 0.03) ** 2))
        add(x, heel * rng.uniform(0.8, 1.0) + 0.22 * scrape, start)
    return x


def clapping(rng: Rng, n: int, hz: float) -> Signal:
    """Two people's hands: sharp broad bursts around 1 to 4 kHz."""
    x, length = np.zeros(n), int(0.06 * RATE)
    t = seconds_of(length)
    rate = rng.uniform(3.6, 4.8)
    for _ in range(2):
        response = band(rng.uniform(800, 1200), rng.uniform(2500, 4000), 3)
        lag = int(rng.uniform(0, 0.05) * RATE)
        for start in hits(rng, n, rate, 0.15, 0.1):
            add(x, shaped_noise(rng, length, response) * np.exp(-t * rng.uniform(70, 110)), start + lag)
    return x


def drum(rng: Rng, n: int, hz: float) -> Signal:
    """A skin whose pitch falls after each beat, ringing on."""
    x, length = np.zeros(n), int(0.4 * RATE)
    t = seconds_of(length)
    base = rng.uniform(110, 170)
    glide = phase_of(base * (1 + rng.uniform(1.0, 1.6) * np.exp(-t * 22)), length)
    for start in hits(rng, n, rng.uniform(2.2, 4.0), 0.0, 0.25):
        skin = harmonics(glide, [1, 0.35, 0.12]) * np.exp(-t * rng.uniform(9, 13))
        stick = shaped_noise(rng, length, band(300, 5000, 2)) * np.exp(-t * 90) * 0.35
        add(x, (skin + stick) * rng.uniform(0.7, 1.0), start)
    return x * swell(n, 0.001, 0.05)


# Voices ------------------------------------------------------------------------------------------------------


def dog(rng: Rng, n: int, hz: float) -> Signal:
    """Barks: rough, short, rising at once and falling."""
    x, pitch = np.zeros(n), rng.uniform(320, 560)
    for start in hits(rng, n, rng.uniform(2.6, 3.6), 0.15, 0.18):
        length = int(rng.uniform(0.15, 0.2) * RATE)
        u = np.linspace(0, 1, length)
        phase = phase_of(pitch * rng.uniform(0.95, 1.05) * (0.7 + 0.6 * np.sin(np.pi * u**0.6)), length)
        mouth = np.exp(-(((np.arange(1, 9) * pitch - 1100) / 900) ** 2)) + 0.1
        voice = harmonics(phase, mouth) + shaped_noise(rng, length, band(600, 2800, 2)) * rng.uniform(0.5, 0.9)
        add(x, voice * np.sin(np.pi * u**0.5) ** 1.5 * rng.uniform(0.8, 1.0), start)
    return x


def cat(rng: Rng, n: int, hz: float) -> Signal:
    """One meow: a voice that rises and falls while the mouth opens and closes."""
    u = np.linspace(0, 1, n)
    base, rise = rng.uniform(420, 520), rng.uniform(1.35, 1.7)
    arch = np.sin(np.pi * u ** rng.uniform(0.6, 0.9))
    tremble = 1 + 0.01 * np.sin(2 * np.pi * rng.uniform(7, 11) * seconds_of(n))
    pitch_N = base * rise**arch * tremble
    mouth_N = 900 + rng.uniform(1200, 1800) * np.sin(np.pi * u**0.7) ** 2
    count = partials_below(base * rise, 9)
    off_KN = (np.arange(1, count + 1)[:, None] * pitch_N - mouth_N) / 900
    weights_KN = np.exp((-(off_KN**2)).astype(np.float32)) + 0.08
    return harmonics(phase_of(pitch_N, n), weights_KN) * np.sin(np.pi * u**0.7) ** 0.7


def bird(rng: Rng, n: int, hz: float) -> Signal:
    """Chirps: quick whistled sweeps between 2.5 and 7 kHz."""
    x = np.zeros(n)
    low, high = rng.uniform(2500, 3600), rng.uniform(4600, 6800)
    falls, bow = rng.random() < 0.5, rng.random() < 0.4
    for start in hits(rng, n, rng.uniform(5.5, 9.0), 0.25, 0.1):
        length = int(rng.uniform(0.06, 0.1) * RATE)
        u = np.linspace(0, 1, length)
        curve = np.sin(np.pi * u) if bow else (1 - u if falls else u)
        phase = phase_of(low + (high - low) * curve * rng.uniform(0.8, 1.0), length)
        add(x, np.sin(2 * np.pi * phase) * np.sin(np.pi * u) * rng.uniform(0.6, 1.0), start)
    return x


VOWELS = np.array([(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)])
"""First three formants in Hz of a, i, u, e, o (Peterson and Barney 1952, men)."""


def speech(rng: Rng, n: int, hz: float) -> Signal:
    """Babble: glottal pulses through the formants of changing vowels, with hissed consonants between."""
    x = np.zeros(n)
    voice = rng.uniform(95, 230)
    size = rng.uniform(1.0, 1.2) if voice > 160 else rng.uniform(0.9, 1.05)
    position = 0
    while position < n - 1200:
        length = int(rng.uniform(0.11, 0.2) * RATE)
        if rng.random() < 0.55:
            hiss = int(rng.uniform(0.04, 0.08) * RATE)
            add(x, shaped_noise(rng, hiss, band(3200, 7000)) * np.hanning(hiss) * 0.12, position)
            position += int(hiss * 0.8)
        pitch_N = voice * np.linspace(rng.uniform(0.9, 1.25), rng.uniform(0.8, 1.1), length)
        phase = phase_of(pitch_N, length)
        pulses = np.diff(np.floor(phase), prepend=-1.0)
        padded = 2048 if length < 1900 else 4096
        f = np.fft.rfftfreq(padded, 1 / RATE)
        formants = VOWELS[rng.integers(len(VOWELS))] * size * rng.uniform(0.95, 1.05, 3)
        response = sum(
            gain / (1 + ((f - at) / width) ** 2)
            for at, width, gain in zip(formants, (70, 90, 130), (1, 0.6, 0.3), strict=True)
        )
        vowel = np.fft.irfft(np.fft.rfft(pulses, padded) * response, padded)[:length]
        vowel /= np.sqrt(np.mean(vowel**2)) + 1e-12
        add(x, vowel * np.hanning(length) ** 0.6 * rng.uniform(0.6, 1.0), position)
        position += int(length * rng.uniform(0.95, 1.15))
    return x


# Weather and noise -------------------------------------------------------------------------------------------


def wind(rng: Rng, n: int, hz: float) -> Signal:
    """Howling: narrow noise whose centre wanders between 250 and 1000 Hz."""
    x, centre_N = np.zeros(n), 0.5 + 4.0 * wander(rng, n, 3)
    for i, centre in enumerate(np.geomspace(250, 1000, 6).tolist()):
        gust_N = np.exp(((centre_N - i) ** 2 / -1.2).astype(np.float32))
        x += shaped_noise(rng, n, peak(centre, 0.12 * centre)) * gust_N
    return x * swell(n, 0.15, 0.15)


def rain(rng: Rng, n: int, hz: float) -> Signal:
    """An even hiss above 2 kHz, with drops."""
    hiss = shaped_noise(rng, n, band(rng.uniform(2000, 3000), 9000, 2))
    drops = np.zeros(n)
    length = int(0.012 * RATE)
    t = seconds_of(length)
    for start in rng.integers(0, max(1, n - length), int(n / RATE * rng.uniform(25, 45))):
        drop = np.sin(2 * np.pi * rng.uniform(1500, 5000) * t) * np.exp(-t * 350)
        add(drops, drop * rng.uniform(0.5, 1.0), int(start))
    return (hiss + 3.0 * drops) * swell(n, 0.1, 0.12)


def static(rng: Rng, n: int, hz: float) -> Signal:
    """White noise over the whole band that breaks up like a bad radio."""
    steps = max(4, int(n / RATE * rng.uniform(22, 32)))
    levels = np.where(rng.random(steps) < 0.35, rng.uniform(0.03, 0.12, steps), rng.uniform(0.7, 1.0, steps))
    levels[0] = levels[-1] = 1.0
    return rng.standard_normal(n) * levels[np.arange(n) * steps // n]


def thunder(rng: Rng, n: int, hz: float) -> Signal:
    """A crack, then a rumble below 150 Hz that rolls away."""
    t = seconds_of(n)
    roll = (0.35 + 0.65 * wander(rng, n, 9)) * np.exp(-t * rng.uniform(0.6, 1.4))
    rumble = shaped_noise(rng, n, band(25, rng.uniform(110, 160), 3)) * roll
    crack = shaped_noise(rng, n, band(150, 2500, 1)) * np.exp(-t * rng.uniform(12, 20)) * rng.uniform(0.5, 0.9)
    return (rumble + crack) * swell(n, 0.004, 0.15)


@dataclass(frozen=True)
class SoundKind:
    """Class of synthetic sound: its label, its words in questions, and its synthesis."""

    name: str
    """The plain noun: label and answer."""
    some: str
    """Label with its article, as in "Is there a siren?"."""
    make: Callable[[Rng, int, float], Signal]
    caption: str
    """Words after article and adjective in captions, as in "a loud dog bark"."""
    shortest: float
    """Shortest event in seconds."""
    longest: float
    """Longest event in seconds."""
    musical: bool = False
    """Whether it has a pitch for questions."""
    plural: bool = False
    """Takes plural verbs, as in "When do the footsteps start?"."""
    countable: bool = True
    """Takes an article in captions."""


KINDS: dict[str, SoundKind] = {
    kind.name: kind
    for kind in (
        SoundKind("piano", "a piano", piano, "piano note", 0.7, 1.3, musical=True),
        SoundKind("guitar", "a guitar", guitar, "guitar note", 0.6, 1.2, musical=True),
        SoundKind("flute", "a flute", flute, "flute note", 0.6, 1.2, musical=True),
        SoundKind("organ", "an organ", organ, "organ note", 0.6, 1.2, musical=True),
        SoundKind("bell", "a bell", bell, "bell note", 0.7, 1.3, musical=True),
        SoundKind("siren", "a siren", siren, "siren", 0.8, 1.3),
        SoundKind("alarm", "an alarm", alarm, "alarm", 0.6, 1.2),
        SoundKind("telephone", "a telephone", telephone, "telephone ring", 0.7, 1.2),
        SoundKind("engine", "an engine", engine, "engine", 0.7, 1.3),
        SoundKind("knocking", "knocking", knocking, "knocking", 0.5, 1.0, countable=False),
        SoundKind("footsteps", "footsteps", footsteps, "footsteps", 0.8, 1.3, plural=True, countable=False),
        SoundKind("clapping", "clapping", clapping, "clapping", 0.6, 1.2, countable=False),
        SoundKind("drum", "a drum", drum, "drum", 0.5, 1.2),
        SoundKind("dog", "a dog", dog, "dog bark", 0.5, 1.1),
        SoundKind("cat", "a cat", cat, "cat meow", 0.6, 1.1),
        SoundKind("bird", "a bird", bird, "bird song", 0.5, 1.2),
        SoundKind("speech", "speech", speech, "speech", 0.7, 1.3, countable=False),
        SoundKind("wind", "wind", wind, "wind", 0.8, 1.3, countable=False),
        SoundKind("rain", "rain", rain, "rain", 0.7, 1.3, countable=False),
        SoundKind("static", "static", static, "static", 0.5, 1.1, countable=False),
        SoundKind("thunder", "thunder", thunder, "thunder", 0.8, 1.3, countable=False),
    )
}
"""Every kind of event by name; the names are the answers of "what" questions."""


def active_rms(x_N: Signal) -> float:
    """Rms over the 20 ms frames within 20 dB of the loudest, so that gaps between strokes do not count."""
    frame = RATE // 50
    frames = max(1, len(x_N) // frame)
    power_F = np.mean(x_N[: frames * frame].reshape(frames, -1) ** 2, axis=1)
    return float(np.sqrt(power_F[power_F >= power_F.max() / 100].mean()))


def render(kind: str, rng: Rng, seconds: float, level_db: float, hz: float = 0.0) -> Signal:
    """One event [N] of `seconds` at `level_db` dBFS (active rms); `hz` is the pitch of musical kinds."""
    n = round(seconds * RATE)
    x_N = KINDS[kind].make(rng, n, hz * rng.uniform(0.996, 1.004))  # never quite in tune
    edge = 48  # 3 ms, against clicks
    x_N[:edge] *= np.linspace(0, 1, edge)
    x_N[-edge:] *= np.linspace(1, 0, edge)
    return x_N * (10 ** (level_db / 20) / (active_rms(x_N) + 1e-12))
