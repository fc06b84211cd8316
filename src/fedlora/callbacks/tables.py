"""The tables at the start and at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedlora.modules.report import readable
from fedlora.state import Client

if TYPE_CHECKING:
    from fedlora.personal import Storage
    from fedlora.rounds import Rounds
    from fedlora.run_folder import RunFolder
    from fedlora.trainer import FederatedTrainer


def at_start(trainer: FederatedTrainer, rounds: Rounds, stays: Storage) -> dict[str, str]:
    """What is trained, what travels, what stays, who holds what."""
    lora = rounds.engine.lora
    rnd = rounds.round(trainer.server.round_idx)
    trained = sum(
        parameter.numel()
        for part in rounds.rule.trainable(rnd)
        for parameter in lora.parameters[part].values()
    )
    adapters = sum(p.numel() for part in ("A", "B") for p in lora.parameters[part].values())
    head = lora.federated.classifier
    total = sum(p.numel() for p in lora.federated.clip.parameters())
    total += 0 if head is None else sum(p.numel() for p in head.parameters())
    ranks = sorted({client.rank for client in rounds.clients})
    mixed, most = len(ranks) > 1, Client(0, 0, ranks[-1])
    # What the rounds add to a residual comes on top, and is counted there.
    start = trainer.server.adapter
    parts = start.only(rounds.rule.trainable(rnd)).cut(most.rank)
    up = rounds.rule.upload(start.cut(most.rank), parts, most, rnd).nbytes
    beside = rounds.engine.beside_nbytes(most, rounds.rule, rnd)
    down = rounds.rule.distribute(start, most, rnd).nbytes
    up, down = up + beside[0], down + beside[1]
    sizes = sorted(client.num_samples for client in rounds.clients)
    return {
        "model": f"{lora.federated.model_name}, {lora.federated.head} head, "
        f"{lora.federated.num_classes} classes",
        "parameters": f"{total:,} in all, of which {adapters:,} in the adapter",
        "trained": f"{trained:,} ({100 * trained / total:.2f} %)",
        "rule": rounds.rule.name,
        "traffic per client and round": f"{'up to ' * mixed}{readable(up)} up; "
        f"{readable(down)} down in round {rnd.idx}",
        **({"stays with a client": _kept(stays)} if stays.each else {}),
        "data": trainer.datamodule.source.summary(),
        "pictures": trainer.datamodule.holdings.summary(),
        "clients": f"{len(sizes)}, {rnd.cohort} a round, {sizes[0]} to {sizes[-1]} samples "
        f"(median {sizes[len(sizes) // 2]})"
        + f", of rank {ranks[0]}" * (ranks[0] > 0)  # there is none without LoRA
        + f" to {ranks[-1]}" * mixed,
        "rounds": f"{trainer.server.round_idx} done, up to {trainer.max_rounds}",
        "device": _device(trainer),
        "run folder": str(rounds.run.path),
    }


def _kept(stays: Storage) -> str:
    return (
        f"{readable(stays.each)}; {readable(stays.all)} in clients/ once {stays.clients:,} have "
        f"played, at most {readable(stays.most)} with older ones"
    )


def at_end(summary: Mapping[str, Any], run: RunFolder, personal: int) -> dict[str, Any]:
    """How good it is and where things are."""
    best = summary["best"]
    up, down = readable(summary["comm/up_bytes"]), readable(summary["comm/down_bytes"])
    shown: dict[str, Any] = {
        "rounds": f"{summary['round']} ({summary['finished']})",
        **{
            f"{what.replace('_', '-')} {name}": value
            for what in ("zero_shot", "start")
            for name, value in summary.get(what, {}).items()
            if "acc" in name
        },
        **{
            name: "not defined" if value is None else value
            for name, value in summary.items()
            if name.startswith("test/")
        },
    }
    if best is not None:
        monitor = summary["monitor"]
        shown[f"best {monitor}"] = f"{best[monitor]:.4f} (round {best['round']})"
    shown |= {
        "traffic": f"{up} up, {down} down",
        "time": f"{summary['seconds']:.1f} s",
        "adapter": str(run.adapter),
        "metrics": str(run.metrics),
        "checkpoints": str(run.path / "checkpoints"),
    }
    if run.per_class.exists():
        shown["classes"] = str(run.per_class)
    if run.client_test.exists():
        shown["clients' tests"] = str(run.client_test)
    if personal:
        shown["personal adapters"] = f"{personal} in {run.path / 'adapters'}"
    return shown


def _device(trainer: FederatedTrainer) -> str:
    said = [str(trainer.fabric.device), trainer.averaging.precision]
    if trainer.averaging.base_dtype != "float32":
        said.append(f"frozen base in {trainer.averaging.base_dtype}")
    if trainer.world_size > 1:
        shared = "clients" if trainer.spread == "clients" else "the rows of batches (ddp)"
        said.append(f"{trainer.world_size} processes share {shared}")
    stack = trainer.rounds.engine.loop.stack
    if stack is not None:
        said.append(f"{stack.seats} clients share a pass")
    return ", ".join(said)
