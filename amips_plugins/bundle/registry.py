"""The registry: where bundles are published, a folder or any fsspec URL.

::

    <root>/<database>[@<namespace>]/<collection>/<field>/
        latest.json              the version that serves, and those that served before it
        .lock                    in a local folder: held while latest.json is changed
        <version>/manifest.json  written last: a version without it does not exist
        <version>/manifest.sig   who made it, where it is signed
        <version>/...            the files it names

A version is written under a name that nobody reads until ``latest.json`` is replaced, in one step,
to name it. A reader sees the old version or the new one, never half of one.

``latest.json`` is read, changed and replaced. In a local folder a lock makes one writer wait for
the other. Object stores have none: of two that write it in the same moment the last one wins. The
other's version is there, but does not serve and is missing from the history, or its pin is gone;
``current`` and ``pinned`` tell, and the same call again mends it. No reader notices.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from amips_plugins.bundle.manifest import MANIFEST, MANIFEST_LIMIT, SIGNATURE
from amips_plugins.bundle.package import Bundle
from amips_plugins.bundle.signing import SIGNATURE_LIMIT, Signer, signature_check
from amips_plugins.collection import CollectionKey
from amips_plugins.errors import BundleCorrupt, BundleError, BundleNotFound, InvalidInput
from amips_plugins.files import held, read_file, replace_file

__all__ = ["Registry", "default_registry"]

_LATEST = "latest.json"
_LOCK = ".lock"
_HISTORY = 50  # versions that it remembers


class _Latest(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    previous: list[str] = []
    pinned: bool = False


def default_registry() -> str:
    """Return ``$AMIPS_REGISTRY``, or the folder ``registry`` where the program runs."""
    return os.environ.get("AMIPS_REGISTRY", "registry")


class Registry:
    """Bundles by collection and version.

    Parameters
    ----------
    root
        A folder, or an fsspec URL such as ``s3://bucket/models`` (whose protocol package has to
        be installed). Left out: ``default_registry()``.
    require_signature
        Who has to have signed what is opened or published here: the path of a public key (PEM), a
        ``signing.SigstoreIdentity``, or several of them, of which any one will do. Left out: whom
        ``AMIPS_REQUIRE_SIGNATURE`` names (see ``signing.signature_check``), or else no one.

    Raises
    ------
    InvalidInput
        It cannot be opened, the URL has credentials in it, or a signer cannot be used.
    MissingExtra
        Signatures are required, and model-signing is not installed.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        require_signature: Signer | Sequence[Signer] | None = None,
    ) -> None:
        import fsspec

        self.root = str(root) if root is not None else default_registry()
        if "://" in self.root and "@" in self.root.partition("://")[2].partition("/")[0]:
            raise InvalidInput(
                "Credentials do not belong into a registry's URL, where logs would show them; give "
                "them to its storage, by its own environment variables or fsspec's configuration."
            )
        try:
            self._fs, path = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as exc:
            raise InvalidInput(f"The registry {self.root!r} cannot be opened: {exc}") from exc
        self._path: str = path
        self._local = "file" in _protocols(self._fs)
        self._check = signature_check(require_signature)

    def publish(self, folder: str | Path, *, dry_run: bool = False) -> str:
        """Publish a bundle and make it the latest, unless the collection is pinned.

        It is loaded first, as the services will, so that what is published can serve. The same
        call again changes nothing, finishes what was interrupted, or adds or replaces the
        signature; one without a signature leaves that of the registry.

        Parameters
        ----------
        folder
            The bundle, as training wrote it, and its signature if there is one.
        dry_run
            Refuse what would be refused, and write nothing.

        Returns
        -------
        str
            Its version.

        Raises
        ------
        BundleNotFound, BundleCorrupt
            The folder holds no sound bundle; nothing is published.
        BundleUnsigned
            A signature is required and it has none; nothing is published.
        InvalidInput
            The registry holds another bundle under this version.
        """
        from amips_plugins.bundle.loading import (
            check_loads,
        )  # imports ONNX Runtime, as no reader must

        source = Path(folder)
        bundle = Bundle.in_folder(source, self._check)
        check_loads(bundle)
        manifest, signature = bundle.manifest, _signature_in(source)
        home = self._home(manifest.collection)
        path = f"{home}/{manifest.version}/{MANIFEST}"
        exists = self._fs.exists(path)
        if exists and self._read(path) != bundle.content:
            raise InvalidInput(
                f"The registry {self.root} holds another bundle as version {manifest.version}; "
                f"train again to get a version of its own."
            )
        if dry_run:
            return manifest.version
        if signature is not None:  # before the manifest, so that no reader misses it
            self._write(f"{home}/{manifest.version}/{SIGNATURE}", signature)
        if not exists:
            for name in manifest.files:
                self._write(f"{home}/{manifest.version}/{name}", bundle.read(name))
            self._write(path, bundle.content)
        with self._changing(manifest.collection):
            latest = self._latest(manifest.collection)
            if latest is None or not latest.pinned:
                self._point(manifest.collection, manifest.version, pinned=False)
        return manifest.version

    def versions(self, key: CollectionKey) -> list[str]:
        """Return the complete versions of a collection, oldest first."""
        home = self._home(key)
        self._fs.invalidate_cache()
        if not self._fs.isdir(home):
            return []
        names = [posixpath.basename(path.rstrip("/")) for path in self._fs.ls(home, detail=False)]
        return sorted(n for n in names if self._fs.exists(f"{home}/{n}/{MANIFEST}"))

    def signed(self, key: CollectionKey, version: str) -> bool:
        """Return whether a signature lies with a version. Whose it is, ``open`` finds out."""
        return bool(self._fs.exists(f"{self._home(key)}/{_safe(version)}/{SIGNATURE}"))

    def current(self, key: CollectionKey) -> str | None:
        """Return the version that serves, or None."""
        latest = self._latest(key)
        return None if latest is None else latest.version

    def pinned(self, key: CollectionKey) -> bool:
        """Return whether the version that serves is held against newer ones."""
        latest = self._latest(key)
        return latest is not None and latest.pinned

    def previous(self, key: CollectionKey) -> str | None:
        """Return the version that ``roll_back`` would serve, or None."""
        latest = self._latest(key)
        return latest.previous[-1] if latest is not None and latest.previous else None

    def open(self, key: CollectionKey, version: str | None = None) -> Bundle:
        """Open a version, or the one that serves.

        Raises
        ------
        BundleNotFound
            Nothing is published for the collection, or not this version.
        BundleCorrupt
            The bundle is not sound, or lies under the name of another version.
        BundleUnsigned
            A signature is required, and the bundle has none.
        """
        chosen = version if version is not None else self.current(key)
        if chosen is None:
            raise BundleNotFound(
                f"The registry {self.root} holds no bundle for {key.database} collection "
                f"{key.name!r}, field {key.field!r}; train one and run: amips publish."
            )
        home = f"{self._home(key)}/{_safe(chosen)}"
        bundle = Bundle.open(
            home, lambda name, limit: self._read(f"{home}/{name}", limit), self._check
        )
        if bundle.manifest.version != chosen:  # an older one, put in the place of what was signed
            raise BundleCorrupt(
                f"The bundle at {home} is version {bundle.manifest.version}; publish it again."
            )
        return bundle

    def pin(self, key: CollectionKey, version: str) -> None:
        """Serve this version, whatever is published later."""
        self._require(key, version)
        with self._changing(key):
            self._point(key, version, pinned=True)

    def unpin(self, key: CollectionKey) -> str:
        """Serve the newest version again, and every later one; return it."""
        if not self.versions(key):
            raise BundleNotFound(f"The registry {self.root} holds no bundle for {key.name!r}.")
        with self._changing(key):
            newest = self.versions(key)[-1]
            self._point(key, newest, pinned=False)
        return newest

    def roll_back(self, key: CollectionKey) -> str:
        """Serve the version that served before the current one; return it."""
        self._earlier(key)  # before the lock, whose folder may not be there
        with self._changing(key):
            latest = self._earlier(key)
            *earlier, target = latest.previous
            self._require(key, target)
            self._store(key, _Latest(version=target, previous=earlier, pinned=latest.pinned))
        return target

    def _earlier(self, key: CollectionKey) -> _Latest:
        latest = self._latest(key)
        if latest is None or not latest.previous:
            raise BundleNotFound(
                f"No earlier version of {key.name!r} has served; nothing to roll back."
            )
        return latest

    def _require(self, key: CollectionKey, version: str) -> None:
        if version not in self.versions(key):
            known = ", ".join(self.versions(key)) or "none"
            raise BundleNotFound(
                f"There is no version {version!r} of {key.name!r}; there are: {known}."
            )

    def _home(self, key: CollectionKey) -> str:
        database = _safe(key.database) + (f"@{_safe(key.namespace)}" if key.namespace else "")
        return "/".join([self._path, database, _safe(key.name), _safe(key.field)])

    def _latest(self, key: CollectionKey) -> _Latest | None:
        path = f"{self._home(key)}/{_LATEST}"
        try:
            return msgspec.json.decode(self._read(path), type=_Latest)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise BundleCorrupt(
                f"{path} cannot be read ({exc}); pin a version to mend it."
            ) from exc

    @contextmanager
    def _changing(self, key: CollectionKey) -> Iterator[None]:
        """Be the only one on this machine to change what serves; the collection has versions."""
        if not self._local:
            yield
            return
        with held(Path(self._home(key)) / _LOCK):
            yield

    def _point(self, key: CollectionKey, version: str, *, pinned: bool) -> None:
        try:
            latest = self._latest(key)
        except BundleError:
            latest = None
        previous = [] if latest is None else list(latest.previous)
        if latest is not None and latest.version != version:
            previous.append(latest.version)
        self._store(key, _Latest(version=version, previous=previous[-_HISTORY:], pinned=pinned))

    def _store(self, key: CollectionKey, latest: _Latest) -> None:
        self._write(f"{self._home(key)}/{_LATEST}", msgspec.json.encode(latest))

    def _read(self, path: str, limit: int = MANIFEST_LIMIT) -> bytes:
        """Read a file, and no more than one byte past a limit of it."""
        if self._local:
            return read_file(Path(path), limit)
        data: bytes = self._fs.cat_file(path, start=0, end=limit + 1)
        return data

    def _write(self, path: str, data: bytes) -> None:
        """Create or replace a file in one step (object stores do so with a single put)."""
        if self._local:
            replace_file(Path(path), data)
        else:
            self._fs.pipe_file(path, data)


def _signature_in(folder: Path) -> bytes | None:
    try:
        data = read_file(folder / SIGNATURE, SIGNATURE_LIMIT)
    except FileNotFoundError:
        return None
    if len(data) > SIGNATURE_LIMIT:
        raise BundleCorrupt(f"The signature in {folder} is larger than {SIGNATURE_LIMIT} bytes.")
    return data


def _safe(part: str) -> str:
    """Make one path segment of a name, reversibly; never a step up the tree."""
    if not part:
        return "%unnamed"  # which no name is quoted to
    quoted = quote(part, safe="")
    return quoted.replace(".", "%2E") if set(quoted) == {"."} else quoted


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
