"""A connection pool on SQLite or PostgreSQL, and everything in which the two differ.

Row locks need no code here: SQLAlchemy leaves FOR UPDATE out on SQLite, where a writing transaction holds the only
write lock from its first statement on.
"""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, event, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.util import await_only

from serve_app.db.schema import migrate, revisions
from serve_app.errors import ConfigError, without_password

STORE_AWAY = (SQLAlchemyError, OSError)
"""Exceptions that a call raises while the database is away; asyncpg raises OSError when it cannot connect."""

# libpq and many providers write `postgres`.
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}
_OPTIONS_OF_THE_DIALECT = ("prepared_statement_cache_size", "prepared_statement_name_func")
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# The lock of whoever changes the tables: a number that other users of the database are unlikely to have chosen.
_SCHEMA_LOCK = 0x77616E32
# Seconds that a writer waits for others before SQLite says "database is locked".
_BUSY_S = 30
# Seconds between two tries to give a file of SQLite a write-ahead log.
_WRITE_AHEAD_RETRY_S = 0.02
# Seconds for a connection and for an answer, after which a server that hangs counts as away. No answer takes as long.
_CONNECT_S = 10
_ANSWER_S = 30


class Database:
    """Transactions on the tables of `serve_app.db.tables`.

    Args:
        url: a SQLAlchemy URL; the driver may be left out.

    Raises:
        ConfigError: the URL cannot be read, names another kind of database or an unknown option, or the driver's
            package is not installed.
    """

    def __init__(self, url: str) -> None:
        self._said = said = f"store.url has value {without_password(url)!r}"
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):  # ValueError: a port that is no number
            raise ConfigError(f"{said}, expected postgresql://user@host:5432/database") from None
        backend = parsed.get_backend_name()
        memory = backend == "sqlite" and parsed.database in (None, "", ":memory:")
        if backend not in _DRIVERS or memory:
            raise ConfigError(f"{said}, expected a file of SQLite or a PostgreSQL database")
        self._sqlite = backend == "sqlite"
        self._url = parsed.set(drivername=_DRIVERS[backend])
        if not self._sqlite:
            self._url = self._with_options_of_asyncpg(self._url)
        self._engine: AsyncEngine | None = None
        # SQLite admits one writer; queueing here beats polling for the file lock.
        self._write_lock: Any = asyncio.Lock() if self._sqlite else nullcontext()

    def _with_options_of_asyncpg(self, url: URL) -> URL:
        """Return the URL with the options after its `?` renamed from libpq's names to asyncpg's."""
        if url.port is not None and not 0 < url.port < 65536:
            raise ConfigError(f"{self._said}: has the port {url.port}, expected 1 to 65535")
        try:
            import asyncpg
        except ImportError as error:
            raise ConfigError(f"{self._said}: needs the package {error.name!r}") from None
        query = {"ssl" if name == "sslmode" else name: value for name, value in url.query.items()}
        known = {*inspect.signature(asyncpg.connect).parameters, *_OPTIONS_OF_THE_DIALECT}
        for name in query:
            if name not in known:
                raise ConfigError(f"{self._said}: has the option {name!r}, which asyncpg does not know")
        if query.get("ssl", "prefer") not in _SSL_MODES:
            raise ConfigError(f"{self._said}: has sslmode {query['ssl']!r}, expected one of {', '.join(_SSL_MODES)}")
        return url.set(query=query)

    @property
    def file(self) -> Path | None:
        """The file of SQLite; None on PostgreSQL."""
        return Path(self._url.database or "").absolute() if self._sqlite else None

    @property
    def folder(self) -> Path | None:
        """The folder of the SQLite file; None on PostgreSQL."""
        return self.file.parent if self.file else None

    async def start(self) -> None:
        """Connect, and create the tables or migrate them to this version.

        Raises:
            ConfigError: the database cannot be opened, or its tables are of a newer version.
        """
        if self._engine is not None:
            return
        try:
            self._engine = await self._open()
        except ImportError as error:
            raise ConfigError(f"{self._said}: needs the package {error.name!r}") from None
        except TimeoutError:
            reason = f"no answer within {_CONNECT_S} s"
            raise ConfigError(f"{self._said}: cannot be opened: {reason}") from None
        except (SQLAlchemyError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise ConfigError(f"{self._said}: cannot be opened: {reason}") from error

    async def revisions(self) -> tuple[str | None, str | None]:
        """Return the revision of the tables, None if there are none, and the newest that this version knows.

        Raises:
            RuntimeError: the database is not connected.
        """
        async with self._started().execution_options(read_only=True).connect() as connection:
            return await connection.run_sync(revisions)

    async def connect(self) -> None:
        """Connect without making or changing tables, to look at a database that others use.

        Raises:
            ConfigError: there is no such database, or it cannot be opened.
        """
        if self.file is not None and not self.file.exists():
            raise ConfigError(f"{self._said}: there is no database '{self.file}'")
        engine = self._new_engine()
        try:
            async with engine.execution_options(read_only=True).connect() as connection:
                await connection.execute(select(1))
        except (SQLAlchemyError, OSError) as error:
            await engine.dispose()
            reason = str(getattr(error, "orig", None) or error or "no answer").splitlines()[0]
            raise ConfigError(f"{self._said}: cannot be opened: {reason}") from error
        self._engine = engine

    def _new_engine(self) -> AsyncEngine:
        if not self._sqlite:
            limits = {"timeout": _CONNECT_S, "command_timeout": _ANSWER_S}
            return create_async_engine(self._url, pool_pre_ping=True, connect_args=limits)
        engine = create_async_engine(self._url, connect_args={"timeout": _BUSY_S})
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        event.listen(engine.sync_engine, "invalidate", _roll_back_sqlite)
        return engine

    async def _open(self) -> AsyncEngine:
        if self._sqlite:
            assert self._url.database
            Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = self._new_engine()
        try:
            # On SQLite this transaction is the only writer from its beginning on.
            async with engine.begin() as connection:
                if not self._sqlite:
                    await connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
                await connection.run_sync(migrate)
        except BaseException:
            await engine.dispose()
            raise
        return engine

    async def close(self) -> None:
        """Close every connection."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """Open a session that only reads. Rows stay usable after it."""
        engine = self._started().execution_options(read_only=True)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """Open a session that is one transaction: committed at its end, rolled back on an exception."""
        engine = self._started()
        async with self._write_lock, AsyncSession(engine, expire_on_commit=False) as session, session.begin():
            yield session

    async def clock(self, session: AsyncSession) -> float:
        """Return the database's time in seconds since the epoch: the one clock that all dispatchers share."""
        now = self.now()
        return now if isinstance(now, float) else float(await session.scalar(select(now)) or 0)

    def now(self) -> float | ColumnElement[Any]:
        """Return the time of `clock` as part of a statement."""
        if self._sqlite:
            return time.time()  # the database is in this process
        return func.extract("epoch", func.clock_timestamp())

    def _started(self) -> AsyncEngine:
        if self._engine is None:
            raise RuntimeError("the job store is not started")
        return self._engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN is deferred and fails with "database is locked" where it should wait; ours is below.
    connection.isolation_level = None
    cursor = connection.cursor()
    _write_ahead(cursor)
    # FULL: a job that was acknowledged survives a power cut, at the price of one fsync each commit.
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Give the file a write-ahead log, which it keeps.

    SQLite does not wait for a writer here, whatever its timeout: when several processes open a new file at once, the
    first begins to write, and the others may be told that the file is locked.
    """
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        await_only(asyncio.sleep(_WRITE_AHEAD_RETRY_S))


def _roll_back_sqlite(connection: Any, _record: Any, _error: Any) -> None:
    """Roll back before a connection is closed whose task was cancelled within a statement.

    Closing alone would not end the transaction: while anything, such as a traceback, refers to a cursor with unread
    rows, SQLite keeps the closed connection and with it the only write lock.
    """
    with suppress(Exception, asyncio.CancelledError):  # the rollback was sent, and the task is cancelled already
        connection.rollback()


def _begin_sqlite(connection: Any) -> None:
    read_only = connection.get_execution_options().get("read_only")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
