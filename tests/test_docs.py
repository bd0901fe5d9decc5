"""The documentation is held to the code: settings, costs, fixtures, examples, figures, links, the walk-through."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from tiny_memories import HIDDEN_SIZE, NUM_MEMORIES, tokens
from tolerances import assert_close
from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.evaluation.parity import ABSOLUTE_TOLERANCE
from ultramem.evaluation.released import RELEASED_LAYERS
from ultramem.layers import MEMORY_TYPES, MemoryConfig
from ultramem.layers.memory import MemoryLayer
from ultramem.model import cost_card
from ultramem.model.ffn import FFN_TYPES

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ROOT / "docs/layers"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in LAYERS.glob("*.md") if path.stem != "README"}
INDEX = (LAYERS / "README.md").read_text(encoding="utf-8")
CONFIGS = {**{name: kind.config for name, kind in MEMORY_TYPES.items()}, "moe": FFN_TYPES["moe"]}
FIGURE_BYTES = 150_000

pages = pytest.mark.parametrize("name", PAGES)


def load(path):
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def table(text, heading):
    """Cells of the rows of the table whose first heading is given."""
    lines = text[text.index(f"\n| {heading} |") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def code(cell):
    """What a cell has between backticks."""
    return re.fullmatch(r"`(.*)`", cell)[1]


def documented_settings(text):
    return {code(row[0]): yaml.safe_load(code(row[1])) for row in table(text, "field")}


def defaults(config):
    return {entry.name: entry.default for entry in dataclasses.fields(config)}


@pytest.fixture(scope="module")
def draw():
    return load(LAYERS / "draw.py")


def test_every_page_is_of_a_layer_and_listed_in_the_index():
    assert set(PAGES) >= {"pkm", "memory_plus", "peer", "ultramem", "ultramem_v2", "moe"}
    assert set(PAGES) <= set(CONFIGS)
    listed = [re.search(r"\((\w+)\.md\)", row[0])[1] for row in table(INDEX, "page")]
    assert sorted(listed) == sorted(PAGES)


@pages
def test_settings_are_those_of_the_config(name):
    assert documented_settings(PAGES[name]) == defaults(CONFIGS[name])


def test_settings_of_all_memories_are_those_of_their_config():
    expected = defaults(MemoryConfig)
    del expected["type"]
    assert documented_settings(INDEX) == expected


def symbols(name, config):
    """The letters of the formulas, with the values of a preset."""
    if name == "moe":
        ffn = config.ffn_config
        experts = {"E": ffn.num_experts, "a": ffn.num_experts_per_tok, "f": ffn.expert_size(config.intermediate_size)}
        return {"D": config.hidden_size, "B": 64, **experts}
    memory, num_memories = config.memory_config, len(config.memory_spans)
    values = {
        "D": config.hidden_size,
        "B": 64,
        "L": num_memories,
        "S": memory.side(num_memories),
        "W": memory.window_side(num_memories) ** 2,
        "R": memory.num_rows(num_memories),
        "kd": memory.key_dim,
        "k": memory.top_k,
        "H": memory.num_heads,
        **dict(zip("VU", memory.row_widths(config.hidden_size), strict=True)),
    }
    if hasattr(memory, "rank"):
        coarse_top_k = memory.resolved_coarse_top_k(num_memories)
        values |= {"r": memory.rank, "h": memory.num_cores, "E": memory.num_blocks, "m": coarse_top_k}
    return values


def evaluate(formula, values):
    for written, python in (("·", "*"), ("−", "-"), ("²", "**2"), ("^", "**")):
        formula = formula.replace(written, python)
    return eval(formula, {"min": min, **values})


@pages
def test_costs_are_those_of_the_config(name, capsys):
    """Formula, number and the printed output of the page's code are one."""
    config = UltraMemConfig.from_preset(f"base-{name}")
    rows = table(PAGES[name], "method of the config")
    numbers = [int(row[2].replace(",", "")) for row in rows]
    values = symbols(name, config)
    assert [round(evaluate(row[1], values)) for row in rows] == numbers
    exec(snippets(PAGES[name])[0], {})
    printed = [round(float(number)) for number in capsys.readouterr().out.split()]
    assert printed == numbers
    owner = CONFIGS[name]
    assert all(callable(getattr(owner, code(row[0]))) for row in rows)
    calls = re.findall(r"(?:memory|ffn)\.(\w+)\(", snippets(PAGES[name])[0])
    assert calls == [code(row[0]) for row in rows]


def test_the_side_by_side_table_is_what_info_counts():
    lines = INDEX.split("## Costs side by side")[1]
    kinds = re.search(r"\n\| \| (.+) \|\n", lines)[1].split(" | ")
    cards = [cost_card(UltraMemConfig.from_preset(f"base-{kind}")) for kind in kinds]
    assert set(kinds) == {"dense", *PAGES}
    assert f"`ultramem info --compare {' '.join(f'base-{kind}' for kind in kinds)}`" in lines.replace("\n", " ")

    def elements(card):
        memory = card.config.memory_config
        return card.num_memories * memory.table_elements_per_token(card.config.hidden_size) if memory else 0

    expected = {
        "total parameters": lambda card: card.total_parameters,
        "active parameters": lambda card: card.active_parameters,
        "FLOPs per token, no context": lambda card: card.flops_per_token(),
        "table elements per token": elements,
        "bytes, 1 sequence": lambda card: card.bytes_per_decode_step(1),
        "bytes, 64 sequences": lambda card: card.bytes_per_decode_step(64),
    }
    rows = re.findall(r"^\| ([^|]+) \| (\d.*) \|$", lines, flags=re.M)
    assert [row[0] for row in rows] == list(expected)
    for label, cells in rows:
        written = [float(cell.rstrip("KM")) * {"K": 1e3, "M": 1e6}.get(cell[-1], 1) for cell in cells.split(" | ")]
        assert written == pytest.approx([expected[label](card) for card in cards], rel=6e-4), label


def test_fixtures_are_on_the_page_of_their_layer():
    expected = {name: [] for name in MEMORY_TYPES if name in PAGES}
    for path in sorted((ROOT / "tests/golden").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            expected[RELEASED_LAYERS[file.metadata()["layer"]].memory_type].append(path.name)
    for name, fixtures in expected.items():
        rows = table(PAGES[name], "fixture")
        assert [code(row[0]) for row in rows] == fixtures
        assert all(0 < float(error) < ABSOLUTE_TOLERANCE for row in rows for error in row[1:])


@pages
def test_the_example_runs(name):
    example = snippets(PAGES[name])[1]
    names = {}
    exec(example, names)
    if name == "moe":
        output = names["output"]
        assert set(output.auxiliary_losses) == {"load_balance", "router_z"}
        assert torch.isfinite(output.loss)
        return
    layer = names["layer"]
    assert type(layer) is MEMORY_TYPES[name].layer
    assert names["y"].shape == (2, 10, 256)
    assert float(names["y"].detach().std()) > 0
    heads, top_k, of = re.search(
        r"from (?:(\d+) · )?(\d+) of ([\d,]+) (?:rows|slots|experts) per token", example
    ).groups()
    assert (layer.config.num_heads, layer.config.top_k) == (int(heads or 1), int(top_k))
    assert layer.num_slots == int(of.replace(",", ""))


@pages
def test_the_figure_is_shown_and_up_to_date(name, draw):
    path = LAYERS / "figures" / f"{name}.png"
    assert f"![data flow](figures/{name}.png)" in PAGES[name]
    assert path.stat().st_size < FIGURE_BYTES
    with Image.open(path) as image:
        assert image.text["Description"] == draw.digest(name), "run python docs/layers/draw.py"
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pages
def test_text_lies_within_its_box(name, draw):
    canvas = draw.draw(name)
    assert len(canvas.contents) >= 7
    for text, patch in canvas.contents:
        inner, outer = (artist.get_window_extent(canvas.renderer) for artist in (text, patch))
        assert outer.x0 < inner.x0, text.get_text()
        assert inner.x1 < outer.x1, text.get_text()
        assert outer.y0 < inner.y0, text.get_text()
        assert inner.y1 < outer.y1, text.get_text()
    for text in canvas.axes.texts:
        assert text.get_window_extent(canvas.renderer).x1 <= canvas.figure.bbox.x1


def test_drawing_writes_one_figure_for_every_page(draw, tmp_path):
    draw.main(tmp_path / "figures")
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(PAGES)
    assert {path.stem for path in (LAYERS / "figures").iterdir()} == set(PAGES)


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


DOCUMENTS = [ROOT / "tests/golden/README.md", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_links_lead_to_files_and_headings():
    links = 0
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            links += 1
            file, _, anchor = target.partition("#")
            path = document.parent / file if file else document
            assert path.exists(), f"{document.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
                assert anchor in map(slug, headings), f"{document.name} links to {target}"
    assert links > 20


def test_no_number_is_left_to_be_filled_in():
    """Figures are put into a template by name; one that the measurements did not have would stay between braces."""
    assert len(DOCUMENTS) > 10
    left = [f"{path.name}: {name}" for path in DOCUMENTS for name in re.findall(r"\{\{.*", path.read_text("utf-8"))]
    assert left == []


def walk_through():
    """The code of CONTRIBUTING's new layer, by place."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = snippets(text.split("## Adding a layer")[1].split("\n## ")[0])
    places = ("layer", "import", "type", "test", "preset")
    return dict(zip(places, blocks, strict=True))


def test_the_new_layer_of_contributing_works(tmp_path, monkeypatch):
    blocks = walk_through()
    for place in ("layer", "test"):
        (tmp_path / f"sigmoid_pkm_{place}.py").write_text(blocks[place], encoding="utf-8")
    module, test = (load(tmp_path / f"sigmoid_pkm_{place}.py") for place in ("layer", "test"))
    monkeypatch.setitem(
        MEMORY_TYPES, "sigmoid_pkm", type(MEMORY_TYPES["pkm"])(module.SigmoidPKMConfig, module.SigmoidPKM)
    )
    assert issubclass(module.SigmoidPKM, MemoryLayer)
    config = module.SigmoidPKMConfig(**test.SIZES)
    layer = module.SigmoidPKM(HIDDEN_SIZE, config, NUM_MEMORIES, 1).double()
    pool = module.SigmoidPKM.make_pool(HIDDEN_SIZE, config, NUM_MEMORIES).double()
    with torch.no_grad():
        assert_close(layer(tokens(3), pool).output, test.naive(layer, pool, tokens(3))[0])
    preset = eval("{" + blocks["preset"] + "}")["sigmoid_pkm"]
    settings = {"intermediate_size": preset[0], "memory": {"type": "sigmoid_pkm", **preset[1]}}
    model = UltraMemForCausalLM(UltraMemConfig.from_preset("tiny-dense", **settings))
    cards = [cost_card(config) for config in (model.config, UltraMemConfig.from_preset("tiny-pkm"))]
    assert cards[0].total_parameters - cards[1].total_parameters == 3 * 4
    ids = torch.randint(100, (1, 8))
    model(ids, labels=ids).loss.backward()
    assert all(float(memory.shift.grad.abs().sum()) > 0 for memory in model.model.memories)


# What tells of every type or preset; of these files all tests run, not only those of the new layer.
OF_EVERY_TYPE = (
    "tests/model/test_configuration.py",
    "tests/model/test_families.py",
    "tests/model/test_presets.py",
    "tests/cli/test_info.py",
    "tests/test_docs.py",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        (("-m", "not gpu", "-k", "sigmoid_pkm", "tests/layers", "tests/model", "tests/training/test_types.py"), 80),
        (OF_EVERY_TYPE, 150),
    ],
    ids=["layer", "every_type"],
)
def test_the_walk_through_of_contributing_passes_the_tests(arguments, least, tmp_path):
    """Four files changed in a copy of the repository, whose tests then run over the new layer."""
    for folder in ("src", "tests", "docs", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    blocks = walk_through()
    for name, place in (
        ("src/ultramem/layers/sigmoid_pkm.py", "layer"),
        ("tests/memory_types/sigmoid_pkm.py", "test"),
    ):
        (tmp_path / name).write_text(blocks[place], encoding="utf-8")
    # (file, place, line after which it goes)
    for name, place, after in (
        ("src/ultramem/layers/__init__.py", "import", "from ultramem.layers.placement import Span, parse_placement\n"),
        ("src/ultramem/layers/__init__.py", "type", '    "peer": MemoryType(PEERConfig, PEER),\n'),
        ("src/ultramem/model/presets.py", "preset", "        memories={\n"),
    ):
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        assert after in text, name
        path.write_text(text.replace(after, after + blocks[place], 1), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least
