"""Small task definitions for lm-eval, with data made here: no network, no package."""

import json
from pathlib import Path

CAPITALS = {"Norway": "Oslo", "Sweden": "Stockholm", "Peru": "Lima", "Oman": "Muscat", "Chad": "N'Djamena"}
NUM_ROWS = 20

_DATA = """
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {folder}/rows.jsonl}}
  cache_dir: {folder}/cache
test_split: validation
fewshot_split: validation
metadata: {{version: 2.0}}
"""
_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_WORD = """
output_type: loglikelihood
doc_to_text: "{{prefix}}"
doc_to_target: " {{answer}}"
target_delimiter: ""
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
_TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
num_fewshot: 0
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
_WRITE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
_BODIES = {"choice": _CHOICE, "word": _WORD, "text": _TEXT, "write": _WRITE}


def write_tasks(folder: Path) -> dict[str, str]:
    """Write the data and one definition per kind of task; returns kind → path.

    The word task's prefix is empty in every other row.
    """
    rows = []
    for number in range(NUM_ROWS):
        country = list(CAPITALS)[number % len(CAPITALS)]
        question = f"{number}. The capital of {country} is"
        rows.append(
            {
                "question": question,
                "prefix": question if number % 2 else "",
                "answer": CAPITALS[country],
                "choices": list(CAPITALS.values()),
                "gold": number % len(CAPITALS),
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    paths = {}
    for kind, body in _BODIES.items():
        path = folder / f"{kind}.yaml"
        path.write_text(f"task: tiny_{kind}\n{_DATA.format(folder=folder)}{body}", encoding="utf-8")
        paths[kind] = str(path)
    return paths
