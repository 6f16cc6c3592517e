"""A folder or ZIP whose every image is one tile."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from PIL import Image

from mambamic.errors import DecodeError, MambamicError, SlideError, TooLargeError
from mambamic.images import decode
from mambamic.slides.inputs import IMAGE_SUFFIXES, without_results

_SUFFIXES = IMAGE_SUFFIXES | {".tif", ".tiff"}
_MAX_BYTES = 512 * 2**20  # of one image, expanded


class TileSet:
    """The images of a folder, through all levels, or of a ZIP archive.

    Args:
        path: The folder or archive.

    Raises:
        SlideError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_dir():
            return
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise self._not_opened(error) from error

    def names(self) -> list[str]:
        """List the images, in order; a folder may change from one call to the next.

        Raises:
            SlideError: The folder cannot be read, or no image is there.
        """
        try:
            found = self._files()
        except OSError as error:
            raise self._not_opened(error) from error
        names = sorted({name for name in found if _is_tile(name)})
        if not names:
            raise SlideError(
                f"no image in {self._path.name}",
                "files that end in " + " ".join(sorted(_SUFFIXES)),
                "check the path",
            )
        return names

    def _files(self) -> list[str]:
        if self._archive is not None:
            return [info.filename for info in self._archive.infolist() if not info.is_dir()]
        files = without_results(file for file in self._path.rglob("*") if file.is_file())
        return [file.relative_to(self._path).as_posix() for file in files]

    def _not_opened(self, error: Exception) -> SlideError:
        return SlideError(
            f"{self._path.name} cannot be opened ({error})", "a folder or ZIP of images", "check it"
        )

    def read(self, name: str) -> Image.Image:
        """Decode one image as the server does.

        Raises:
            MambamicError: It is not there, or cannot be read or decoded.
        """
        return decode(self._bytes(name))

    def _bytes(self, name: str) -> bytes:
        try:
            if self._archive is None:
                return (self._path / name).read_bytes()
            info = self._archive.getinfo(name)
            if info.file_size > _MAX_BYTES:
                raise TooLargeError(
                    f"{info.file_size} bytes", f"at most {_MAX_BYTES}", "cut it into tiles"
                )
            with self._archive.open(info) as member:
                # What the header says of its size is only its word.
                return member.read(info.file_size + 1)
        except MambamicError:
            raise
        # zipfile raises RuntimeError for passwords and NotImplementedError for methods it lacks.
        except Exception as error:
            raise DecodeError(
                f"it cannot be read ({error})", "an image", "pack it again"
            ) from error

    def fingerprint(self) -> str:
        """Hash the names and sizes of all images, and the content of as many as fit in 64 MiB.

        One that cannot be read does not keep the others from being scored.
        """
        digest, left = hashlib.sha256(), 64 * 2**20
        for name in self.names():
            digest.update(name.encode() + b"\0")
            if self._archive is not None:
                info = self._archive.getinfo(name)
                digest.update(f"{info.file_size} {info.CRC}".encode())
                continue
            try:
                size = (self._path / name).stat().st_size
                content = (self._path / name).read_bytes() if size <= left else b""
            except OSError:
                digest.update(b"unreadable")
                continue
            left -= len(content)
            digest.update(str(size).encode() + content)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the archive."""
        if self._archive is not None:
            self._archive.close()


def _is_tile(name: str) -> bool:
    *folders, last = name.split("/")
    hidden = last.startswith(".") or "__MACOSX" in folders
    return not hidden and Path(last).suffix.lower() in _SUFFIXES
