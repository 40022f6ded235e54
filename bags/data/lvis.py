"""Downloads of LVIS from its official sources: annotations and COCO's images. Interrupted downloads resume.

Command:  python scripts/prepare_data.py lvis --root data/lvis --version v1
"""

import http.client
import os
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from bags.core import locks
from bags.core.errors import UserError
from bags.core.progress import Progress

ANNOTATIONS = "https://dl.fbaipublicfiles.com/LVIS/"
IMAGES = "http://images.cocodataset.org/zips/"
FILES = {  # archive -> the file in it
    "v0.5": {
        f"{ANNOTATIONS}lvis_v0.5_train.json.zip": "lvis_v0.5_train.json",
        f"{ANNOTATIONS}lvis_v0.5_val.json.zip": "lvis_v0.5_val.json",
    },
    "v1": {
        f"{ANNOTATIONS}lvis_v1_train.json.zip": "lvis_v1_train.json",
        f"{ANNOTATIONS}lvis_v1_val.json.zip": "lvis_v1_val.json",
    },
}
IMAGE_FILES = {f"{IMAGES}train2017.zip": "train2017", f"{IMAGES}val2017.zip": "val2017"}
CHUNK = 2**20


def fetch_lvis(root: Path, version: str, images: bool = True) -> list[str]:
    """Fetch and unpack the files that are missing in `root`, and return a line for each file.

    Archives are verified by their own checksums (CRC-32 of every member). Raises UserError, which names the missing
    file and its source, if the source cannot be reached.
    """
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for url, name in {**FILES[version], **(IMAGE_FILES if images else {})}.items():
        if (root / name).exists():
            lines.append(f"{root / name}: exists already")
            continue
        with locks.waiting(root):
            if not (root / name).exists():  # no other process has fetched it meanwhile
                _fetch(url, root, name)
        lines.append(f"{root / name}: fetched")
    return lines


def _fetch(url: str, root: Path, name: str) -> None:
    """Fetch and unpack one archive, in a folder that this process has locked."""
    archive = root / url.rsplit("/", 1)[1]
    try:
        download(url, archive)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{root / name}: missing, and {url} cannot be fetched ({error}); fetch it elsewhere and "
            f"put the archive at {archive}, then run this again"
        ) from None
    unpack(archive, root, name)
    archive.unlink()


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`, which appears when it is complete; an interrupted download resumes."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        whole = error.headers.get("Content-Range", "").rpartition("/")[2]
        if whole == str(done):  # no bytes are left to ask for: the part is complete
            os.replace(part, path)
            return
        part.unlink()
        raise OSError(f"{part} was not a part of it and has been removed; run this again") from None
    resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
    if response.status == 206 and not resumes:
        raise OSError(f"the server sent {response.headers.get('Content-Range')}, not the bytes from {done} on")
    with response, part.open("ab" if resumes else "wb") as file:
        done = done if resumes else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with Progress(total=total, initial=done, unit="B", unit_scale=True, desc=path.name) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and file.tell() != total:
            raise OSError(f"connection ended after {file.tell()} of {total} bytes; run this again to resume")
    os.replace(part, path)


def unpack(archive: Path, root: Path, name: str) -> None:
    """Check an archive and extract the file or folder `name`, which appears when it is complete."""
    temporary = root / f"{name}.partial"
    try:
        with zipfile.ZipFile(archive) as file:
            members = [m for m in file.namelist() if m == name or m.startswith(f"{name}/")]
            if not members or any(".." in Path(m).parts or Path(m).is_absolute() for m in members):
                raise UserError(f"{archive}: holds no {name}, or names that lead out of the folder; remove it")
            for member in Progress(members, desc=f"unpacking {archive.name}", unit="file"):
                file.extract(member, temporary)  # checks the CRC-32
            os.replace(temporary / name, root / name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive}: damaged ({error}); remove it and run this again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
