"""Where videos and saved samples are kept: objects under keys such as `videos/<id>/<attempt>/video.mp4`.

On a folder or in a bucket of S3. Knows nothing of jobs or HTTP.
"""

from serve_app.storage.backend import Stat, StorageRefused
from serve_app.storage.names import content_type, disposition, download_name
from serve_app.storage.storage import CHUNK_BYTES, Storage, trouble_with

__all__ = [
    "CHUNK_BYTES",
    "Stat",
    "Storage",
    "StorageRefused",
    "content_type",
    "disposition",
    "download_name",
    "trouble_with",
]
