import json

import pytest
import torch
from PIL import Image

from ultramem.errors import DataError
from ultramem.evaluation import plots


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_usage_is_sorted_and_relative_to_the_mean():
    lines = lines_of(plots.plot_usage([torch.tensor([0, 4, 1, 3]), torch.tensor([2, 2, 2, 2])]))
    uneven = lines["memory 0: 75 % of 4 slots read"]
    assert list(uneven.get_ydata()) == [2.0, 1.5, 0.5]
    assert list(uneven.get_xdata()) == [12.5, 37.5, 62.5]
    assert list(lines["memory 1: 100 % of 4 slots read"].get_ydata()) == [1, 1, 1, 1]


def test_recall_has_a_bar_per_model_and_relation():
    def report(value):
        one = {"mean_reciprocal_rank": value, "mean_reciprocal_rank_error": 0.01, "chance_reciprocal_rank": 0.02}
        return {"relations": {"capital": one, "time_zone": {**one, "mean_reciprocal_rank": value / 2}}}

    axes = plots.plot_recall({"memory": report(0.4), "dense": report(0.2)}).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.4, 0.2, 0.2, 0.1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["capital", "time zone"]


def test_a_figure_is_saved_whole(tmp_path):
    plots.save(plots.plot_usage([torch.tensor([1, 2])]), tmp_path / "usage.png")
    with Image.open(tmp_path / "usage.png") as image:
        image.load()
        assert min(image.size) > 300
    assert [file.name for file in tmp_path.iterdir()] == ["usage.png"]


def write(tmp_path, *rows, end="\n"):
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows) + end)
    return file


def test_metrics_are_read_by_name(tmp_path):
    rows = [{"step": step, plots.TRAIN_LOSS: 5.0 - step} for step in (1, 2)]
    rows[1] |= {plots.VALIDATION_LOSS: 3.5}
    metrics = plots.load_metrics(write(tmp_path, *rows))
    assert plots.series(metrics, plots.TRAIN_LOSS) == ([1, 2], [4.0, 3.0])
    assert plots.series(metrics, plots.VALIDATION_LOSS) == ([2], [3.5])


@pytest.mark.parametrize("torn", ['{"step": 3, "a', '{"step": 3, "train/CE loss": 1.', "{"])
def test_a_line_that_a_kill_tore_is_left_out(tmp_path, torn):
    metrics = plots.load_metrics(write(tmp_path, {"step": 1}, {"step": 2}, torn, end=""))
    assert [row["step"] for row in metrics] == [1, 2]


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path):
    metrics = plots.load_metrics(write(tmp_path, {"step": 1}, {"step": 2}, end=""))
    assert [row["step"] for row in metrics] == [1, 2]


def test_a_resumed_run_replaces_the_steps_that_it_abandoned(tmp_path):
    first = [{"step": step, "loss": 1.0} for step in (10, 20, 30, 40)]
    second = [{"step": step, "loss": 2.0} for step in (20, 25)]
    metrics = plots.load_metrics(write(tmp_path, *first, *second))
    assert plots.series(metrics, "loss") == ([10, 20, 25], [1.0, 2.0, 2.0])


@pytest.mark.parametrize("content", [None, '{"step": 1}\nnot json\n', "[1, 2]\n", '{"loss": 1}\n', '"step"\n'])
def test_a_file_that_holds_no_metrics_is_named(tmp_path, content):
    file = tmp_path / "metrics.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl .*Name the folder of a run"):
        plots.load_metrics(file)
