from __future__ import annotations

import pytest
from ts.service import Service

from mambamic.errors import ServerError
from mambamic.handlers.parts import Part, keep_parts


def test_what_the_dictionary_loses_is_kept() -> None:
    keep_parts()
    request = {
        "requestId": b"1",
        "headers": [{"name": b"Content-Length", "value": b"12"}],
        "parameters": [
            {"name": "image", "contentType": "image/png", "value": bytearray(b"one")},
            {"name": "image", "contentType": "", "value": bytearray(b"two")},
        ],
    }
    empty = {"requestId": b"2", "headers": [], "parameters": []}
    (first, second), inputs, ids = Service.retrieve_data_for_inference([request, empty])
    assert inputs == [{"image": b"two"}, {}]  # TorchServe itself has lost one by here
    assert first.parts == [Part("image", "image/png", b"one"), Part("image", "", b"two")]
    assert first.headers == {"content-length": "12"}
    assert second.parts == []
    assert ids == {0: "1", 1: "2"}


def test_calling_it_again_changes_nothing() -> None:
    keep_parts()
    installed = Service.retrieve_data_for_inference
    keep_parts()
    assert Service.retrieve_data_for_inference is installed


def test_another_torchserve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Service, "retrieve_data_for_inference")
    with pytest.raises(ServerError, match=r"0\.12\.0"):
        keep_parts()
