"""Panels of made-up runs: which there are, and the lines in them."""

import math

import pytest
from matplotlib.colors import to_hex

from ultramem.errors import DataError
from ultramem.evaluation.plots import SPEED, TOKENS, TRAIN_LOSS, VALIDATION_LOSS
from ultramem.evaluation.run_plots import Run, check_axis, draw_panels, plot_losses, plot_memories, short_count

PETAFLOPS = "throughput/total petaflops"


def make_rows(offset=0.0, memories=(0, 2, 10), num_steps=100, tokens_per_step=1000):
    rows = []
    for step in range(10, num_steps + 10, 10):
        row = {
            "step": step,
            TOKENS: step * tokens_per_step,
            PETAFLOPS: step * 2e-6,
            TRAIN_LOSS: 8 - step / 20 + offset,
            "train/PPL": math.exp(8 - step / 20),
            SPEED: 500.0,
            "optim/dense grad norm": 0.5,
            "optim/tables grad norm": 0.05,
            "optim/dense learning rate": 1e-3,
            "optim/tables learning rate": 4e-3,
            "train/key_balance": 0.1,
        }
        if step % 50 == 0:
            row |= {VALIDATION_LOSS: 8.5 - step / 20 + offset, "validation/bits per byte": 2.0}
            for number in memories:
                row |= {f"memory/{number}/value_coverage": (step + number) / 200, f"memory/{number}/top1_score": 1.0}
                row |= {f"memory/{number}/singular_value_head{h}_{i}": 2.0 - i + h for h in (0, 1) for i in (0, 1)}
        rows.append(row)
    return rows


MEMORY, DENSE = Run("memory", make_rows()), Run("dense", make_rows(0.5, memories=()))


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def panels(*runs, axis="steps"):
    return {panel.stem: panel for panel in draw_panels(runs, axis)}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_run_has_a_panel_for_everything_that_it_recorded():
    assert list(panels(MEMORY)) == [
        "loss",
        "validation_bits_per_byte",
        "train_key_balance",
        "throughput",
        "learning_rate",
        "grad_norm",
        "coverage",
        "top1_score",
        "singular_value_1",
        "singular_value_2",
    ]


def test_what_no_run_recorded_has_no_panel():
    dense = set(panels(DENSE))
    assert {"coverage", "top1_score", "singular_value_1"} & dense == set()
    assert set(panels(Run("bare", [{"step": 1, TRAIN_LOSS: 2.0}]))) == {"loss"}
    assert set(panels(DENSE, MEMORY)) == set(panels(MEMORY))


def test_metrics_that_nobody_foresaw_have_a_panel_of_their_own():
    rows = [{"step": step, "downstream/hellaswag": 0.3, "optim/skipped": 1} for step in (1, 2)]
    found = panels(Run("later", rows))
    assert set(found) == {"downstream_hellaswag", "optim_skipped"}
    assert found["downstream_hellaswag"].title == "Downstream: hellaswag"


@pytest.mark.parametrize(
    ("axis", "places", "label"),
    [
        ("steps", [50, 100], "step"),
        ("tokens", [5e4, 1e5], "training tokens"),
        ("flops", [1e11, 2e11], "training FLOPs"),
    ],
)
def test_losses_are_drawn_over_the_axis(axis, places, label):
    axes = plot_losses([MEMORY, DENSE], axis).axes[0]
    lines = lines_of(axes)
    assert set(lines) == {"memory, training", "memory, validation", "dense, training", "dense, validation"}
    assert list(lines["dense, validation"].get_xdata()) == pytest.approx(places)
    assert list(lines["dense, validation"].get_ydata()) == [6.5, 4.0]
    assert len(lines["memory, training"].get_xdata()) == 10
    assert axes.get_xlabel() == label


def test_limits_of_the_losses_leave_out_the_first_fall_and_what_is_not_finite():
    rows = [{"step": step, TRAIN_LOSS: 100.0 if step < 5 else 3.0 + step / 100} for step in range(1, 101)]
    rows[50][TRAIN_LOSS], rows[60][TRAIN_LOSS] = math.nan, math.inf
    low, high = plot_losses([Run("run", rows)], "steps").axes[0].get_ylim()
    assert 3.0 < low < 3.12
    assert 4.0 < high < 4.1


def test_a_run_without_validation_has_one_line():
    rows = [{name: value for name, value in row.items() if name != VALIDATION_LOSS} for row in make_rows()]
    assert set(lines_of(plot_losses([Run("memory", rows)], "tokens").axes[0])) == {"memory, training"}


def test_runs_have_colours_and_groups_have_styles():
    one, two = (panels(*runs)["learning_rate"].figure.axes[0] for runs in ([MEMORY], [MEMORY, DENSE]))
    assert legend(one) == ["dense", "tables"]
    assert [line.get_ydata()[0] for line in one.get_lines()] == [1e-3, 4e-3]
    assert legend(two) == ["memory", "dense", "dense", "tables"]
    assert [to_hex(line.get_color()) for line in two.get_lines()] == ["#1f77b4"] * 2 + ["#ff7f0e"] * 2
    assert [line.get_linestyle() for line in two.get_lines()] == ["-", "--"] * 2
    assert panels(MEMORY)["grad_norm"].figure.axes[0].get_yscale() == "log"


def test_one_run_has_a_line_for_each_memory_in_order():
    (axes,) = plot_memories([MEMORY, DENSE], "steps", "coverage").axes
    lines = lines_of(axes)
    assert list(lines) == ["memory 0", "memory 2", "memory 10"]
    assert list(lines["memory 2"].get_xdata()) == [50, 100]
    assert list(lines["memory 2"].get_ydata()) == [0.26, 0.51]
    assert axes.get_title() == "memory"
    assert axes.yaxis.get_major_formatter()(0.5) == "50%"


def test_several_runs_are_compared_by_their_means_and_ranges():
    other = Run("other", make_rows(memories=(0,)))
    means, first, second = plot_memories([MEMORY, DENSE, other], "tokens", "coverage").axes
    assert list(lines_of(means)) == ["memory", "other"]
    assert list(lines_of(means)["memory"].get_ydata()) == pytest.approx([54 / 200, 104 / 200])
    (band, _) = means.collections
    assert band.get_paths()[0].get_extents().y0 == pytest.approx(0.25)
    assert band.get_paths()[0].get_extents().y1 == pytest.approx(0.55)
    assert (first.get_title(), second.get_title()) == ("memory", "other")
    assert list(lines_of(second)) == ["memory 0"]


def test_many_memories_have_a_colour_bar():
    figure = plot_memories([Run("deep", make_rows(memories=range(20)))], "steps", "coverage")
    assert len(figure.axes) == 2
    assert figure.axes[0].get_legend() is None
    assert figure.axes[1].get_ylabel() == "memory"


def test_a_memory_may_be_missing_in_some_rows():
    rows = make_rows(memories=(0, 1))
    del rows[4]["memory/1/value_coverage"]
    lines = lines_of(plot_memories([Run("run", rows)], "steps", "coverage").axes[0])
    assert math.isnan(lines["memory 1"].get_ydata()[0])
    assert lines["memory 1"].get_ydata()[1] == 101 / 200


def test_singular_values_are_averaged_over_heads():
    found = panels(MEMORY)
    for stem, value in (("singular_value_1", 2.5), ("singular_value_2", 1.5)):
        for line in found[stem].figure.axes[0].get_lines():
            assert list(line.get_ydata()) == [value, value]


@pytest.mark.parametrize(
    ("rows", "axis", "message"),
    [
        ([], "steps", "new has recorded no metrics yet"),
        ([{"step": 1, TRAIN_LOSS: 2.0}], "tokens", "new has no 'throughput/total tokens'.*draw it over --axis steps"),
        ([{"step": 1, TOKENS: 2}], "flops", "new has no 'throughput/total petaflops'"),
    ],
)
def test_a_run_that_cannot_be_drawn_is_named(rows, axis, message):
    with pytest.raises(DataError, match=message):
        check_axis([MEMORY, Run("new", rows)], axis)
    check_axis([MEMORY], axis)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1_300_000, "1.3M"), (5e11, "500B"), (1.4e12, "1.4T"), (2e3, "2K")]
)
def test_counts_are_short(count, text):
    assert short_count(count) == text
