"""States of a run are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambamic.training.fit import WholeFiles


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    files = WholeFiles()
    files.save_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        files.save_checkpoint({"epoch": 2, "bad": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(path.parent.iterdir()) == [path]
