import pytest
from torch import nn

from ultramem.evaluation.mode import evaluating


def modes(model):
    return [module.training for module in model.modules()]


def test_every_part_gets_its_own_mode_back():
    """A frozen part of a model in training may be in eval mode for good."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluating(model):
        assert modes(model) == [False] * 4
    assert modes(model) == [True, True, False, False]


def test_the_mode_comes_back_after_an_error():
    model = nn.Dropout()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        raise KeyboardInterrupt
    assert model.training
