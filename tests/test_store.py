from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import CLIPModel

from fedlora.errors import FedloraError
from fedlora.export import export_adapter
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.modules.lora import LoRAWrapper
from fedlora.store import LoRAConfigManager, LoRAModelManager
from tests.small_clip import adapted, make_folder, shake
from tests.small_models import OwnClip, SmallResNet

BAD = ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a b", "a\n", "a\0", "é", "x" * 101, None, 3]
GOOD = ["a", "A-1_b.c", "a.tmp", "a.old", "a.yaml", "-a", "x" * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP on disk; never written to."""
    return make_folder(tmp_path_factory.mktemp("clip") / "small")


@pytest.fixture
def configs(tmp_path: Path) -> LoRAConfigManager:
    return LoRAConfigManager(tmp_path)


@pytest.fixture
def models(tmp_path: Path) -> LoRAModelManager:
    return LoRAModelManager(tmp_path)


def resnet(size: float = 0.2) -> LoRAWrapper:
    lora = LoRAWrapper(SmallResNet(), LoRAConfig(r=2, lora_dropout=0.0)).apply()
    shake(lora, size=size)
    return lora


def same(one: LoRAWrapper, two: LoRAWrapper) -> bool:
    first, second = dict(one.state().tensors()), dict(two.state().tensors())
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_the_default_is_the_users_own_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    manager = LoRAConfigManager()
    assert tmp_path in manager.folder.parents
    assert manager.list_configs() == []
    assert LoRAModelManager().list_models() == []
    assert list(tmp_path.iterdir()) == []  # to look makes nothing
    manager.save_config(LoRAConfig(r=5), "mine")
    assert LoRAConfigManager().load_config("mine").r == 5
    assert LoRAConfigManager("~/x").folder == tmp_path / "x" / "configs"


# Configs.


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig.small(),
        LoRAConfig.for_classification_head(),
        LoRAConfig(
            r=3,
            lora_alpha=1.5,
            target_modules=["mlp.fc1"],
            bias="all",
            layers=[0, -1],
            use_rslora=True,
            enabled=False,
            target_components=("encoder", "classifier"),
        ),
    ],
)
def test_a_config_comes_back_as_it_was(configs: LoRAConfigManager, config: LoRAConfig) -> None:
    path = configs.save_config(config, "one")
    assert path == configs.folder / "one.yaml"
    assert configs.load_config("one") == config
    assert yaml.safe_load(path.read_text())["r"] == config.r
    assert configs.exists("one")
    assert configs.list_configs() == ["one"]


def test_a_config_is_replaced_only_where_asked(configs: LoRAConfigManager) -> None:
    configs.save_config(LoRAConfig(r=1), "one")
    with pytest.raises(FedloraError, match=r"there is a config 'one' already .*overwrite=True"):
        configs.save_config(LoRAConfig(r=2), "one")
    assert configs.load_config("one").r == 1
    configs.save_config(LoRAConfig(r=2), "one", overwrite=True)
    assert configs.load_config("one").r == 2
    configs.delete_config("one")
    assert not configs.exists("one")
    assert configs.list_configs() == []
    with pytest.raises(FedloraError, match=r"there is no config 'one'\. There are none yet"):
        configs.delete_config("one")


def test_a_missing_config_names_the_nearest(configs: LoRAConfigManager) -> None:
    for name in ("clip_small", "other"):
        configs.save_config(LoRAConfig(), name)
    with pytest.raises(FedloraError) as error:
        configs.load_config("clip_smal")
    assert "did you mean 'clip_small'? There are: clip_small, other" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rr: 3", "there is no key 'rr' (did you mean 'r'?)"),
        ("r: many", "lora.r must be a whole number from 1, got 'many'"),
        ("lora_dropout: 1", "lora.lora_dropout must be in [0, 1), got 1"),
        ("target_components: [decoder]", "lora.target_components"),
        ("- r", "must hold settings"),
        ("", "must hold settings"),
        ("r: [1", "cannot be read"),
        ("r: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_config_that_was_written_by_hand(
    configs: LoRAConfigManager, text: str, said: str
) -> None:
    configs.save_config(LoRAConfig(), "one")
    (configs.folder / "one.yaml").write_text(text)
    with pytest.raises(FedloraError) as error:
        configs.load_config("one")
    assert said in str(error.value)
    assert "one.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_saved_as_pythons(configs: LoRAConfigManager) -> None:
    config = LoRAConfig(
        lora_alpha=np.float64(0.1), lora_dropout=np.float64(0.2), target_modules=[np.str_("fc1")]
    )
    file = configs.save_config(config, "one")
    assert yaml.safe_load(file.read_text())["lora_alpha"] == 0.1
    loaded = configs.load_config("one")
    assert loaded == config
    assert (type(loaded.lora_alpha), type(loaded.lora_dropout)) == (float, float)


def test_a_home_folder_that_nobody_has() -> None:
    for manager in (LoRAConfigManager, LoRAModelManager):
        with pytest.raises(FedloraError, match=r"^folder '~nosuchuser/x': there is no home folder"):
            manager("~nosuchuser/x")


def test_wrong_settings_are_not_saved(configs: LoRAConfigManager) -> None:
    with pytest.raises(FedloraError, match=r"lora\.r must be"):
        configs.save_config(LoRAConfig(r=0), "one")
    with pytest.raises(FedloraError, match="config must be a LoRAConfig, got dict"):
        configs.save_config({"r": 3}, "one")  # type: ignore[arg-type]
    assert configs.list_configs() == []


@pytest.mark.parametrize("name", BAD)
def test_names_that_cannot_be(
    configs: LoRAConfigManager, models: LoRAModelManager, name: Any
) -> None:
    calls = [
        lambda: configs.save_config(LoRAConfig(), name),
        lambda: configs.load_config(name),
        lambda: configs.delete_config(name),
        lambda: configs.exists(name),
        lambda: models.load_model(name, resnet()),
        lambda: models.save_model(resnet(), name),
        lambda: models.delete_model(name),
        lambda: models.get_model_info(name),
    ]
    for call in calls:
        with pytest.raises(FedloraError, match="name must be 1 to 100 of") as error:
            call()
        assert "\n" not in str(error.value)
    assert not configs.folder.exists()


def test_names_that_can_be(configs: LoRAConfigManager, models: LoRAModelManager) -> None:
    for number, name in enumerate(GOOD, 1):
        configs.save_config(LoRAConfig(r=number), name)
        models.save_model(resnet(), name, metrics={"number": number})
    assert configs.list_configs() == models.list_models() == sorted(GOOD)
    for number, name in enumerate(GOOD, 1):
        assert configs.load_config(name).r == number
        assert models.get_model_info(name)["metrics"] == {"number": number}
    models.delete_model("a")
    assert models.list_models() == sorted(set(GOOD) - {"a"})


# Models.


def test_an_adapter_comes_back_to_the_bit(models: LoRAModelManager, folder: Path) -> None:
    lora = adapted(folder, towers="both")
    shake(lora)
    path = models.save_model(lora, "mine", metrics={"acc": 0.5, "n": 3})
    assert path == models.folder / "mine"
    fresh = adapted(folder, towers="both")
    models.load_model("mine", fresh)
    assert same(lora, fresh)
    again = adapted(folder, towers="both")
    models.load_model("mine", again.federated)
    assert same(lora, again)
    assert PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), path)


def test_an_object_of_somebody_elses_class(models: LoRAModelManager, folder: Path) -> None:
    def wrap() -> OwnClip:
        config = LoRAConfig(r=3, lora_dropout=0.0)
        return CLIPLoRAWrapper(OwnClip(folder), config).apply_lora_to_federated_model()

    thing = wrap()
    shake(thing.lora_wrapper)
    models.save_model(thing, "mine")
    fresh = wrap()
    models.load_model("mine", fresh)
    one, two = thing.get_parameters(), fresh.get_parameters()
    assert len(one) == len(two)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_what_is_known_of_a_model(models: LoRAModelManager, folder: Path) -> None:
    lora = adapted(folder)
    before = datetime.now(UTC) - timedelta(seconds=1)
    models.save_model(lora, "mine", metrics={"val/acc": 0.25})
    info = models.get_model_info("mine")
    created = datetime.fromisoformat(info.pop("created"))
    assert before <= created <= datetime.now(UTC)
    assert created.utcoffset() == timedelta(0)
    report = lora.report()
    from fedlora import __version__

    assert info == {
        "name": "mine",
        "base_model": str(folder),
        "config": lora.config.to_dict(),
        "counts": {
            "total": report.total,
            "adapter": report.adapter,
            "full": report.full,
            "exchanged": report.exchanged,
        },
        "bytes": report.exchanged_nbytes,
        "metrics": {"val/acc": 0.25},
        "version": __version__,
    }
    assert LoRAConfig(**info["config"])


def test_to_ask_for_what_is_missing_makes_no_folder(
    configs: LoRAConfigManager, models: LoRAModelManager
) -> None:
    for ask in (configs.load_config, configs.delete_config, models.get_model_info):
        with pytest.raises(FedloraError, match=r"there is no .* 'x'\. There are none yet"):
            ask("x")
    assert not configs.folder.exists()
    assert not models.folder.exists()


@pytest.mark.parametrize("metrics", [{"a": float("nan")}, {"a": "high"}, [1], {"a": None}])
def test_metrics_that_are_no_numbers(models: LoRAModelManager, metrics: Any) -> None:
    with pytest.raises(FedloraError, match="metrics must be a dict of name -> finite number"):
        models.save_model(resnet(), "one", metrics=metrics)
    assert models.list_models() == []


def test_metrics_of_torch_are_numbers_too(models: LoRAModelManager) -> None:
    models.save_model(resnet(), "one", metrics={"a": torch.tensor(0.5)})  # type: ignore[dict-item]
    assert models.get_model_info("one")["metrics"] == {"a": 0.5}


def test_a_model_is_replaced_only_where_asked(models: LoRAModelManager) -> None:
    first, second = resnet(), resnet(size=1.0)
    models.save_model(first, "one")
    with pytest.raises(FedloraError, match="there is a model 'one' already"):
        models.save_model(second, "one")
    fresh = resnet(size=0.0)
    models.load_model("one", fresh)
    assert same(fresh, first)
    models.save_model(second, "one", overwrite=True)
    models.load_model("one", fresh)
    assert same(fresh, second)
    models.delete_model("one")
    assert not models.exists("one")
    assert [p.name for p in models.folder.iterdir()] == [".lock"]


def test_one_that_does_not_fit_changes_nothing(models: LoRAModelManager, folder: Path) -> None:
    models.save_model(adapted(folder, r=4, bias="all"), "other")
    lora = adapted(folder)
    shake(lora)
    before = dict(lora.state().tensors())
    with pytest.raises(FedloraError, match=r"set lora\.r=4.*set lora\.bias=all"):
        models.load_model("other", lora)
    assert all(torch.equal(t, before[n]) for n, t in lora.state().tensors())
    with pytest.raises(FedloraError, match=r"there is no model 'othr'; did you mean 'other'\?"):
        models.load_model("othr", lora)


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2)])
def test_what_is_not_wrapped(models: LoRAModelManager, thing: Any) -> None:
    said = (
        r"expected a LoRAWrapper or an object that one wraps.*; with lora\.enabled=false there is"
    )
    with pytest.raises(FedloraError, match=said):
        models.save_model(thing, "one")
    with pytest.raises(FedloraError, match="expected a LoRAWrapper or an object that one wraps"):
        models.load_model("one", thing)


def test_a_wrapped_object_without_an_adapter(models: LoRAModelManager, folder: Path) -> None:
    config = LoRAConfig(enabled=False)
    thing = CLIPLoRAWrapper(OwnClip(folder), config).apply_lora_to_federated_model()
    with pytest.raises(
        FedloraError, match=r"there is no adapter to save.*lora\.enabled|lora\.enabled.*to save"
    ):
        models.save_model(thing, "one")


def test_an_adapter_that_is_not_there_or_not_on(models: LoRAModelManager) -> None:
    with pytest.raises(FedloraError, match="there is no adapter to save: LoRA is off"):
        models.save_model(LoRAWrapper(SmallResNet(), LoRAConfig(enabled=False)).apply(), "one")
    with pytest.raises(FedloraError, match="not applied yet"):
        models.save_model(LoRAWrapper(SmallResNet()), "one")
    lora = resnet()
    lora.disable_lora_layers()
    with pytest.raises(FedloraError, match="is off"):
        models.save_model(lora, "one")
    assert models.list_models() == []


# Kills, other processes, other rights.


def test_a_kill_between_the_renames_loses_nothing(
    models: LoRAModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resnet()
    models.save_model(first, "one")
    rename = Path.rename

    def dies(self: Path, target: Path) -> Path:
        if self.name == ".one.tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            models.save_model(resnet(size=1.0), "one", overwrite=True)
    assert not (models.folder / "one").exists()
    assert models.exists("one")
    assert models.list_models() == ["one"]
    assert models.get_model_info("one")["name"] == "one"
    fresh = resnet(size=0.0)
    models.load_model("one", fresh)
    assert same(fresh, first)
    with pytest.raises(FedloraError, match="already"):
        models.save_model(fresh, "one")
    assert sorted(p.name for p in models.folder.iterdir()) == [".lock", "one"]


def test_a_kill_while_it_is_written(
    models: LoRAModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save_model(resnet(), "one")
    (models.folder / ".two.tmp").mkdir()
    (models.folder / ".two.tmp" / "half").write_text("x")
    assert models.list_models() == ["one"]
    assert not models.exists("two")
    monkeypatch.setattr("fedlora.export.sha256", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.save_model(resnet(), "one", overwrite=True)
    assert sorted(p.name for p in models.folder.iterdir()) == [".lock", "one"]


SAVER = """
import sys
import torch
from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig
from fedlora.modules.lora import LoRAWrapper
from fedlora.store import LoRAConfigManager, LoRAModelManager
root, me = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
lora = LoRAWrapper(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoRAConfig(r=1)).apply()
with torch.no_grad():
    for parameter in lora.trainable().values():
        parameter.fill_(me)
configs, models = LoRAConfigManager(root), LoRAModelManager(root)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(3):
    configs.save_config(LoRAConfig(r=me), f"own_{me}_{turn}")
    models.save_model(lora, f"own_{me}_{turn}")
    models.save_model(lora, "shared", overwrite=True, metrics={"me": me})
    configs.save_config(LoRAConfig(r=me), "shared", overwrite=True)
    models.load_model("shared", lora)
    values = {float(t.unique()) for t in lora.get_parameters().values()}
    assert len(values) == 1, values
    with torch.no_grad():
        for parameter in lora.trainable().values():
            parameter.fill_(me)
    for save in (lambda: models.save_model(lora, f"once_{turn}"),
                 lambda: configs.save_config(LoRAConfig(r=me), f"once_{turn}")):
        try:
            save()
            print("won", flush=True)
        except FedloraError as error:
            assert "already" in str(error)
"""


@pytest.mark.slow
def test_several_processes_at_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(me)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in (1, 2, 3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    won = 0
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        won += out.count("won")
    assert won == 2 * 3  # each name by exactly one of the three
    models, configs = LoRAModelManager(tmp_path), LoRAConfigManager(tmp_path)
    names = {f"own_{me}_{turn}" for me in (1, 2, 3) for turn in range(3)}
    names |= {f"once_{turn}" for turn in range(3)} | {"shared"}
    assert set(models.list_models()) == set(configs.list_configs()) == names
    hidden = [p.name for p in [*models.folder.iterdir(), *configs.folder.iterdir()]]
    assert {name for name in hidden if name.startswith(".")} == {".lock"}
    assert models.get_model_info("shared")["metrics"]["me"] in (1, 2, 3)


def let(folder: Path, directory: int, file: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(directory if path.is_dir() else file)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in this folder may be written, not even by root, who becomes nobody meanwhile."""
    let(folder, 0o555, 0o444)
    root = os.geteuid() == 0
    mine = {p: p.stat().st_mode & 0o7777 for p in folder.parents if "pytest" in str(p)}
    if root:
        for parent in mine:
            parent.chmod(0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
            for parent, mode in mine.items():
                parent.chmod(mode)
        let(folder, 0o755, 0o644)


@pytest.mark.parametrize("state", ["lock", "no lock", "killed"])
def test_a_read_only_folder_can_be_read(tmp_path: Path, state: str) -> None:
    configs, models = LoRAConfigManager(tmp_path / "s"), LoRAModelManager(tmp_path / "s")
    lora, fresh = resnet(), resnet(size=0.0)
    configs.save_config(LoRAConfig(r=3), "one")
    models.save_model(lora, "one")
    if state == "no lock":
        (models.folder / ".lock").unlink()
    if state == "killed":
        (models.folder / "one").rename(models.folder / ".one.old")
    with read_only(tmp_path / "s"):
        assert configs.load_config("one").r == 3
        assert models.list_models() == ["one"]
        assert models.get_model_info("one")["name"] == "one"
        models.load_model("one", fresh)
        for write in (
            lambda: models.save_model(lora, "two"),
            lambda: configs.save_config(LoRAConfig(), "two"),
            lambda: models.delete_model("one"),
        ):
            with pytest.raises(FedloraError, match=r"cannot write .*: Permission denied"):
                write()
    assert same(lora, fresh)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "configs").write_text("x")
    configs = LoRAConfigManager(tmp_path)
    assert configs.list_configs() == []
    with pytest.raises(FedloraError, match="cannot write"):
        configs.save_config(LoRAConfig(), "one")


def test_what_else_is_in_the_folder_is_no_model(models: LoRAModelManager) -> None:
    lora = resnet()
    models.save_model(lora, "one")
    (models.folder / "notes.txt").write_text("x")
    export_adapter(models.folder / "by_hand", lora, lora.state(), {})
    assert models.list_models() == ["by_hand", "one"]
    info = models.get_model_info("by_hand")
    assert info["metrics"] is None
    models.load_model("by_hand", lora)
