"""What covers a bundle's manifest: its hash, and a signature of the hash by whoever wants to be recognised.

``bundle.sha256`` is a line as ``sha256sum`` writes it, over the bytes of ``manifest.json`` as they are stored:
``<64 hex digits>  manifest.json``. The bytes and no canonical form, because the order of a manifest's components means
something, and because a reader can check them before it parses anything. ``bundle.sig`` is an Ed25519 signature (RFC
8032) of the bytes of ``bundle.sha256``. As the manifest has the hash of every file, both cover the whole bundle.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fewstep.errors import BundleError, RuntimeMissingError
from fewstep.strict import read_file, read_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MANIFEST, SEAL, SIGNATURE = "manifest.json", "bundle.sha256", "bundle.sig"
# What a manifest does not list: itself and what covers it.
UNLISTED = (MANIFEST, SEAL, SIGNATURE)
ALGORITHM = "Ed25519"
_KEY_BYTES = 1 << 16
_ALTERED = "the bundle was altered or cut short: copy it again or build it again"
_KEY = "make a pair with `fewstep keygen FILE`, or with `openssl genpkey -algorithm ed25519`"


def seal_of(manifest: bytes) -> bytes:
    """Returns the content of ``bundle.sha256`` for the bytes of a manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def write_seal(folder: Path) -> None:
    """Writes ``bundle.sha256`` for the manifest that is there; an older signature, which is of another, is removed."""
    (folder / SIGNATURE).unlink(missing_ok=True)
    (folder / SEAL).write_bytes(seal_of((folder / MANIFEST).read_bytes()))


def check_seal(folder: Path, manifest: bytes) -> None:
    """Raises BundleError unless ``bundle.sha256`` is that of a manifest's bytes."""
    try:
        found = read_file(folder / SEAL, _KEY_BYTES, error=BundleError, hint=_ALTERED)
    except OSError as error:
        raise BundleError(
            f"{folder} has no {SEAL} that can be read ({error.strerror}), which is the hash of its {MANIFEST}",
            hint="copy the whole folder; bundles of before there were such hashes must be built again",
        ) from error
    if found != seal_of(manifest):
        raise BundleError(
            f"{folder}: {MANIFEST} has sha256 {hashlib.sha256(manifest).hexdigest()[:16]}..., {SEAL} says "
            f"{found.decode('ascii', 'replace')[:16]!r}...",
            hint=_ALTERED,
        )


def make_keys(path: Path) -> Path:
    """Writes a new private key (PEM, for its owner's eyes alone) and its public one beside it; returns where that is.

    Raises:
        BundleError: there is a file already, or it cannot be written.
    """
    from_private, serialization = _library()
    key = from_private.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    beside = path.with_name(f"{path.name}.pub")
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(private)
        with beside.open("xb") as stream:
            stream.write(public)
    except FileExistsError as error:
        raise BundleError(f"{error.filename} exists, keys are not overwritten", hint="take another name") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot write the key {path}: {error}", hint="choose another folder") from error
    return beside


def sign(folder: Path, key: Path) -> str:
    """Writes ``bundle.sig`` and returns the public key as hex.

    Raises:
        BundleError: the key is no unencrypted Ed25519 private key in PEM, or ``bundle.sha256`` is not the manifest's.
        RuntimeMissingError: cryptography is not installed.
    """
    private = _private_key(key)
    seal = seal_of(read_file(folder / MANIFEST, 1 << 30, error=BundleError, hint=_ALTERED))
    text = signature_of(private, seal)
    handle, partial = tempfile.mkstemp(prefix=f".{SIGNATURE}.", dir=folder)
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(text)
    Path(partial).chmod(0o644)
    Path(partial).replace(folder / SIGNATURE)
    return private.public_key().public_bytes_raw().hex()


def signature_of(key: Ed25519PrivateKey, seal: bytes) -> str:
    """Returns the content of ``bundle.sig`` for that of ``bundle.sha256``."""
    public, signature = key.public_key().public_bytes_raw().hex(), key.sign(seal).hex()
    return f'{{"algorithm": "{ALGORITHM}", "public_key": "{public}", "signature": "{signature}"}}\n'


def signer(folder: Path) -> str | None:
    """Returns the public key, as hex, that a bundle says it is signed with, None where it says none. Unchecked.

    Raises:
        BundleError: ``bundle.sig`` is malformed.
    """
    found = _read_signature(folder)
    return None if found is None else found[0]


def check_signature(folder: Path, key: Path) -> str:
    """Returns the public key, as hex, once the bundle's signature is found to be by it.

    Raises:
        BundleError: the bundle is not signed, or not by this key, or the key is none.
        RuntimeMissingError: cryptography is not installed.
    """
    public = _public_key(key)
    found = _read_signature(folder)
    if found is None:
        raise BundleError(
            f"{folder} is not signed: it has no {SIGNATURE}", hint="ask whoever made it to `fewstep sign` it"
        )
    name = public.public_bytes_raw().hex()
    seal = read_file(folder / SEAL, _KEY_BYTES, error=BundleError, hint=_ALTERED)
    try:
        public.verify(bytes.fromhex(found[1]), seal)
    except Exception as error:  # InvalidSignature, without a text
        raise BundleError(
            f"{folder}: its signature is not by the key {name[:16]}... for this manifest (it names {found[0][:16]}...)",
            hint="do not use this bundle unless you know why; is it the right key?",
        ) from error
    return name


def _read_signature(folder: Path) -> tuple[str, str] | None:
    path = folder / SIGNATURE
    if not path.exists():
        return None
    hint = "sign the bundle again"
    values = read_json(path, error=BundleError, hint=hint, most_bytes=_KEY_BYTES)
    names = {"algorithm", "public_key", "signature"}
    if not isinstance(values, dict) or values.keys() != names or values["algorithm"] != ALGORITHM:
        raise BundleError(f"{path} is no {ALGORITHM} signature of a bundle", hint=hint)
    public, signature = values["public_key"], values["signature"]
    if not (_is_hex(public, 64) and _is_hex(signature, 128)):
        raise BundleError(f"{path} has no key and signature of the lengths that {ALGORITHM} has", hint=hint)
    return public, signature


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) is not None


def _private_key(path: Path) -> Ed25519PrivateKey:
    kind, serialization = _library()
    content = _read_key(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise BundleError(f"{path} is no unencrypted private key in PEM: {error}", hint=_KEY) from error
    except Exception as error:  # UnsupportedAlgorithm
        raise BundleError(f"{path} is no {ALGORITHM} key: {error}", hint=_KEY) from error
    if not isinstance(key, kind):
        raise BundleError(f"{path} is a key of another kind than {ALGORITHM}", hint=_KEY)
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    _, serialization = _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    content = _read_key(path)
    try:
        text = content.decode("ascii", "replace").strip()
        if _is_hex(text, 64):
            return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
        key = serialization.load_pem_public_key(content)
    except Exception as error:  # ValueError, UnsupportedAlgorithm
        raise BundleError(f"{path} is no public key in PEM, or of 64 hex digits: {error}", hint=_KEY) from error
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(f"{path} is a key of another kind than {ALGORITHM}", hint=_KEY)
    return key


def _read_key(path: Path) -> bytes:
    try:
        return read_file(path, _KEY_BYTES, error=BundleError, hint=_KEY)
    except OSError as error:
        raise BundleError(f"cannot read the key {path}: {error.strerror}", hint=_KEY) from error


def _library() -> tuple[type[Ed25519PrivateKey], ModuleType]:
    """Returns what makes keys and what reads and writes them."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise RuntimeMissingError(
            "cryptography is not installed, which signatures need", hint="pip install 'fewstep[sign]'"
        ) from error
    return Ed25519PrivateKey, serialization
