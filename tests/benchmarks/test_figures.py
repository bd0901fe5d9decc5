"""The papers' figures: plans, points that survive, resuming, drawing."""

import csv

import pytest
import torch
from PIL import Image

from ultramem.benchmarks import figures
from ultramem.benchmarks.drawing import draw_figure, ticks
from ultramem.benchmarks.figures import FIGURES, Plan, Size, make_plan
from ultramem.benchmarks.points import COLUMNS, open_points
from ultramem.benchmarks.reproduction import Reproduction
from ultramem.benchmarks.targets import DENSE, MOE, V2
from ultramem.benchmarks.twins import NAMES
from ultramem.errors import ConfigError

PLAN = Plan("figure1", (Size("tiny", 2),), (0.0,), (1, 2), 8, 7)


def made_up(batch_size, model, **fields):
    point = dict.fromkeys(COLUMNS, 10 * batch_size)
    point |= {"size": "tiny", "sparse_ratio": 0.0, "batch_size": batch_size, "model": model, "kv_length_tokens": 8}
    return point | {"median_s": 0.5 * batch_size, "fastest_s": 0.4 * batch_size, "slowest_s": 0.9 * batch_size} | fields


def made_up_group(batch_size, **fields):
    return [made_up(batch_size, name, **fields) for name in NAMES]


def rows(file):
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_plans_mirror_the_papers():
    for figure in ("figure1", "figure7"):
        plan = make_plan(figure)
        assert plan.batch_sizes == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        assert plan.kv_length_tokens == 2048
    assert len(make_plan("figure7").sizes) == 3
    ratios = make_plan("figure6c")
    assert ratios.batch_sizes == (512,)
    assert len(ratios.sparse_ratios) == 5
    for figure in FIGURES:
        assert len(make_plan(figure, quick=True).groups()) < len(make_plan(figure).groups())
    own = make_plan("figure1", batch_sizes=(3,), kv_length_tokens=5, num_runs=8)
    assert (own.batch_sizes, own.kv_length_tokens, own.num_runs) == ((3,), 5, 8)
    with pytest.raises(
        ConfigError, match=r"'figure9' is none of the figures that can be reproduced: figure1, figure6c"
    ):
        make_plan("figure9")


def test_an_accelerator_measures_the_published_sizes():
    plan = make_plan("figure1", device=torch.device("cuda:1"))
    assert (plan.sizes, plan.device) == ((Size("1b"),), "cuda:1")
    quick, here = make_plan("figure1", quick=True, device=torch.device("cuda")), make_plan("figure1", quick=True)
    assert quick.sizes == here.sizes


def test_points_are_measured_written_and_drawn(tmp_path):
    reproduction = Reproduction(PLAN, tmp_path / "new/folder", num_threads=1)
    assert "measuring 6 points into" in reproduction.opening
    assert reproduction.draw() is None
    reproduction.measure()
    found = rows(reproduction.store.file)
    assert [(row["batch_size"], row["model"]) for row in found] == [(batch, name) for batch in "12" for name in NAMES]
    assert all(int(row["bytes_read"]) > 0 and float(row["median_s"]) > 0 for row in found)
    assert int(found[0]["num_rows"]) > 0
    assert {row["kv_length_tokens"] for row in found} == {"8"}
    with Image.open(reproduction.draw()) as image:
        assert image.width > 900
    again = Reproduction(PLAN, tmp_path / "new/folder", num_threads=1)
    assert "nothing left to measure: 6 of 6 points" in again.opening
    again.measure()
    assert rows(again.store.file) == found


def test_figure6c_changes_the_models(tmp_path):
    plan = Plan("figure6c", (Size("tiny", 2),), (1.0, 3.0), (2,), 4, 7)
    reproduction = Reproduction(plan, tmp_path, num_threads=1)
    reproduction.measure()
    found = rows(reproduction.store.file)
    total = {(row["sparse_ratio"], row["model"]): int(row["total_parameters"]) for row in found}
    assert total["1.0", DENSE] == total["3.0", DENSE]
    assert total["3.0", V2] > 1.5 * total["1.0", V2]
    assert total["3.0", MOE] > 1.5 * total["1.0", MOE]
    assert reproduction.draw().name == "figure6c.png"


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
    measure, calls = figures._measure, []

    def interrupted(*arguments):
        calls.append(arguments[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(figures, "_measure", interrupted)
    reproduction = Reproduction(PLAN, tmp_path, num_threads=1)
    with pytest.raises(KeyboardInterrupt):
        reproduction.measure()
    assert reproduction.progress == f"3 of 6 points are in {tmp_path / 'figure1.csv'}"
    before = rows(tmp_path / "figure1.csv")
    resumed = Reproduction(PLAN, tmp_path, num_threads=1)
    assert "going on: 3 of 6 points" in resumed.opening
    resumed.measure()
    assert calls == [1, 2, 2]
    assert rows(tmp_path / "figure1.csv")[:3] == before
    assert len(rows(tmp_path / "figure1.csv")) == 6


def test_a_torn_line_and_its_group_are_dropped(tmp_path):
    store = open_points(tmp_path, "figure1", {"a": 1}, 3, restart=False)
    store.add(made_up_group(1))
    store.add(made_up_group(2))
    text = store.file.read_text()
    store.file.write_text(text[:-30])
    reopened = open_points(tmp_path, "figure1", {"a": 1}, 3, restart=False)
    assert reopened.points == made_up_group(1)
    assert reopened.groups == {("tiny", 0.0, 1)}
    assert len(rows(store.file)) == 3


def test_points_of_another_setting_are_not_mixed_in(tmp_path):
    open_points(tmp_path, "figure1", {"threads": 2, "plan": "x"}, 3, restart=False).add(made_up_group(1))
    with pytest.raises(ConfigError) as caught:
        open_points(tmp_path, "figure1", {"threads": 1, "plan": "x"}, 3, restart=False)
    assert str(caught.value) == (
        f"{tmp_path} holds measurements of another setting (threads 2 → 1). Give --restart to measure anew in its "
        "place, or another folder with --output."
    )
    assert len(rows(tmp_path / "figure1.csv")) == 3
    assert open_points(tmp_path, "figure1", {"threads": 1, "plan": "x"}, 3, restart=True).points == []
    assert rows(tmp_path / "figure1.csv") == []


def test_points_without_their_settings_are_not_trusted(tmp_path):
    open_points(tmp_path, "figure1", {}, 3, restart=False).add(made_up_group(1))
    (tmp_path / "figure1.settings.json").unlink()
    with pytest.raises(ConfigError, match=r"figure1.settings.json cannot be read. Give --restart"):
        open_points(tmp_path, "figure1", {}, 3, restart=False)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot hold the measurements \(.*\): name another folder with --output"):
        open_points(tmp_path / "file", "figure1", {}, 3, restart=False)


def test_axes_are_logarithmic_and_shorter_caches_are_marked():
    points = made_up_group(1) + made_up_group(2) + made_up_group(4, kv_length_tokens=4)
    drawing = draw_figure("figure1", points, "a device")
    time, read = drawing.axes
    for axes in (time, read):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [text.get_text() for text in axes.texts] == ["KV 4"]
        assert [line.get_label() for line in axes.lines] == [DENSE, MOE, V2]
    assert list(time.lines[0].get_xdata()) == [1, 2, 4]
    assert list(time.lines[0].get_ydata()) == [500, 1000, 2000]
    assert list(read.lines[0].get_ydata()) == pytest.approx([1e-5, 2e-5, 4e-5])
    assert time.get_xlabel() == "batch size, sequences"
    sizes = draw_figure("figure7", points + made_up_group(1, size="small"), "a device")
    assert len(sizes.axes) == 4
    ratios = [made_up(8, name, sparse_ratio=ratio) for ratio in (1.0, 2.0) for name in NAMES]
    over = draw_figure("figure6c", ratios, "a device").axes[0]
    assert list(over.lines[0].get_xdata()) == [1, 2]
    assert over.get_xlabel() == "sparse parameters / dense parameters"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.9, 60, [1, 2, 5, 10, 20, 50]),
        (28, 75, [30, 40, 50, 70]),
        (78, 125, [80, 100, 120]),
        (0.02, 0.3, [0.02, 0.05, 0.1, 0.2]),
    ],
)
def test_an_axis_has_round_numbers_however_short_it_is(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)
