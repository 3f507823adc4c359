"""Notice when objects of given classes are made."""

import copy
import pickle

import pytest
import torch

from lightning_acu.integrations.construction import constructed


class Base:
    def __init__(self, value):
        self.value = value


class Without(Base):
    """Has no __init__ of its own."""


class Deep(Without):
    def __init__(self):
        super().__init__(1)
        self.later = 2


class Both(Deep, Without):
    pass


@pytest.mark.parametrize("make", [lambda: Base(3), lambda: Without(value=3), Deep, Both])
def test_each_object_is_seen_once_when_it_is_complete(make):
    seen = []
    with constructed(Base, lambda made: seen.append((made, dict(vars(made))))):
        made = make()
    assert seen == [(made, vars(made))]


def test_subclasses_that_are_defined_meanwhile_are_seen_and_restored():
    seen = []
    with constructed(Base, seen.append):

        class Late(Deep):
            def __init__(self):
                super().__init__()

        first = Late()
    Late()
    assert seen == [first]


def test_copies_are_not_seen():
    seen = []
    with constructed(Base, seen.append):
        made = Deep()
        copy.deepcopy(made)
        pickle.loads(pickle.dumps(made))
    assert seen == [made]


def test_classes_are_as_before_afterwards_also_after_an_error():
    before = {cls: dict(vars(cls)) for cls in (Base, Without, Deep, Both)}
    with pytest.raises(ZeroDivisionError), constructed(Base, lambda made: 1 / 0):
        Deep()
    assert {cls: dict(vars(cls)) for cls in before} == before
    init = torch.optim.SGD.__init__
    with constructed(torch.optim.Optimizer, print):
        assert torch.optim.SGD.__init__ is not init
    assert torch.optim.SGD.__init__ is init
    assert "__init_subclass__" not in vars(torch.optim.Optimizer)
