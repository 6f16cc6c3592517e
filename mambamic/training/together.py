"""What Lightning is told of several processes. Apart from ``ranks``, which start without it."""

from __future__ import annotations

import signal

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from mambamic.training.share import Share


class _Place(LightningEnvironment):
    """Tells Lightning which of the processes this is, and that it need not start them."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._share.rank

    def node_rank(self) -> int:
        return 0


class Together(DDPStrategy):
    """Lightning's strategy for several processes, without its wrapper around the model.

    The training module averages the gradients itself, in one exchange after the backward pass. The
    wrapper's hooks would have to be set up around the capture of CUDA graphs, and what they gain,
    exchanging while the backward pass still runs, is a fraction of a millisecond for models of
    this size.
    """

    def __init__(self, share: Share) -> None:
        super().__init__(cluster_environment=_Place(share))

    def _configure_launcher(self) -> None:
        self._launcher = None

    def setup_distributed(self) -> None:
        """Tell Lightning the ranks; the processes have met already."""
        self.set_world_ranks()

    def setup(self, trainer: pl.Trainer) -> None:
        """Let no process ask the others before every step whether one was told to stop.

        Lightning waits for the answer: each device would be idle while its host prepares the next
        step, which takes as long as a third of the step itself.
        """
        super().setup(trainer)
        trainer.fit_loop.epoch_loop.__dict__["_broadcast_sigterm_tensor"] = _nobody_asks

    def on_train_start(self) -> None:
        """End at once when told to stop, whatever the others do: the parent then ends them all."""
        super().on_train_start()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def configure_ddp(self) -> None:
        """Leave the model unwrapped."""


def _nobody_asks() -> None:
    pass
