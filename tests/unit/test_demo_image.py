"""The images of the demo: the same bytes each time, and a clear word where they cannot be made."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from mcp.demo.image import Image, archive, crasher_image, digest, script_image, web_image
from mcp.model.errors import AdapterError

needs_busybox = pytest.mark.skipif(shutil.which("busybox") is None, reason="apt-get install busybox-static")


def files(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return {
            member.name: (opened.extractfile(member) or io.BytesIO()).read() for member in opened if member.isfile()
        }


@needs_busybox
def test_an_image_is_the_same_to_the_byte_each_time() -> None:
    assert archive([web_image("v1")]) == archive([web_image("v1")])
    assert web_image("v1").id != web_image("v2").id


@needs_busybox
def test_an_archive_has_what_an_engine_looks_for_and_shared_layers_once() -> None:
    images = [web_image("v1"), web_image("v2"), crasher_image()]
    found = files(archive(images))
    manifest = json.loads(found["manifest.json"])
    assert [entry["RepoTags"] for entry in manifest] == [
        ["localhost/web:v1"],
        ["localhost/web:v2"],
        ["localhost/crasher:v1"],
    ]
    for entry, image in zip(manifest, images, strict=True):
        assert digest(found[entry["Config"]]) == image.id
        layers = [digest(found[layer]) for layer in entry["Layers"]]
        assert layers == json.loads(image.config)["rootfs"]["diff_ids"]
    assert len(found) == 1 + 3 + 4  # the manifest, three configurations, the base and three scripts


@needs_busybox
def test_a_web_image_says_its_version_and_listens_on_its_port() -> None:
    script = files(web_image("v7").layers[1])["entry"].decode()
    assert "web v7" in script
    assert '"${PORT:-8080}"' in script
    assert "VERSION" not in script


def test_without_busybox_the_operator_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        script_image("localhost/x:v1", "", busybox=str(tmp_path / "none"))
    assert (caught.value.code, "apt-get install busybox-static" in caught.value.hint) == ("no_busybox", True)


def test_a_busybox_that_needs_libraries_is_refused(tmp_path: Path) -> None:
    dynamic = tmp_path / "busybox"
    dynamic.write_bytes(b"\x7fELF" + b"\0" * 600 + b"/lib64/ld-linux-x86-64.so.2\0" + b"\0" * 5000)
    with pytest.raises(AdapterError, match="needs shared libraries"):
        script_image("localhost/x:v1", "", busybox=str(dynamic))


def test_an_image_is_called_by_the_digest_of_its_configuration() -> None:
    assert Image(name="x:1", config=b"{}", layers=()).id == digest(b"{}")
