"""The corpus: every container, codec, depth, rate and number of channels that the installed programs write.

Sounds are a fraction of a second. Files of `soundfile` are always made; those of sox, ffmpeg, lame, twolame, flac, opusenc
and oggenc where the program is there. `wild` makes of them what is found in the world.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from tests.audio.corpus import wild

_SUFFIX = {"AIFF": "aiff", "MP3": "mp3", "OGG": "ogg", "WAVEX": "wav", "RF64": "wav", "NIST": "sph", "SVX": "8svx"}
_SCARCE = ("AVR", "HTK", "IRCAM", "MAT4", "MAT5", "MPC2K", "PAF", "PVF", "SDS", "SVX", "VOC", "WVE", "XI")
"""Formats that are hardly met; each subtype is made once."""
_UNSEEN = ("SD2",)
"""Formats that need a second file."""
_SOX = {
    "wav": "-b 8|-b 16|-b 24|-b 32|-e floating-point -b 32|-e floating-point -b 64|-e a-law|-e mu-law|-e ms-adpcm"
    "|-e ima-adpcm|-e gsm-full-rate -r 8000 -c 1|-b 16 -B",
    "aiff": "-b 8|-b 16|-b 24|-b 32",
    "aifc": "-b 8|-b 16|-b 24|-b 32",
    "au": "-b 8|-b 16|-b 24|-b 32|-e floating-point -b 32|-e a-law|-e mu-law",
    "caf": "-b 8|-b 16|-b 24|-b 32|-e floating-point -b 32|-e a-law|-e mu-law",
    "w64": "-b 8|-b 16|-b 24|-b 32|-e floating-point -b 32",
    "sph": "-b 8|-b 16|-b 24|-b 32|-e mu-law|-e a-law",
    "flac": "-b 8|-b 16|-b 24",
    "ogg": "-C -1|-C 3|-C 10",
    "mp3": "-C 64|-C 128.2|-C -4.5",
    "wv": "-b 16|-b 24",
    "voc": "-b 8|-b 16",
    "8svx": "-b 8 -c 1",
    "ircam": "-b 16",
    "paf": "-b 16",
    "pvf": "-b 16",
    "avr": "-b 16",
    "htk": "-b 16 -c 1",
}
_FFMPEG = {
    "wav": "-c:a pcm_u8|-c:a pcm_s16le|-c:a pcm_s24le|-c:a pcm_s32le|-c:a pcm_f32le|-c:a pcm_f64le|-c:a pcm_alaw"
    "|-c:a pcm_mulaw|-c:a adpcm_ms|-c:a adpcm_ima_wav|-c:a libmp3lame|-c:a mp2|-rf64 always|-write_bext 1|-c:a g726 -ar 8000 -ac 1"
    "|-c:a pcm_s16le -ac 6|-c:a adpcm_swf|-c:a adpcm_yamaha|-c:a ac3|-c:a flac|-metadata title=odd|-write_peak on",
    "w64": "-c:a pcm_u8|-c:a pcm_s16le|-c:a pcm_s24le|-c:a pcm_f32le|-c:a pcm_alaw",
    "aiff": "-c:a pcm_s8|-c:a pcm_s16be|-c:a pcm_s16le|-c:a pcm_s24be|-c:a pcm_s32be|-c:a pcm_f32be|-c:a pcm_f64be"
    "|-c:a pcm_alaw|-c:a pcm_mulaw|-c:a adpcm_ima_qt|-metadata title=odd -write_id3v2 1",
    "au": "-c:a pcm_s8|-c:a pcm_s16be|-c:a pcm_s24be|-c:a pcm_s32be|-c:a pcm_f32be|-c:a pcm_f64be|-c:a pcm_alaw"
    "|-c:a pcm_mulaw|-metadata title=odd|-c:a adpcm_g722 -ar 16000 -ac 1",
    "caf": "-c:a pcm_s8|-c:a pcm_s16be|-c:a pcm_s16le|-c:a pcm_s24le|-c:a pcm_s32be|-c:a pcm_f32le|-c:a pcm_f64be"
    "|-c:a pcm_alaw|-c:a pcm_mulaw|-c:a alac|-c:a adpcm_ima_qt|-c:a aac",
    "flac": "-c:a flac|-c:a flac -sample_fmt s32|-c:a flac -frame_size 100",
    "mp3": "-b:a 64k|-q:a 5|-write_xing 0|-id3v2_version 3 -write_id3v1 1 -metadata title=x|-ar 8000|-ar 22050",
    "mp2": "-b:a 64k|-b:a 192k",
    "ogg": "-c:a libvorbis|-c:a flac|-c:a libopus -ar 48000",
    "opus": "-c:a libopus -b:a 16k|-c:a libopus -b:a 96k -application voip|-c:a libopus -b:a 24k -frame_duration 60",
    "m4a": "-c:a aac|-c:a alac|-c:a aac -movflags +faststart",
    "mp4": "-c:a aac|-c:a libmp3lame",
    "mov": "-c:a pcm_s16be|-c:a aac",
    "aac": "-c:a aac",
    "webm": "-c:a libopus|-c:a libvorbis",
    "mka": "-c:a flac|-c:a pcm_s16le|-c:a libmp3lame",
    "wma": "-c:a wmav2",
    "tta": "-c:a tta",
    "wv": "-c:a wavpack",
    "ac3": "-c:a ac3",
}
_FFMPEG_PIPES = {
    "wav": "-f wav|-f wav -c:a pcm_s24le|-f wav -rf64 auto",
    "flac": "-f flac",
    "w64": "-f w64",
    "caf": "-f caf",
    "au": "-f au",
    "mp3": "-f mp3",
    "ogg": "-f ogg",
}
_LAME = "-b 32|-b 128|-V 2|-V 9|--abr 90|-t -b 64|-m m|-m j|-m s|--resample 8|--resample 16|--resample 24|--resample 48"
_LAME += "|--free -b 100|--tt title --add-id3v2|--tt title --id3v1-only|--crc -b 96|-t -V 4|--nores -b 128"
_TWOLAME = "-b 32 -m mono|-b 128|-b 192 -m joint|-v|-b 160 -p|-b 384"
_FLAC = "-0|-8|--ogg --no-padding|-8 --lax --blocksize=1000|--no-padding|-T TITLE=x --padding=5000|--sample-rate=12345 --force-raw-format"
_OPUS = "--bitrate 6|--bitrate 64|--bitrate 256|--framesize 2.5|--framesize 60|--downmix-mono|--hard-cbr --bitrate 32"
_OGGENC = "-q -1|-q 3|-q 10|--downmix|--resample 8000|-b 64 --managed"


def sound(rate: int, channels: int, seconds: float) -> np.ndarray:
    """Two tones and some noise, different in each channel, not too loud for any codec: float64 [N, channels]."""
    time_N = np.arange(round(rate * seconds)) / rate
    noise_NC = np.random.default_rng(rate + channels).standard_normal((len(time_N), channels))
    tones = [np.sin(2 * np.pi * (300 + 90 * c) * time_N) + np.sin(2 * np.pi * 1100 * time_N) for c in range(channels)]
    return 0.2 * np.stack(tones, 1) + 0.02 * noise_NC


def generate(folder: Path, seconds: float = 0.3, every: int = 1) -> list[Path]:
    """Write the corpus into a folder; what cannot be written (a rate that a codec lacks) is left out.

    Args:
        folder: where to.
        seconds: length of a sound.
        every: run every so-manieth command only; 0 for none.
    """
    paths = [path for path in _by_soundfile(folder, seconds) if path.exists()]
    for bits in (4, 8, 12, 16, 20, 24, 32):
        paths.append(folder / f"valid_{bits}.wav")
        paths[-1].write_bytes(_extensible(sound(16_000, 1, seconds), 16_000, bits))
    if every:
        source = {}
        for rate, channels in ((16_000, 1), (44_100, 2)):
            source[rate] = folder / f"source_{rate}.wav"
            soundfile.write(source[rate], sound(rate, channels, seconds), rate, subtype="PCM_16")
        commands = [command for command in _commands(folder, source) if shutil.which(command[1][0])]
        paths += [path for path, command in commands[::every] if _made(path, command)]
    return sorted(paths + wild.variations(folder, paths))


def _by_soundfile(folder: Path, seconds: float) -> Iterator[Path]:
    for format in soundfile.available_formats():
        if format in ("RAW", *_UNSEEN):
            continue
        for subtype in soundfile.available_subtypes(format):
            for rate, channels in ((16_000, 1), (44_100, 2), (8_000, 1)):
                for endian in ("FILE", "LITTLE", "BIG"):
                    name = f"soundfile_{format}_{subtype}_{rate}_{endian.lower()}.{_SUFFIX.get(format, format.lower())}"
                    if not soundfile.check_format(format, subtype, endian) or (rate != 16_000 and endian != "FILE"):
                        continue
                    if format in _SCARCE and (endian != "FILE" or rate != (8_000 if format == "WVE" else 16_000)):
                        continue
                    try:
                        soundfile.write(
                            folder / name, sound(rate, channels, seconds), rate, subtype, endian=endian, format=format
                        )
                        yield folder / name
                    except soundfile.SoundFileError:
                        (folder / name).unlink(missing_ok=True)


def _commands(folder: Path, source: dict[int, Path]) -> Iterator[tuple[Path, list[str]]]:
    """(path, command that writes it, or that writes to its output)."""
    for rate, wav in source.items():

        def name(program: str, number: int, suffix: str, rate: int = rate) -> Path:
            return folder / f"{program}_{number:02}_{rate}.{suffix}"

        for suffix, kinds in _SOX.items():
            for number, options in enumerate(kinds.split("|")):
                path = name("sox", number, suffix)
                yield path, ["sox", "-V1", "-D", str(wav), *options.split(), str(path)]
        for suffix, kinds in _FFMPEG.items():
            for number, options in enumerate(kinds.split("|")):
                path = name("ffmpeg", number, suffix)
                yield (
                    path,
                    ["ffmpeg", "-v", "quiet", "-y", "-i", str(wav), "-strict", "-2", *options.split(), str(path)],
                )
        for suffix, kinds in _FFMPEG_PIPES.items():
            for number, options in enumerate(kinds.split("|")):
                yield name("stream", number, suffix), ["ffmpeg", "-v", "quiet", "-i", str(wav), *options.split(), "-"]
        for suffix in ("wav", "aiff", "au", "w64"):
            yield name("soxstream", 0, suffix), ["sox", "-V1", str(wav), "-t", suffix, "-"]
        for number, options in enumerate(_LAME.split("|")):
            path = name("lame", number, "mp3")
            yield path, ["lame", "--quiet", *options.split(), str(wav), str(path)]
        for number, options in enumerate(_TWOLAME.split("|")):
            path = name("twolame", number, "mp2")
            yield path, ["twolame", "--quiet", *options.split(), str(wav), str(path)]
        for number, options in enumerate(_FLAC.split("|")):
            path = name("flac", number, "oga" if "ogg" in options else "flac")
            if "raw" in options:
                options += " --endian=little --sign=signed --channels=1 --bps=16"
            yield path, ["flac", "-s", "-f", *options.split(), "-o", str(path), str(wav)]
        for bits in (4, 8, 12, 16, 20, 24, 32):
            path = name("flacbits", bits, "flac")
            yield path, ["flac", "-s", "-f", "--no-padding", "-o", str(path), str(folder / f"valid_{bits}.wav")]
        for number, options in enumerate(_OPUS.split("|")):
            path = name("opusenc", number, "opus")
            yield path, ["opusenc", "--quiet", *options.split(), str(wav), str(path)]
        for number, options in enumerate(_OGGENC.split("|")):
            path = name("oggenc", number, "ogg")
            yield path, ["oggenc", "-Q", *options.split(), "-o", str(path), str(wav)]


def _extensible(sound_NC: np.ndarray, rate: int, bits: int) -> bytes:
    """A WAV whose samples have `bits` valid bits in the upper part of whole bytes."""
    width = -(-bits // 8)
    values_N = np.round(sound_NC[:, 0] * (2 ** (bits - 1) - 1)).astype(np.int64) << 8 * width - bits
    values_N += 128 * (width == 1)
    data = values_N.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    fmt = struct.pack("<HHIIHHHHIH", 0xFFFE, 1, rate, rate * width, width, 8 * width, 22, bits, 4, 1)
    fmt += bytes.fromhex("0000 0000 1000 8000 00aa 0038 9b71")
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _made(path: Path, command: list[str]) -> bool:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    if done.returncode == 0 and not path.exists():
        path.write_bytes(done.stdout)
    if done.returncode != 0 or path.stat().st_size == 0:
        path.unlink(missing_ok=True)
        return False
    return True


SUBSET = """
    sox_08_16000.wav sox_09_16000.wav sox_10_16000.wav sox_00_16000.aifc sox_01_16000.au sox_00_16000.voc
    sox_01_16000.voc sox_00_16000.8svx sox_00_16000.avr sox_04_16000.sph sox_01_16000.wv
    ffmpeg_10_16000.wav ffmpeg_11_16000.wav ffmpeg_12_16000.wav ffmpeg_08_16000.wav ffmpeg_09_16000.wav
    ffmpeg_02_16000.aiff ffmpeg_09_16000.aiff ffmpeg_09_16000.caf ffmpeg_00_16000.m4a
    ffmpeg_01_16000.m4a ffmpeg_00_16000.aac ffmpeg_00_16000.webm ffmpeg_00_16000.mka ffmpeg_01_16000.ogg
    ffmpeg_00_16000.mp2 ffmpeg_02_16000.mp3 stream_00_16000.wav stream_00_16000.au stream_00_16000.caf
    soxstream_00_16000.wav soxstream_00_16000.aiff lame_02_16000.mp3 lame_05_16000.mp3 lame_15_16000.mp3
    twolame_01_44100.mp2 flac_02_16000.oga flacbits_04_16000.flac flacbits_12_16000.flac flacbits_20_16000.flac
    flacbits_32_16000.flac opusenc_01_16000.opus opusenc_03_16000.opus opusenc_04_16000.opus oggenc_01_16000.ogg
"""
"""Files that tests find in `files` where the programs are not: made with sounds of 0.1 s."""
