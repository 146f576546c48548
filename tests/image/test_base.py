"""Our own Debian comes out of its packages to the bit, wherever it is made. Needs mmdebstrap and the fetched packages; a minute."""

import shutil

import pytest

from ops.errors import PreflightError
from ops.image import assemble
from ops.image import workflow as build
from ops.image.fetch import debian
from ops.image.spec.paths import Places

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def elsewhere(tmp_path):
    """A checkout with the real packages and nothing made yet."""
    if not shutil.which("mmdebstrap"):
        pytest.skip("mmdebstrap is not installed")
    here, there = Places(), Places(tmp_path)
    if not all(debian.where(deb, here.debs).is_file() for deb in build.read_lock("practice").debs):
        pytest.skip("the packages were not fetched: make image")
    there.cache.mkdir(parents=True)
    there.debs.symlink_to(here.debs)
    return there


def test_debian_comes_out_as_the_lock_says(elsewhere, monkeypatch):
    """Whatever its maker's environment says to Python."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    found, spec = build.read_lock("practice"), build.define("practice")
    made = assemble.base(found.layers[0], found, spec, elsewhere, lambda line: None)
    assert made == found.layers[0]
    assert sorted(path.name for path in elsewhere.blobs.iterdir()) == [made.blob_sha256]


def test_a_package_that_was_not_fetched_is_named(elsewhere):
    found, spec = build.read_lock("practice"), build.define("practice")
    elsewhere.debs.unlink()
    elsewhere.debs.mkdir()
    with pytest.raises(PreflightError, match=r"adduser .* was not fetched"):
        assemble.base(None, found, spec, elsewhere, lambda line: None)
    assert list(elsewhere.blobs.iterdir()) == []
