"""The step `label`: fields of metadata that say that a machine made the video, and which.

The words are IPTC's (Photo Metadata Standard 2025.1: digital source type, AI system used), which platforms read. They
stand in an XMP packet and, for programs that read no XMP, in the container's description.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.sax.saxutils import escape

AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's code for media made by a trained model."""
_XMP_BOX = UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes
"""Type of the box that holds XMP in files of the MPEG-4 family (XMP specification, part 3)."""
_PACKET = re.compile(rb"<x:xmpmeta.*?</x:xmpmeta>", re.DOTALL)
_FIELD = re.compile(r"<(\w+:\w+)>([^<]*)</\1>")


def maker(metadata: Mapping[str, Any], version: str) -> str:
    """Return the name of the system that made a video: the model, then this program."""
    return f"{metadata.get('model') or 'an unnamed model'}, served by serve_app {version}"


def sentence(metadata: Mapping[str, Any], version: str) -> str:
    """Return a sentence for people who look at a file's description."""
    return f"AI-generated video, made by {maker(metadata, version)}."


def xmp(metadata: Mapping[str, Any], version: str) -> str:
    """Return an XMP packet that says that a machine made the video.

    Args:
        metadata: what the file says of itself: `model`, `revision`, `prompt` are read.
        version: this program's.
    """
    fields = {
        "Iptc4xmpExt:DigitalSourceType": AI_MADE,
        "Iptc4xmpExt:AISystemUsed": maker(metadata, version),
        "Iptc4xmpExt:AISystemVersionUsed": metadata.get("revision") or version,
        "xmp:CreatorTool": f"serve_app {version}",
    }
    # Characters that XML cannot hold are none that a model reads either.
    prompt = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(metadata.get("prompt") or ""))
    if prompt:
        fields["Iptc4xmpExt:AIPromptInformation"] = prompt
    body = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in fields.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/">'
        f'{body}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def add_xmp(path: Path, packet: str) -> None:
    """Append an XMP packet to an mp4 file, as a box of its own. No other byte changes."""
    content = packet.encode()
    with path.open("ab") as file:
        file.write((24 + len(content)).to_bytes(4, "big") + b"uuid" + _XMP_BOX + content)


def read_xmp(content: bytes | mmap) -> dict[str, str]:
    """Return the fields of the first XMP packet in a file's bytes; empty without one."""
    from xml.sax.saxutils import unescape

    found = _PACKET.search(content)
    return {name: unescape(value) for name, value in _FIELD.findall(found.group().decode())} if found else {}
