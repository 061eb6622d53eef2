"""Small folders in the layouts that data sets are published in, with real clips; every line written by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

Make = Callable[[Path], Path]

FAMILIES = ("bass", "flute", "synth_lead")


def clip(path: Path, seconds: float = 0.2) -> None:
    """Noise of its own for each name, as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    soundfile.write(path, np.random.default_rng(seed).normal(size=int(seconds * 16_000)) / 10, 16_000)


def text(path: Path, *lines: str) -> None:
    """A file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def esc50(root: Path) -> Path:
    rows = ("1-100-A-0,1,0,dog", "1-200-A-20,1,20,crying_baby", "2-300-B-30,2,30,door_wood_knock", "3-400-A-0,3,0,dog")
    lines = []
    for row in rows:
        name, fold, target, category = row.split(",")
        lines.append(f"{name}.wav,{fold},{target},{category},{target == '0'},{name.split('-')[1]},A")
        clip(root / "audio" / f"{name}.wav")
    text(root / "meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take", *lines)
    return root


def dcase2017(root: Path) -> Path:
    lines = (
        "-a_30.000_40.000.wav\t0.000\t4.500\tTrain horn",
        "-a_30.000_40.000.wav\t1.000\t10.000\tTrain",
        "b_0.000_10.000.wav\t2.000\t3.000\tAir horn, truck horn",
        "c_5.000_15.000.wav\t0.000\t10.000\tCar",
    )
    text(root / "metadata/groundtruth_strong_label_evaluation_set.csv", *lines)
    for name in ("Y-a_30.000_40.000.wav", "b_0.000_10.000.wav", "c_5.000_15.000.wav"):
        clip(root / "evaluation" / name)
    text(root / "metadata/groundtruth_weak_label_training_set.csv", "d_1.000_11.000.wav\t1.000\t11.000\tBus")
    clip(root / "training/d_1.000_11.000.wav")
    return root


def vggsound(root: Path) -> Path:
    text(
        root / "vggsound.csv",
        "---g-f_I2yQ,1,people marching,test",
        '--0PQM4-hqg,30,"waterfall burbling, splashing",train',
        "--56QUhyDQM,185,playing tennis,test",
    )
    clip(root / "audio/---g-f_I2yQ_000001.wav")
    clip(root / "audio/--0PQM4-hqg_000030.flac")
    clip(root / "audio/--56QUhyDQM_185.wav")
    return root


def fsd50k(root: Path) -> Path:
    tables = root / "FSD50K.ground_truth"
    text(
        tables / "vocabulary.csv",
        "0,Accelerating_and_revving_and_vroom,/m/07q2z82",
        "1,Dog,/m/0bt9lr",
        "2,Electric_guitar,/m/02sgy",
    )
    text(tables / "dev.csv", "fname,labels,mids,split", "64760,Electric_guitar,/m/02sgy,train", '16399,"Dog",/m/a,val')
    text(tables / "eval.csv", "fname,labels,mids", '37199,"Electric_guitar,Dog","/m/02sgy,/m/b"', "175151,Dog,/m/b")
    for name in ("dev_audio/64760", "dev_audio/16399", "eval_audio/37199", "eval_audio/175151"):
        clip(root / f"FSD50K.{name}.wav")
    return root


def gtzan(root: Path) -> Path:
    for genre in ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock"):
        clip(root / f"genres/{genre}/{genre}.00000.wav")
    clip(root / "genres/rock/rock.00001.wav")
    return root


def nsynth(root: Path) -> Path:
    for split in ("train", "test"):
        notes = {}
        for number, family in enumerate(FAMILIES):
            name = f"{family}_electronic_00{number}-0{split == 'train':d}0-127"
            notes[name] = {
                "instrument_family_str": family,
                "instrument_source_str": "electronic" if number else "acoustic",
                "pitch": 60 + number,
                "note_str": name,
            }
            clip(root / f"nsynth-{split}/audio/{name}.wav")
        text(root / f"nsynth-{split}/examples.json", json.dumps(notes))
    return root


def audiocaps(root: Path) -> Path:
    heading = "audiocap_id,youtube_id,start_time,caption"
    text(root / "train.csv", heading, "91139,r1nicOVtvkQ,130,A woman talks nearby as water pours")
    text(
        root / "test.csv",
        heading,
        "103549,7fmOlUlwoNg,20,Constant rattling noise and sharp vibrations",
        '103548,7fmOlUlwoNg,20,"A rocket flies by, followed by an explosion"',
        "103541,6BJ455B1aAs,0,A dog barks",
    )
    clip(root / "audio/train/r1nicOVtvkQ_130.wav")
    clip(root / "audio/test/Y7fmOlUlwoNg.wav")
    clip(root / "audio/test/6BJ455B1aAs.flac")
    return root


def clotho(root: Path) -> Path:
    heading = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    for split, name in (("development", "Distorted AM Radio noise.wav"), ("evaluation", "01 A pug struggles.wav")):
        captions = ",".join(f'"Caption {number} of {split}, with a comma."' for number in range(1, 6))
        text(root / f"clotho_captions_{split}.csv", heading, f"{name},{captions}")
        clip(root / split / name)
    clip(root / "evaluation/rain.wav")
    with (root / "clotho_captions_evaluation.csv").open("a", encoding="utf-8") as file:
        file.write("rain.wav,Rain falls.,It rains.,Rain on a roof.,Heavy rain.,Water drips.\n")
    return root


def clothoaqa(root: Path) -> Path:
    heading = "file_name,QuestionText,answer,confidence"
    text(
        root / "clotho_aqa_test.csv",
        heading,
        *("a.wav,Is there a dog?,yes,yes", "a.wav,Is there a dog?,Yes,yes", "a.wav,Is there a dog?,yes,maybe"),
        *("a.wav,What barks?,dog,yes", "a.wav,What barks?,dog,yes", "a.wav,What barks?,animal,no"),
        *("b.wav,How many?,two,no", "b.wav,How many?,three,no", "b.wav,How many?,four,no"),
        *("b.wav,What is heard?,rain,yes", "b.wav,What is heard?,rain,yes", "b.wav,What is heard?,rain,yes"),
    )
    text(root / "clotho_aqa_train.csv", heading, *["a.wav,Is it loud?,no,yes"] * 3)
    for name in ("a", "b"):
        clip(root / f"audio_files/{name}.wav")
    return root


def musiccaps(root: Path) -> Path:
    columns = (
        "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval"
    )
    text(
        root / "musiccaps-public.csv",
        columns,
        '-0Gj8-vB1q4,30,40,"/m/0140xf","[\'low quality\']","The song is slow, sad.",4,False,True',
        '-0SdAVK79lg,30,40,"/m/0155w","[\'guitar song\']","This song features a guitar.",0,False,False',
        '-0vPFx-wRRI,30,40,"/m/025_jnm","[\'fast\']","A fast drum solo.",0,False,True',
    )
    clip(root / "audio/[-0Gj8-vB1q4]-[30-40].wav")
    clip(root / "audio/-0vPFx-wRRI.wav")
    clip(root / "audio/-0SdAVK79lg.wav")
    return root


def librispeech(root: Path) -> Path:
    base = root / "LibriSpeech"
    text(
        base / "test-clean/1089/134686/1089-134686.trans.txt",
        "1089-134686-0000 HE HOPED THERE WOULD BE STEW FOR DINNER",
        "1089-134686-0001 STUFF IT INTO YOU HIS BELLY COUNSELLED HIM",
    )
    text(base / "train-clean-100/19/198/19-198.trans.txt", "19-198-0000 NORTHANGER ABBEY")
    for name in (
        "test-clean/1089/134686/1089-134686-0000",
        "test-clean/1089/134686/1089-134686-0001",
        "train-clean-100/19/198/19-198-0000",
    ):
        clip(base / f"{name}.flac")
    return root


def mmau(root: Path) -> Path:
    items = [
        {
            "id": "3fe64f3d",
            "audio_id": "./test-mini-audios/3fe64f3d.wav",
            "question": "What was the last sound in the sequence?",
            "choices": ["dog", "a car horn", "rain", "footsteps"],
            "answer": "a car horn",
            "dataset": "d",
            "task": "sound",
            "split": "test-mini",
            "category": "Information Extraction",
            "sub-category": "Temporal Event Reasoning",
            "difficulty": "easy",
        },
        {
            "id": "4a",
            "audio_id": "./test-mini-audios/4a.wav",
            "question": "Which one speaks {first}?",
            "choices": ["a man", "a woman"],
            "answer": "a man",
            "dataset": "d",
            "task": "speech",
            "split": "test-mini",
            "category": ["Reasoning", "Information Extraction"],
            "sub-category": "Speaker",
            "difficulty": "hard",
        },
    ]
    text(root / "mmau-test-mini.json", json.dumps(items))
    for item in items:
        clip(root / item["audio_id"])
    return root


def mmar(root: Path) -> Path:
    item = {
        "id": "abc_00-01",
        "audio_path": "./audio/abc_00-01.wav",
        "question": "How many people are there?",
        "choices": ["Two", "Three"],
        "answer": "Two",
        "modality": "speech",
        "category": "Semantic Layer",
        "sub-category": "Counting",
        "language": "en",
        "source": "youtube",
        "url": "u",
        "timestamp": "00:01",
    }
    text(root / "MMAR-meta.json", json.dumps([item, {**item, "id": "d", "audio_path": "./audio/d.wav"}]))
    clip(root / "audio/abc_00-01.wav")
    clip(root / "audio/d.wav")
    return root


def mmsu(root: Path) -> Path:
    item = {
        "id": "accent_1",
        "task_name": "accent_identification",
        "audio_path": "audio/accent_1.wav",
        "question": "Which accent is it?",
        "choice_a": "Scottish",
        "choice_b": "Indian",
        "choice_c": "American",
        "choice_d": "Irish",
        "answer_gt": "Indian",
        "category": "Perception",
        "sub-category": "Paralinguistics",
        "sub-sub-category": "Speaker Traits",
    }
    other = {
        **item,
        "id": "accent_2",
        "audio_path": "audio/accent_2.wav",
        "answer_gt": "Irish",
        "category": "Reasoning",
    }
    text(root / "question/mmsu.jsonl", json.dumps(item), json.dumps(other))
    clip(root / "audio/accent_1.wav")
    clip(root / "audio/accent_2.wav")
    return root


def air_bench(root: Path) -> Path:
    item = {
        "path": "1.wav",
        "question": "What is the emotion?",
        "choice_a": "anger",
        "choice_b": "joy",
        "choice_c": "fear",
        "choice_d": "sadness",
        "answer_gt": "joy",
        "task_name": "Speaker_Emotion_Recognition",
        "dataset_name": "meld",
        "uniq_id": 0,
    }
    grounding = {
        **{key: value for key, value in item.items() if key not in ("choice_c", "choice_d")},
        "task_name": "Audio_Grounding",
        "dataset_name": "AudioGrounding",
        "path": "2.wav",
        "uniq_id": 7,
    }
    text(root / "Foundation_meta.json", json.dumps([item, grounding]))
    clip(root / "Speaker_Emotion_Recognition_meld/1.wav")
    clip(root / "Audio_Grounding_AudioGrounding/2.flac")
    return root


def muchomusic(root: Path) -> Path:
    heading = (
        "question,correct_answer,distractor_1_answer,distractor_2_answer,distractor_3_answer,"
        "music_knowledge,music_reasoning,genre,dataset,dataset_identifier"
    )
    text(
        root / "muchomusic.csv",
        heading,
        "What drives the beat?,Drums,Bossa nova,Flute,Choir,\"['instrumentation', 'metre and rhythm']\",,Reggae,sdd,415600.json",
        "Which mood?,Calm,Angry,Happy,Eerie,,\"['mood and expression']\",,musiccaps,-0Gj8_vB1q4_3.json",
    )
    text(root / "sdd/song_describer.csv", "caption_id,track_id,caption,path", "1,415600,words,00/415600.mp3")
    clip(root / "sdd/audio/00/415600.2min.flac")
    text(root / "musiccaps/musiccaps-public.csv", "ytid,start_s,end_s,caption", "-0Gj8_vB1q4,30,40,words")
    clip(root / "musiccaps/audio/[-0Gj8_vB1q4]-[30-40].wav")
    return root


BENCHMARKS: dict[str, Make] = {
    make.__name__: make
    for make in (
        *(esc50, dcase2017, vggsound, fsd50k, gtzan, nsynth, audiocaps, clotho, clothoaqa, musiccaps, librispeech),
        *(mmau, mmar, mmsu, air_bench, muchomusic),
    )
}
"""Name of the benchmark -> what makes its folder."""
