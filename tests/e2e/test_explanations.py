"""Pictures and embeddings from a real server."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from mambamic import Classifier
from mambamic.images import decode

from .servers import RunningServer, post


def test_a_picture_and_the_same_as_json(
    quick: RunningServer, cell: bytes, cell_image: Image.Image
) -> None:
    url = f"http://127.0.0.1:{quick.port}/explanations/mambamic"
    drawn = post(url, fields={"image": ("cell.png", cell, "image/png")})
    assert drawn.status == 200, drawn.data
    assert drawn.headers["Content-Type"].startswith("image/png")
    picture = Image.open(io.BytesIO(drawn.data))
    assert picture.width >= cell_image.width
    assert picture.height > cell_image.height

    told = post(
        url,
        # Text fields as curl sends -F class=c.
        fields={
            "class": "c",
            "method": "integrated-gradients",
            "image": ("cell.png", cell, "image/png"),
        },
        headers={"Accept": "application/json"},
    )
    assert told.status == 200, told.data
    answer = json.loads(told.data)
    assert (answer["explained"], answer["method"]) == ("c", "integrated-gradients")
    assert answer["model"] == "mambamic"
    assert base64.b64decode(answer["overlay_png"]).startswith(b"\x89PNG")

    wrong = post(url, fields={"image": ("cell.png", cell, "image/png"), "class": "leucocyte"})
    assert wrong.status == 400
    assert "leucocyte" in json.loads(wrong.data)["error"]["message"]


def test_embeddings_by_form_field(
    quick: RunningServer, cell: bytes, quick_checkpoint: Path
) -> None:
    url = f"http://127.0.0.1:{quick.port}/predictions/mambamic"
    reply = post(url, fields={"image": ("cell.png", cell, "image/png"), "embedding": "1"})
    assert reply.status == 200, reply.data
    classifier = Classifier.load(quick_checkpoint, device="cpu")
    pixels = classifier.preprocess.pixels(decode(cell))
    (expected,) = classifier.embeddings(pixels[None])
    found = json.loads(reply.data)["embedding"]
    assert len(found) == len(expected)
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()
