"""Calling callbacks, Lightning's among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from fedlora.callbacks.base import FederatedCallback
from fedlora.errors import FedloraError


class Hooks:
    """Calls the hooks of callbacks, in their order; a hook that nobody overrides costs nothing.

    Args:
        callbacks: the callbacks.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)
        self._overridden: dict[str, list[Callback]] = {}

    def __call__(self, hook: str, trainer: Any, module: Any, *args: Any) -> None:
        """Call ``hook`` of every callback that has it.

        Raises:
            FedloraError: when a callback reads what this trainer lacks; names both.
        """
        for callback in self._having(hook):
            try:
                getattr(callback, hook)(trainer, module, *args)
            except AttributeError as error:
                if error.obj is not trainer:
                    raise
                raise FedloraError(
                    f"the callback {type(callback).__name__} needs trainer.{error.name} in {hook}, "
                    "which FederatedTrainer does not have. Leave that callback out, or use it with "
                    "lightning.Trainer."
                ) from error

    def _having(self, hook: str) -> list[Callback]:
        if hook not in self._overridden:
            plain = (getattr(Callback, hook, None), getattr(FederatedCallback, hook, None))
            self._overridden[hook] = [
                callback for callback in self.callbacks if _function(callback, hook) not in plain
            ]
        return self._overridden[hook]

    def state_dict(self) -> dict[str, Any]:
        """The state of each callback that has one, by its ``state_key``."""
        return {c.state_key: state for c in self.callbacks if (state := c.state_dict())}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Give each callback its state back."""
        for callback in self.callbacks:
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])


def _function(callback: Callback, hook: str) -> Any:
    # Lightning's LambdaCallback puts its hooks on the instance, where they are no methods.
    method = getattr(callback, hook, None)
    return getattr(method, "__func__", method)
