"""From what the user names to a model: a checkpoint, a folder of the zoo, or a server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mambamic.errors import UsageError
from mambamic.slides.scorers import CheckpointScorer, Scorer, checkpoint_facts
from mambamic.slides.settings import ModelFacts
from mambamic.slides.wsinfer import WsinferScorer, is_wsinfer, wsinfer_facts


@dataclass(frozen=True)
class ModelChoice:
    """A model as the user names it.

    Args:
        folder: A checkpoint, an ONNX file of one, or a model of the WSInfer zoo.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: Of a checkpoint: ``auto``, ``float32``, ``float16`` or ``bfloat16``.
        embeddings: Whether to keep what the network's head sees.
        head: Of a model of the zoo.
        trust: Whether its code may run.
    """

    folder: Path
    device: str = "auto"
    dtype: str = "auto"
    embeddings: bool = False
    head: str | None = None
    trust: bool = False

    def facts(self) -> ModelFacts:
        """Read what a run has to know of the model before it is loaded.

        Raises:
            CheckpointError: It is damaged.
            UsageError: Something that it does not state is missing in the call.
        """
        if not is_wsinfer(self.folder):
            if self.head is not None:
                raise UsageError(
                    f"--head {self.head} for a checkpoint, which states its own",
                    "--head with a model of the WSInfer zoo",
                    "leave it out",
                )
            facts = checkpoint_facts(self.folder)
            # A stated type is a wish for other scores; auto takes whatever the device is best at.
            if self.dtype == "auto":
                return facts
            return replace(facts, identity=f"{facts.identity} {self.dtype}")
        if self.embeddings:
            raise UsageError(
                "--embeddings with TorchScript, which has its outputs only",
                "a checkpoint",
                "leave it out",
            )
        return wsinfer_facts(self.folder, self.head)

    def load(self) -> Scorer:
        """Load the model.

        Raises:
            MambamicError: It is damaged, not trusted, or its device is not here.
        """
        if is_wsinfer(self.folder):
            return WsinferScorer(self.folder, self.facts(), self.device, trust=self.trust)
        return CheckpointScorer(self.folder, self.device, self.dtype, embeddings=self.embeddings)
