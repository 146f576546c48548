"""Archives that plain `docker load` takes: their form, and that nothing but their contents is in
their bytes.
"""

import gzip
import hashlib
import io
import json
import tarfile

import pytest

from ops.image.bundle import archive
from ops.image.bundle.archive import Image, Layer


@pytest.fixture
def image(tmp_path):
    stacked = []
    for name in ("base", "middle", "top"):
        tar = name.encode() * 1000
        path = tmp_path / name
        path.write_bytes(gzip.compress(tar, mtime=0))
        blob = path.read_bytes()
        stacked.append(
            Layer(
                name,
                archive.digest(tar),
                hashlib.sha256(blob).hexdigest(),
                len(blob),
                path,
                len(tar),
            )
        )
    config = {
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in stacked]},
        "history": [{"created_by": x.name} for x in stacked],
    }
    return Image(archive.canonical_json(config), tuple(stacked), "milktea/test:1")


def read(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def archived(image, carry=None):
    out = io.BytesIO()
    archive.write_archive(image, out, carry)
    return out.getvalue()


def test_a_part_lists_the_layers_below_it_and_carries_its_own_alone(image):
    files = read(archived(archive.prefix(image, 2, "milktea/test:part-02"), [2]))
    [docker] = json.loads(files["manifest.json"])
    assert docker["RepoTags"] == ["milktea/test:part-02"]
    assert docker["Layers"] == [f"blobs/sha256/{layer.blob_sha256}" for layer in image.layers[:2]]
    assert [path for path in docker["Layers"] if path in files] == [
        f"blobs/sha256/{image.layers[1].blob_sha256}"
    ]
    config = json.loads(files[docker["Config"]])
    assert config["rootfs"]["diff_ids"] == image.diff_ids[:2]
    assert len(config["history"]) == 2


def test_the_last_part_is_the_image_itself(image):
    files = read(archived(archive.prefix(image, 3, image.tag), [3]))
    [docker] = json.loads(files["manifest.json"])
    assert docker["RepoTags"] == ["milktea/test:1"]
    assert files[docker["Config"]] == image.config_json_bytes


def test_every_blob_of_the_layout_has_the_digest_that_names_it(image):
    files = read(archived(image))
    blobs = {
        name.rpartition("/")[2]: data for name, data in files.items() if name.startswith("blobs/")
    }
    assert len(blobs) == 5
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in blobs.items())
    [manifest] = json.loads(files["index.json"])["manifests"]
    assert manifest["digest"] == image.manifest_digest
    assert manifest["annotations"]["io.containerd.image.name"] == "docker.io/milktea/test:1"
    assert "oci-layout" in files


def test_an_archive_is_a_whole_tar_whatever_it_carries(image):
    for carry in (None, [1], [3], []):
        data = archived(image, carry)
        assert data.endswith(bytes(2 * tarfile.BLOCKSIZE)) and len(data) % tarfile.BLOCKSIZE == 0


def test_a_layer_that_is_not_as_long_as_locked_is_refused(image):
    image.layers[0].path.write_bytes(b"short")
    with pytest.raises(OSError, match="has 5 bytes, the lock says"):
        archive.write_archive(image, io.BytesIO(), [1])


def test_part_numbers_start_at_one(image):
    with pytest.raises(ValueError, match="part 0 of an image with 3 layers"):
        archive.prefix(image, 0, "x:1")
