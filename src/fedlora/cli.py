"""``python -m fedlora {fit,validate,test,predict}``: LightningCLI around FederatedTrainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fedlora.arguments import TOOLS, complete
from fedlora.callbacks.ditto import Ditto
from fedlora.callbacks.proximal import FedProx
from fedlora.callbacks.scaffold import SCAFFOLD
from fedlora.data.datamodule import FederatedDataModule
from fedlora.data.partition import link_partitioner
from fedlora.errors import UsageError
from fedlora.explain import explain, known_names
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.trainer import FederatedTrainer

COMMANDS = ("fit", "validate", "test", "predict")
# A class that was imported can be named without its module: --trainer.callbacks+=FedProx
OBJECTIVES = (Ditto, FedProx, SCAFFOLD)


class FederatedCLI(LightningCLI):
    """LightningCLI for a trainer that is no ``Trainer``, without an optimizer shared by clients."""

    trainer: FederatedTrainer  # type: ignore[assignment]  # LightningCLI calls no more than its methods

    def __init__(self, args: Sequence[str]) -> None:
        self._first = next(iter(args), None)
        options: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
        super().__init__(
            CLIPLoRAClassifier,
            FederatedDataModule,
            trainer_class=FederatedTrainer,  # type: ignore[arg-type]
            save_config_callback=None,  # the trainer writes it, into the run folder
            seed_everything_default=0,
            parser_kwargs={**options, **{name: dict(options) for name in COMMANDS}},
            args=list(args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of their methods that are made from the sections."""
        return {name: {"model", "datamodule"} for name in COMMANDS}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Name the side tools in the help beside the commands; they run without this class."""
        super()._add_subcommands(parser, **kwargs)
        commands: Any = parser._subcommands_action
        for name, (_, description) in TOOLS.items():
            commands.add_subcommand(name, ArgumentParser(), help=description)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """A command's parser, empty where another command comes first and so is the one to run."""
        if self._first in COMMANDS and self._first != subcommand:
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections ``trainer``, ``model`` and ``data``."""
        parser.add_class_arguments(FederatedTrainer, "trainer", instantiate=False)
        parser.add_lightning_class_args(CLIPLoRAClassifier, "model")
        parser.add_lightning_class_args(FederatedDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--quiet``, and one seed and one number of clients for all."""
        parser.add_argument("--quiet", action="store_true", help="Print nothing but errors.")
        parser.link_arguments("seed_everything", "trainer.seed")
        link_partitioner(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a mistake becomes one line with the nearest name that exists."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            command = next((arg for arg in args if arg in COMMANDS), None)
            known = (
                known_names(self._subcommand_parsers[command]) if command else {*COMMANDS, *TOOLS}
            )
            raise UsageError(explain(error, known)) from error

    def _parse_ckpt_path(self) -> None:
        """Checkpoints are read by the trainer alone, which checks them."""

    def _set_seed(self) -> None:
        """Nothing is drawn from global generators: every seed is derived where it is used."""

    def instantiate_trainer(self, **kwargs: Any) -> FederatedTrainer:  # type: ignore[override]
        """The trainer, which is told the whole resolved configuration."""
        config = self.config[self.subcommand]
        settings = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if config["quiet"]:
            settings["progress"] = "off"
        trainer = FederatedTrainer(**settings)
        self._dump_config()
        kept = {
            name: self.config_dump[name] for name in ("seed_everything", "trainer", "model", "data")
        }
        trainer.config = kept
        trainer.config_text = yaml.safe_dump(kept, sort_keys=False)
        return trainer


def run(args: Sequence[str]) -> None:
    """Parse a command line and run its command.

    Raises:
        UsageError: for a wrong command line.
        FedloraError: for input that cannot be used.
    """
    _calm()
    FederatedCLI(complete(args))


def _calm() -> None:
    """Keep libraries' chatter out of the way of our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    for name in ("lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
