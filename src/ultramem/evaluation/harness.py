"""The tasks of lm-eval, and local ones that need no network, on any causal language model."""

import difflib
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partialmethod
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultramem.errors import ConfigError, DataError, UltraMemError
from ultramem.evaluation.mode import evaluating

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# lm-eval's own: its numbers come from these seeds, and from so many resamplings where a standard error has no formula.
_PYTHON_SEED, _OTHER_SEED = 0, 1234
_NUM_BOOTSTRAP_SAMPLES = 100_000

_NO_FILTER = "none"
_DEFINITION_ENDINGS = (".yaml", ".yml")
_KEPT_SECTIONS = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, ready to be asked again and again.

    Attributes:
        names: what was asked for: tasks, groups, tags and files, patterns resolved.
        loaded: lm-eval's "tasks", "groups" and "group_map".
        num_fewshot: examples before each question that the definitions ask for; None where they do not say.
    """

    names: tuple[str, ...]
    loaded: dict[str, Any]
    num_fewshot: dict[str, int | None]


@dataclass(frozen=True)
class TaskScore:
    """One number of one task or group.

    Attributes:
        task: name of the task.
        metric: name of the metric; followed by that of the filter where a task has filters.
        value: the number.
        stderr: its standard error as lm-eval computes it; None where it computes none.
        num_rows: questions asked.
        num_fewshot: examples put before each; None for a group whose tasks differ.
        version: of the task's definition.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_rows: int
    num_fewshot: int | None
    version: str


@dataclass(frozen=True)
class HarnessReport:
    """What lm-eval found.

    Attributes:
        scores: of every task and every group that has scores, groups before their tasks.
        subtasks: names of the tasks that count towards a group's score.
        num_requests: texts whose likelihood was asked.
        num_truncated: those of them that did not fit the model's positions: their beginning was cut off.
        raw: lm-eval's own results, without samples, prompts and a description of the machine.
    """

    scores: tuple[TaskScore, ...]
    subtasks: frozenset[str]
    num_requests: int
    num_truncated: int
    raw: dict[str, Any]

    def headline(self) -> list[TaskScore]:
        """The scores without those of the tasks that a group's score sums up."""
        return [score for score in self.scores if score.task not in self.subtasks]

    def to_dict(self) -> dict[str, Any]:
        """lm-eval's own results and what belongs to them, ready for JSON."""
        return {
            "lm_eval_version": metadata.version("lm_eval"),
            "num_requests": self.num_requests,
            "num_truncated": self.num_truncated,
            **self.raw,
        }


def load_tasks(names: Sequence[str]) -> LoadedTasks:
    """Find tasks and read their data.

    Args:
        names: tasks, groups or tags of lm-eval, offline tasks (`offline_…`), patterns of these such as `offline_*`, or
            paths of task definitions (.yaml).

    Returns:
        The tasks, for `run_tasks`.

    Raises:
        ConfigError: lm-eval is not installed, a name is unknown, or a task runs code or needs images.
        DataError: a task's data cannot be fetched or read.
    """
    from ultramem.evaluation.offline_tasks import offline_data_folder, offline_task_names

    if not names:
        raise ConfigError(f"no tasks are given. {_allowed()}")
    found = list(dict.fromkeys(name for given in names for name in _resolve(given)))
    if set(found) & set(offline_task_names()):
        offline_data_folder()  # shows its progress, which lm-eval's loading would hide
    # Reading lm-eval's own definitions takes seconds.
    manager = _task_manager(with_published=not all(_is_local(name) for name in found))
    with _as_lm_eval_does():
        try:
            loaded = manager.load(found)
        except UltraMemError:
            raise
        # The data set library, the hub and the tasks' own code raise what they like.
        except Exception as error:
            raise DataError(
                f"the tasks {', '.join(found)} cannot be loaded ({_first_line(error)}). Tasks of lm-eval fetch their "
                f"data from the Hugging Face hub; is this machine offline? Tasks that need no network after their "
                f"first use: {', '.join(offline_task_names())}."
            ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"the task {name} runs code that the model writes or shows it images: leave it out.")
    num_fewshot = {name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()}
    return LoadedTasks(tuple(found), dict(loaded), num_fewshot)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    with_errors: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> HarnessReport:
    """Ask a model the questions of tasks, and score the answers as lm-eval does.

    The model's mode and the random states of Python, NumPy and PyTorch are left as they were.

    Args:
        model: any causal language model of `transformers`.
        tokenizer: its tokenizer.
        tasks: from `load_tasks`.
        limit: ask only the first so many questions of each task; None for all.
        num_fewshot: examples before each question; None for what each task says. Tasks that say 0 keep it, as in
            lm-eval.
        batch_size: requests per forward pass.
        dtype: arithmetic of the matrix products (autocast when it is not float32).
        with_errors: whether to compute standard errors.
        progress: called with the numbers of answered and of known requests.

    Returns:
        The scores.

    Raises:
        ConfigError: a limit below 1, or more examples than a task has.
        DataError: a text is longer than the model's positions.
    """
    from lm_eval.evaluator import evaluate

    from ultramem.evaluation.harness_model import HarnessModel

    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value} must be at least {least}.")
    for name, task in tasks.loaded["tasks"].items():
        of_task = tasks.num_fewshot[name]
        _set_fewshot(task, of_task or 0 if num_fewshot is None or of_task == 0 else num_fewshot)
    with evaluating(model), _as_lm_eval_does(), torch.no_grad():
        harness_model = HarnessModel(model, tokenizer, batch_size=batch_size, dtype=dtype, progress=progress)
        raw = evaluate(
            harness_model,
            tasks.loaded,
            limit=limit,
            bootstrap_iters=_NUM_BOOTSTRAP_SAMPLES if with_errors else 0,
            log_samples=False,
        )
    raw = {key: raw[key] for key in _KEPT_SECTIONS if key in raw}
    raw["results"] = {name: _without_absent(numbers) for name, numbers in raw["results"].items()}
    summed_up = [group for group in tasks.loaded.get("groups", {}).values() if group.has_aggregation]
    subtasks = frozenset(task.task_name for group in summed_up for task in group.get_all_tasks())
    scores = _scores(tasks, raw)
    return HarnessReport(scores, subtasks, harness_model.num_requests, harness_model.num_truncated, raw)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | LoadedTasks,
    limit: int | None = None,
    **options: Any,
) -> dict[str, float]:
    """The scores of some tasks by "task/metric", for a training's log; without standard errors.

    Args:
        model: any causal language model of `transformers`, in any mode.
        tokenizer: its tokenizer.
        tasks: names, or tasks from `load_tasks`, which need not be read again.
        limit: ask only the first so many questions of each task; None for all.
        options: `num_fewshot`, `batch_size`, `dtype`, `progress` of `run_tasks`.

    Raises:
        ConfigError, DataError: see `load_tasks` and `run_tasks`.
    """
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks)
    report = run_tasks(model, tokenizer, loaded, limit=limit, with_errors=False, **options)
    return {f"{score.task}/{score.metric}": score.value for score in report.headline()}


def _resolve(name: str) -> list[str]:
    """The names that a pattern stands for; a file's path is its own name."""
    if name.endswith(_DEFINITION_ENDINGS) and not Path(name).is_file():
        raise ConfigError(f"there is no task definition '{name}'. {_allowed()}")
    if _is_local(name):
        return [name]
    for with_published in (False, True):
        if found := _task_manager(with_published).match_tasks([name]):
            return found
    known = _task_manager(with_published=True).all_tasks
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ConfigError(f"unknown task '{name}': {hint}{_allowed()}")


def _is_local(name: str) -> bool:
    """Whether a name that `_resolve` gave is an offline task or the path of a definition."""
    from ultramem.evaluation.offline_tasks import offline_task_names

    return name.endswith(_DEFINITION_ENDINGS) or name in offline_task_names()


def _allowed() -> str:
    from ultramem.evaluation.offline_tasks import offline_task_names

    return (
        f"Tasks that need no network after their first use: {', '.join(offline_task_names())}. With a network also any "
        f"name that `lm-eval ls tasks` lists, or the path of a task definition (.yaml)."
    )


@cache
def _task_manager(with_published: bool) -> "TaskManager":
    """lm-eval's index of tasks: the offline ones, and its own if wanted."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need the package lm-eval ({error}). Install it: pip install 'ultramem[eval]'"
        ) from error
    from ultramem.evaluation.offline_tasks import TASKS_FOLDER

    return TaskManager(include_path=TASKS_FOLDER, include_defaults=with_published)


def _set_fewshot(task: Any, num_fewshot: int) -> None:
    """Set a task's number of examples, and the seed by which they are drawn.

    Raises:
        ConfigError: the task has too few examples.
    """
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=_OTHER_SEED)
    sampler = getattr(task, "sampler", None)
    if sampler is not None and num_fewshot > 0:
        # A question is no example for itself.
        num_examples = len(sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
        if num_fewshot > num_examples:
            raise ConfigError(f"the task {task.task_name} has {num_examples} examples, {num_fewshot} cannot be given.")


def _without_absent(numbers: dict[str, Any]) -> dict[str, Any]:
    """A task's numbers with None where lm-eval writes "N/A"."""
    return {key: None if value == "N/A" else value for key, value in numbers.items()}


def _scores(tasks: LoadedTasks, raw: dict[str, Any]) -> tuple[TaskScore, ...]:
    scores = []
    for name in _in_order(tasks):
        numbers = raw["results"][name]
        group = tasks.loaded.get("groups", {}).get(name)
        leaves = [task.task_name for task in group.get_all_tasks()] if group else [name]
        shots = {raw["n-shot"][leaf] for leaf in leaves}
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                TaskScore(
                    task=name,
                    metric=metric if filter_name == _NO_FILTER else key,
                    value=float(value),
                    stderr=None if error is None else float(error),
                    num_rows=numbers["sample_len"],
                    num_fewshot=min(shots) if len(shots) == 1 else None,
                    version=str(raw["versions"].get(name)),
                )
            )
    return tuple(scores)


def _in_order(tasks: LoadedTasks) -> list[str]:
    """Names of all groups and tasks, as asked for, a group before what it holds."""
    groups = tasks.loaded.get("groups", {})
    order = []
    for name in [*tasks.names, *tasks.loaded["tasks"]]:
        if name in groups:
            order += [name, *(group.name for group in groups[name].get_all_groups())]
            order += [task.task_name for task in groups[name].get_all_tasks()]
        elif name in tasks.loaded["tasks"]:
            order.append(name)
    return list(dict.fromkeys(order))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _as_lm_eval_does() -> Iterator[None]:
    """lm-eval's random seeds while it works, and none of its bars and messages; then everything as it was before."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    bar_init = tqdm.__init__
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        tqdm.__init__ = partialmethod(bar_init, disable=True)
        # What it prints would stand among the results.
        with torch.random.fork_rng(), redirect_stdout(sys.stderr):
            random.seed(_PYTHON_SEED)
            np.random.seed(_OTHER_SEED)
            torch.manual_seed(_OTHER_SEED)
            yield
    finally:
        tqdm.__init__ = bar_init
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
