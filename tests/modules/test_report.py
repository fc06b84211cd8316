from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedlora import quick_clip_lora
from fedlora.errors import FedloraError
from fedlora.modules.lora import LoRAWrapper
from fedlora.modules.report import ParameterReport, readable
from tests.small_clip import NAMES, TEXT
from tests.small_nets import NETS, make_net, wrap

# By hand: what the nets hold.
# mlp: 5*7+7 + 7*4 + 2*4 + 4*3+3 = 93
# resnet: 6*27+6 + 2*6 + 8*54 + 2*8 + 8*24+8 + 2*8 + 8*6 + 2*8 + 4*8+4 = 944
# mixed: 6*12+6 + 6*9+6 + 6*3+6 + 6*18+6 twice + attention 18*6+18+6*6+6
#        + 6*6+6 + 2*6 + 3*6+3 = 633
TOTAL = {"mlp": 93, "resnet": 944, "mixed": 633}
STATISTICS = {"mlp": 0, "resnet": 2 * (6 + 8 + 8), "mixed": 2 * 6}
COUNTERS = {"mlp": 0, "resnet": 3, "mixed": 1}  # int64, one in each BatchNorm
BIASES = {  # "lora_only": of the adapted layers; "all" (the attention's has no layer of its own)
    "lora_only": {"mlp": 7 + 3, "resnet": 6 + 8 + 4, "mixed": 6 + 6 + 3},
    "all": {
        "mlp": 7 + 4 + 3,
        "resnet": 6 + 6 + 8 + 8 + 8 + 8 + 4,
        "mixed": 5 * 6 + 18 + 6 + 6 + 6 + 3,
    },
}
NORMS = {"mlp": 4, "resnet": 6 + 8 + 8 + 8, "mixed": 6}  # weights, and as many biases


def factors(kind: str, r: int) -> int:
    """r (in + out) of a linear layer, r (in * kernel + out) of a convolution."""
    layers = NETS[kind].layers.values()
    return r * sum(in_features * elements + out for in_features, out, elements in layers)


def full_nbytes(kind: str, size: int) -> int:
    """What an exchange of the full model takes."""
    return size * (TOTAL[kind] + STATISTICS[kind]) + 8 * COUNTERS[kind]


@pytest.mark.parametrize("train_norm", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("kind", NETS)
def test_counts_are_what_the_formulas_say(kind: str, r: int, bias: str, train_norm: bool) -> None:
    report = wrap(make_net(kind), r=r, bias=bias, train_norm=train_norm).report()
    adapter, full = factors(kind, r), BIASES.get(bias, {kind: 0})[kind]
    full += train_norm * NORMS[kind] * (1 if bias == "all" else 2)
    travels = adapter + full + STATISTICS[kind]
    assert report == ParameterReport(
        total=TOTAL[kind],
        adapter=adapter,
        full=full,
        idle=0,
        exchanged=travels,
        exchanged_nbytes=4 * travels,
        total_nbytes=full_nbytes(kind, 4),
    )
    assert report.trained == adapter + full
    assert report.percent == pytest.approx(100 * (adapter + full) / TOTAL[kind])
    assert report.reduction == pytest.approx(100 * (1 - 4 * travels / full_nbytes(kind, 4)))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float64, 8)], ids=str
)
@pytest.mark.parametrize("kind", NETS)
def test_bytes_are_those_of_the_types(kind: str, dtype: torch.dtype, size: int) -> None:
    lora = wrap(make_net(kind, dtype), bias="all")
    report, single = lora.report(), wrap(make_net(kind), bias="all").report()
    assert report.exchanged == single.exchanged
    assert report.exchanged_nbytes == single.exchanged_nbytes * size // 4
    assert report.total_nbytes == full_nbytes(kind, size)
    assert report.exchanged_nbytes == sum(t.nbytes for t in lora.get_parameters().values())


def test_a_tied_layer_and_tied_weights_count_once() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(5, 4), "one": nn.Linear(4, 4)})
    net["again"] = net["one"]
    net["logits"] = nn.Linear(4, 5, bias=False)
    net["logits"].weight = net["embed"].weight
    report = wrap(net, r=1).report()
    assert (report.total, report.adapter) == (5 * 4 + 4 * 4 + 4, 4 + 4)


@pytest.mark.parametrize("kind", NETS)
def test_what_travels_is_what_get_parameters_gives(kind: str) -> None:
    """Everything, counters of BatchNorm included, where not only the trained part is exchanged."""
    held = TOTAL[kind] + STATISTICS[kind] + COUNTERS[kind]
    for lora, expected in (
        (wrap(make_net(kind)), factors(kind, 2) + STATISTICS[kind]),
        (wrap(make_net(kind), enabled=False), held),
        (wrap(make_net(kind), save_only_trainable=False), held + factors(kind, 2)),
    ):
        report, given = lora.report(), lora.get_parameters()
        # A tied layer has two names in a state dict and is told once.
        tensors = {n: t for n, t in given.items() if not n.startswith("again.")}
        assert sum(t.numel() for t in tensors.values()) == expected
        assert report.exchanged == sum(t.numel() for t in given.values())
        assert report.exchanged_nbytes == sum(t.nbytes for t in given.values())


def test_without_lora_all_is_trained() -> None:
    report = wrap(make_net("resnet"), enabled=False).report()
    assert (report.total, report.adapter, report.full) == (944, 0, 944)
    assert report.percent == 100
    assert report.exchanged_nbytes == report.total_nbytes == full_nbytes("resnet", 4)
    assert report.reduction == 0


def test_a_report_needs_the_adapter() -> None:
    with pytest.raises(FedloraError, match=r"Call apply\(\) first"):
        LoRAWrapper(make_net("mlp")).report()


def test_it_reads_well() -> None:
    report = ParameterReport(
        total=151_277_313,
        adapter=2_457_600,
        full=0,
        idle=0,
        exchanged=2_457_600,
        exchanged_nbytes=9_830_400,
        total_nbytes=605_109_252,
    )
    assert str(report) == (
        "2,457,600 of 151,277,313 parameters trained (1.62 %), "
        "9.83 MB of 605.11 MB exchanged (98.38 % less)"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_234_000, "1.23 MB"),
        (1.5e9, "1.50 GB"),
        (2.5e13, "25000.00 GB"),
    ],
)
def test_readable(count: float, text: str) -> None:
    assert readable(count) == text


def test_what_never_trains_is_named(folder: Path) -> None:
    report = quick_clip_lora(str(folder), 3, lora_r=2).lora_wrapper.report()
    # fc1 and fc2 of the text tower, two blocks.
    assert report.idle == 2 * 2 * 2 * (TEXT + 36)
    assert f", {report.idle} of them in a tower that the head does not use" in str(report)
    text = quick_clip_lora(str(folder), class_names=NAMES, head="text")
    assert text.lora_wrapper.report().idle == 0
