from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPModel

from fedlora.errors import FedloraError
from fedlora.modules.anatomy import Anatomy, optimizers_in


class Thing:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Slots:
    __slots__ = ("held", "unset")


@pytest.fixture(scope="module")
def clip(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder)


def test_what_is_found_and_where(clip: CLIPModel) -> None:
    head, scale = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    adam = torch.optim.AdamW(head.parameters())
    thing = Thing(parts={"clip": nn.Sequential(clip)}, deep=Thing(h=head), s=scale, o=adam)
    found = Anatomy.of(thing)
    assert found.clip is clip
    assert found.modules.keys() == {"parts.clip", "deep.h"}
    assert found.outside() == {"deep.h.weight": head.weight, "deep.h.bias": head.bias, "s": scale}
    assert found.linear_outside() == {"deep.h": head}
    assert optimizers_in(thing) == [adam]


def test_what_wants_no_gradients_is_not_trained(clip: CLIPModel) -> None:
    head = nn.Linear(2, 2).requires_grad_(False)
    assert Anatomy.of(Thing(clip=clip, head=head)).outside() == {}


def test_two_places_of_one_module(clip: CLIPModel) -> None:
    head = nn.Linear(2, 2)
    found = Anatomy.of(Thing(clip=clip, also=clip, head=head, inner=Thing(fc=head)))
    assert found.modules.keys() == {"clip", "head"}
    assert [path for path, module in found.places if module is head] == ["head", "inner.fc"]


def test_slots_cycles_and_lists_of_parameters(clip: CLIPModel) -> None:
    slots = Slots()
    slots.held = clip
    thing = Thing(slots=slots, cached=list(clip.parameters()), plain=SimpleNamespace(x=1))
    thing.me = thing
    found = Anatomy.of(thing)
    assert found.clip is clip
    assert found.modules.keys() == {"slots.held"}
    assert found.outside() == {}


@pytest.mark.parametrize("kind", ["StepLR", "ReduceLROnPlateau"])
def test_an_optimizer_behind_a_scheduler(kind: str) -> None:
    adam = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    arguments = (1,) if kind == "StepLR" else ()
    scheduler = getattr(torch.optim.lr_scheduler, kind)(adam, *arguments)
    assert optimizers_in(Thing(scheduler=scheduler)) == [adam]


def test_optimizers_are_found_whatever_else_there_is(clip: CLIPModel) -> None:
    adam = torch.optim.AdamW(clip.parameters())
    assert optimizers_in(Thing(one=clip, two=CLIPModel(clip.config), adam=adam, again=[adam])) == [
        adam
    ]


def test_none_and_two(clip: CLIPModel) -> None:
    with pytest.raises(FedloraError, match="no CLIP of transformers was found in Thing"):
        Anatomy.of(Thing(head=nn.Linear(2, 2)))
    with pytest.raises(FedloraError, match=r"Thing holds 2 CLIPs \(a, b.c\)"):
        Anatomy.of(Thing(a=clip, b={"c": CLIPModel(clip.config)}))
