"""Storage of videos and saved samples: objects under keys such as `videos/<id>/<attempt>/video.mp4`.

Objects lie in a folder or in an S3 bucket. Knows nothing of jobs or HTTP.
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
