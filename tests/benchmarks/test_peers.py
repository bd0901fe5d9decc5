"""Other projects' layers: built at our sizes, and named with the pip line where they are missing."""

import sys
import types

import pytest
from torch import nn

from ultramem.benchmarks import peers
from ultramem.benchmarks.cases import build_competitors, measure_case
from ultramem.benchmarks.measure import Competitor
from ultramem.benchmarks.peers import PEERS, load_peer, peer_layer, product_key_layer, ultra_mem_layer
from ultramem.errors import BackendError, PeerError


class Recorder(nn.Module):
    def __init__(self, *arguments, **settings):
        super().__init__()
        self.given = (arguments, settings)


@pytest.fixture
def stand_ins(monkeypatch):
    for peer in PEERS.values():
        module = types.ModuleType(peer.module)
        setattr(module, peer.layer, Recorder)
        monkeypatch.setitem(sys.modules, peer.module, module)


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_peer_is_named_with_the_pip_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PEERS[name].module, None)
    with pytest.raises(PeerError) as caught:
        load_peer(name)
    assert str(caught.value) == f"{name} is not installed: pip install 'ultramem[bench]'"


def test_a_missing_package_of_a_peer_is_named(monkeypatch):
    def fail(module):
        raise ModuleNotFoundError("no einx", name="einx.special")

    monkeypatch.setattr(peers, "import_module", fail)
    with pytest.raises(
        PeerError, match=r"ultra-mem needs einx, which is not installed: pip install 'ultramem\[bench\]'"
    ):
        load_peer("ultra-mem")


def test_a_peer_without_its_layer_is_not_silent(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultra_mem", types.ModuleType("ultra_mem"))
    with pytest.raises(
        PeerError, match=r"ultra-mem is installed but does not load \(.*UltraMem.*\): pip install --upg"
    ):
        load_peer("ultra-mem")


def test_peers_have_our_sizes(stand_ins):
    arguments, settings = ultra_mem_layer(512, 64, 128, 96, 32, 2).given
    assert arguments == (512,)
    assert settings["num_memories"] == 64**2
    assert settings["dim_values"] * settings["core_heads"] == 96
    assert (settings["topk"], settings["dim_queries_keys"], settings["core_rank"]) == (32, 128, 2)
    arguments, settings = peer_layer(64, 16, 24, 4, 8).given
    assert arguments == (64,)
    assert settings == {
        "heads": 4,
        "num_experts": 256,
        "num_experts_per_head": 8,
        "dim_key": 24,
        "non_competing_scores": False,
    }
    arguments, settings = product_key_layer(64, 16, 24, 4, 8).given
    assert (arguments, settings) == ((64,), {"heads": 4, "num_keys": 16, "topk": 8, "dim_head": 24})


def test_competitors_that_cannot_run_are_kept_with_their_reason():
    def fail(error):
        raise error

    ready = Competitor(lambda: lambda: None)
    builders = {
        "ours": lambda: ready,
        "kernels": lambda: fail(BackendError("there is no compiler; install g++")),
        "peer": lambda: fail(PeerError("not installed: pip install it")),
    }
    competitors, unavailable = build_competitors(builders)
    assert competitors == {"ours": ready}
    assert unavailable == {"kernels": "there is no compiler; install g++", "peer": "not installed: pip install it"}
    case = measure_case("case", "sizes", builders, 7, None, num_tokens=3)
    assert list(case.timings) == ["ours"]
    assert case.to_dict(1.0)["unavailable"] == unavailable
    assert case.to_dict(1.0)["competitors"]["ours"]["tokens_per_s"] > 0
    with pytest.raises(ZeroDivisionError):
        build_competitors({"bug": lambda: 1 / 0})
