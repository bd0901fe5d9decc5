"""The page: complete, in one file, and safe for any name."""

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image

from ultramem.evaluation.plots import SPEED, TOKENS, TRAIN_LOSS, VALIDATION_LOSS
from ultramem.evaluation.run_page import write_page
from ultramem.evaluation.run_plots import Run


def rows(offset=0.0):
    return [
        {
            "step": step,
            TOKENS: 2_000_000 * step,
            TRAIN_LOSS: 4.0 - step + offset,
            SPEED: 1000.0 * step,
            "throughput/total petaflops": float(step),
            "memory/0/search_recall": 0.5,
        }
        for step in (1, 2, 3)
    ]


class Page(HTMLParser):
    """Cells of the table, images, and whatever would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.images, self.tags, self.addresses = [], {}, set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        if tag == "img":
            self.images[values["alt"]] = values["src"]
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        self.in_cell = tag == "td"

    def handle_data(self, data):
        if getattr(self, "in_cell", False):
            self.cells.append(data)
            self.in_cell = False


def test_the_page_holds_the_figures_and_needs_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    file = write_page([Run("first", rows()), Run("second", rows(0.5))], "tokens", tmp_path)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert set(page.images) == {"Loss", "Throughput", "Recall of the search"}
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert {"script", "link", "iframe"} & page.tags == set()
    assert not re.search(r"https?:|url\(|@import", re.sub(r'src="[^"]*"', "", text))
    image = base64.b64decode(page.images["Loss"].partition(",")[2])
    assert image == (tmp_path / "loss.png").read_bytes()
    with Image.open(io.BytesIO(image)) as opened:
        opened.load()
        assert min(opened.size) > 300
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.html", "loss.png", "throughput.png", "search_recall.png", "notes.txt"}


def test_the_table_has_the_last_figures_of_each_run(tmp_path):
    with_validation = rows()
    with_validation[1] |= {VALIDATION_LOSS: 2.25, "validation/bits per byte": 0.875}
    page = Page(write_page([Run("a", with_validation), Run("b", rows(0.5))], "steps", tmp_path).read_text())
    assert page.cells == [
        *("a", "3", "6M", "3e+15", "1.0000", "2.2500", "0.8750", "2,000"),
        *("b", "3", "6M", "3e+15", "1.5000", "–", "–", "2,000"),
    ]


def test_names_are_no_markup(tmp_path):
    text = write_page([Run("<script>alert(1)</script>", rows())], "steps", tmp_path).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
