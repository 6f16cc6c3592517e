from __future__ import annotations

import subprocess
import sys

import pytest

from mambamic.backends import BACKENDS
from mambamic.cli import main


def test_a_name_that_does_not_exist_is_told_before_the_checkpoint_is_opened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["predict", "no checkpoint", "cell.png", "--backend", "onyx"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "'onyx'" in said
    assert all(name in said for name in BACKENDS)


def test_names_need_no_torch() -> None:
    program = "import sys, mambamic.backends as b; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
