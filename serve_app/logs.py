"""Structured logs: one JSON object a line on stderr, which Ray collects per process."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

# Attributes that every LogRecord has; all others came in by `extra`.
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line: time, level, logger, message, the fields of `extra`, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one JSON object."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def get_logger(name: str) -> logging.Logger:
    """Return a logger below `serve_app`, for example for `logger.info("claimed", extra={"job": id})`."""
    package = logging.getLogger("serve_app")
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        package.addHandler(handler)
        package.setLevel(logging.INFO)
    return logging.getLogger(name)
