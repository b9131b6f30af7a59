"""C2PA manifests: signed statements within a file, which show whether it was changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.finish.equipment import Equipment
from serve_app.finish.label import AI_MADE

FORMATS = {"mp4": "video/mp4", "webp": "image/webp", "gif": "image/gif"}
"""Media types of files that can hold a manifest, by ending. A webm file cannot."""
MISSING = "C2PA manifests need c2pa-python, expected it installed: pip install 'serve-app[c2pa]'"

_FIELDS = ("state", "signer", "issuer", "time", "generator", "source_type")
_NO_THUMBNAIL = {"builder": {"thumbnail": {"enabled": False}}}  # it is ten times as large as a preview


class NoManifest(Exception):
    """A file holds no manifest."""


def sign(path: Path, metadata: Mapping[str, Any], version: str, equipment: Equipment) -> None:
    """Put a signed manifest into a file of `FORMATS`, which says that a machine made it.

    Args:
        path: the file, replaced once it is signed.
        metadata: what the file says of itself; `model`, `revision` and `id` are read.
        version: this program's.
        equipment: `certificate`, `private_key` and `timestamp_url` are read.

    Raises:
        ImportError: c2pa-python is missing.
        ValueError: the key is of a kind that C2PA does not know.
        OSError: a file cannot be read.
    """
    c2pa = _library()
    assert equipment.certificate is not None and equipment.private_key is not None
    key = equipment.private_key.read_bytes()
    info = c2pa.C2paSignerInfo(
        _algorithm(key), equipment.certificate.read_bytes(), key, equipment.timestamp_url or None
    )
    signed = path.with_name(f".{path.stem}-signed{path.suffix}")
    try:
        claim = json.dumps(_claim(metadata, version, path))
        with (
            c2pa.Context.from_dict(_NO_THUMBNAIL) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(claim, context=context) as builder,
        ):
            builder.sign_file(path, signed, signer)
        signed.replace(path)
    finally:
        signed.unlink(missing_ok=True)


def read(path: Path, anchors: Path | None = None) -> dict[str, Any]:
    """Return the manifest of a file: `state`, `signer`, `issuer`, `time`, `generator`, `source_type` and `problems`.

    The state is `trusted`, `valid` (nobody is trusted, but nothing was changed), `invalid` or `unreadable`.

    Args:
        path: the file.
        anchors: PEM file with certificates that are trusted; None trusts nobody, so that `state` is at most `valid`.

    Raises:
        NoManifest: the file holds none, or can hold none.
        ImportError: c2pa-python is missing.
    """
    c2pa = _library()
    if path.suffix.lstrip(".").lower() not in c2pa.Reader.get_supported_mime_types():
        raise NoManifest
    # Nothing is fetched: whoever looks at a file should not be seen by whoever wrote it.
    settings: dict[str, Any] = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
    if anchors is not None:
        settings["trust"] = {"trust_anchors": anchors.read_text()}
    try:
        with c2pa.Context.from_dict(settings) as context:
            reader = c2pa.Reader.try_create(str(path), context=context)
            if reader is None:
                raise NoManifest
            with reader:
                store = json.loads(reader.json())
    except c2pa.C2paError as error:
        return {**dict.fromkeys(_FIELDS, ""), "state": "unreadable", "problems": [str(error).splitlines()[0]]}
    active = store["manifests"][store["active_manifest"]]
    signature = active.get("signature_info", {})
    generator = (active.get("claim_generator_info") or [{}])[0]
    failures = store.get("validation_results", {}).get("activeManifest", {}).get("failure", [])
    return {
        "state": str(store.get("validation_state", "unknown")).lower(),
        "signer": signature.get("common_name") or signature.get("issuer") or "",
        "issuer": signature.get("issuer", ""),
        "time": signature.get("time", ""),
        "generator": " ".join(str(generator[key]) for key in ("name", "version") if generator.get(key)),
        "source_type": next(iter(_source_types(active)), ""),
        "problems": [f"{one['code']}: {one.get('explanation', '')}" for one in failures],
    }


def _source_types(manifest: dict[str, Any]) -> list[str]:
    """Return the digital source types of all actions of a manifest."""
    return [
        action["digitalSourceType"]
        for assertion in manifest.get("assertions", [])
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"].get("actions", [])
        if "digitalSourceType" in action
    ]


def _claim(metadata: Mapping[str, Any], version: str, path: Path) -> dict[str, Any]:
    agent = {"name": str(metadata.get("model") or "unnamed model"), "version": str(metadata.get("revision") or "")}
    created = {"action": "c2pa.created", "digitalSourceType": AI_MADE, "softwareAgent": agent}
    return {
        "claim_generator_info": [{"name": "serve_app", "version": version}],
        "title": str(metadata.get("id") or path.stem),
        "format": FORMATS[path.suffix.lstrip(".")],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _algorithm(key: bytes) -> str:
    """Return C2PA's name for the signatures of a private key in PEM."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = load_pem_private_key(key, None)
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    names = {256: "es256", 384: "es384", 521: "es512"}
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.key_size in names:
        return names[private.key_size]
    raise ValueError(f"the private key is a {type(private).__name__}, expected ECDSA, RSA or Ed25519")


def _library() -> Any:
    try:
        import c2pa
    except ImportError:
        raise ImportError(MISSING) from None
    return c2pa
