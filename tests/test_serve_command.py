from __future__ import annotations

import pytest

from mambamic.cli import main


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--backend", "cudaa", "invalid choice: 'cudaa'"),
        ("--device", "gpu", "invalid choice: 'gpu'"),
    ],
)
def test_a_name_that_does_not_exist_starts_nothing(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", option, value])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_an_ipv6_address_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "::1"]) == 2
    assert "0.0.0.0" in capsys.readouterr().err
