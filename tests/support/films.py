"""Short videos whose motion is known exactly, and a chain of certificates, for tests of finishing."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np


def texture(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Return a smooth random picture, uint8 RGB, with an edge of 32 pixels around what is shown of it."""
    random = np.random.default_rng(seed)
    size = (height + 64) // 8, (width + 64) // 8
    # Mostly grey: files keep colours in half the resolution.
    coarse = random.integers(20, 236, (*size, 1)) + random.integers(-20, 20, (*size, 3))
    return cv2.resize(coarse.astype(np.uint8), (width + 64, height + 64), interpolation=cv2.INTER_CUBIC)


def shifted(picture: np.ndarray, x: float, y: float = 0.0) -> np.ndarray:
    """Return the inner part of a picture, moved by (x, y) pixels."""
    height, width = picture.shape[:2]
    move = np.array([[1, 0, x - 32], [0, 1, y - 32]], np.float32)
    return cv2.warpAffine(picture, move, (width - 64, height - 64), flags=cv2.INTER_CUBIC)


def pan(frames: int, step: float = 2.0, seed: int = 0, height: int = 96, width: int = 128) -> list[np.ndarray]:
    """Return frames of a picture that moves to the right by `step` pixels a frame."""
    picture = texture(seed, height, width)
    return [shifted(picture, step * index) for index in range(frames)]


def psnr(one: np.ndarray, other: np.ndarray, edge: int = 8) -> float:
    """Return the PSNR in dB of two frames, without an edge that may show what no other frame shows."""
    inner = np.s_[edge:-edge, edge:-edge]
    error = np.square(one[inner].astype(np.float64) - other[inner]).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def decoded(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video file, uint8 RGB."""
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Write a signer's chain, its key, and the root that vouches for it; return the three PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now, month = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=30)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("Test Root", "Test Signer")}
    made = {}
    for name, key in keys.items():
        root = name == "Test Root"
        subject, issuer = (
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test Films"),
                    x509.NameAttribute(NameOID.COMMON_NAME, who),
                ]
            )
            for who in (name, "Test Root")
        )
        uses = dict.fromkeys(
            (
                *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
                *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
            ),
            False,
        )
        uses["key_cert_sign" if root else "digital_signature"] = True
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - month)
            .not_valid_after(now + month)
            .add_extension(x509.BasicConstraints(root, None), True)
            .add_extension(x509.KeyUsage(**uses), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["Test Root"].public_key()), False)
        )
        if not root:
            builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        made[name] = builder.sign(keys["Test Root"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    chain, key_file, anchors = (folder / name for name in ("chain.pem", "key.pem", "root.pem"))
    chain.write_bytes(made["Test Signer"] + made["Test Root"])
    anchors.write_bytes(made["Test Root"])
    key_file.write_bytes(
        keys["Test Signer"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return chain, key_file, anchors
