import json

import pytest
import torch
from PIL import Image

from ultramem.errors import DataError
from ultramem.evaluation import plots


def make_metrics(offset=0.0):
    rows = []
    for step in range(10, 110, 10):
        row = {"step": step, plots.TOKENS: step * 1000, plots.TRAIN_LOSS: 8 - step / 20 + offset}
        if step % 50 == 0:
            row |= {plots.VALIDATION_LOSS: 8.5 - step / 20 + offset}
            row |= {
                "memory/0/value_coverage": step / 200,
                "memory/10/value_coverage": 0.5,
                "memory/2/value_coverage": 0.25,
            }
        rows.append(row)
    return rows


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_losses_are_drawn_over_tokens():
    lines = lines_of(plots.plot_losses({"memory": make_metrics(), "dense": make_metrics(0.5)}))
    assert set(lines) == {"memory, training", "memory, validation", "dense, training", "dense, validation"}
    assert list(lines["dense, validation"].get_xdata()) == [0.05, 0.1]
    assert list(lines["dense, validation"].get_ydata()) == [6.5, 4.0]
    assert len(lines["memory, training"].get_xdata()) == 10


def test_a_run_without_validation_has_one_line():
    metrics = [{key: value for key, value in row.items() if key != plots.VALIDATION_LOSS} for row in make_metrics()]
    assert set(lines_of(plots.plot_losses({"memory": metrics}))) == {"memory, training"}


def test_coverage_is_drawn_per_memory_in_order():
    lines = lines_of(plots.plot_coverage(make_metrics()))
    assert list(lines) == ["memory 0", "memory 2", "memory 10"]
    assert list(lines["memory 0"].get_xdata()) == [50, 100]
    assert list(lines["memory 0"].get_ydata()) == [25, 50]


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
    plots.save(plots.plot_losses({"memory": make_metrics()}), tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        image.load()
        assert min(image.size) > 300
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_metrics_are_read_by_name(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_metrics()))
    assert plots.series(plots.load_metrics(file), plots.VALIDATION_LOSS) == ([50, 100], [6.0, 3.5])


@pytest.mark.parametrize("content", [None, '{"step": 1}\nnot json\n', "[1, 2]\n"])
def test_a_file_that_holds_no_metrics_is_named(tmp_path, content):
    file = tmp_path / "metrics.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl .*Name the folder of a run"):
        plots.load_metrics(file)
