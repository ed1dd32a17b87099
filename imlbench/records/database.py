"""The MLflow database in the results folder: made whole, found damaged, moved with its folder.

SQLAlchemy's versions do not agree on how a path is written in a URI, and MLflow keeps a database
open under its URI for ever. Each time it is opened it therefore gets a plain name of its own: a
link in a temporary folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from imlbench.errors import plain

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PARTS = ("-journal", "-wal", "-shm")
_OF_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_OF_THE_SYSTEM = {
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EROFS,
}
_OF_THE_DISK = {
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_ABORT,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
}


class DamagedError(Exception):
    """A file that is no database, or no longer one."""


class Database:
    """The file ``mlflow.db``; whoever opens it or sets it aside holds the lock of MLflow.

    Arguments:
        root: The results folder.
    """

    def __init__(self, root: Path) -> None:
        self.path = (root / "mlflow.db").resolve()
        self.artifacts = root / "mlartifacts"
        self._unlink: Callable[[], object] | None = None
        self._client: MlflowClient | None = None
        self._inode: tuple[int, int] | None = None

    @contextlib.contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        """Open the file, past MLflow."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=20.0)) as connection, connection:
            yield connection

    def open(self) -> MlflowClient:
        """Return a client; the database is made, or migrated, or moved with its folder before.

        Raises:
            DamagedError: What is there is no database, or no longer one.
        """
        if self._client is not None and self._inode == self._identity():
            return self._client
        self.close()
        if not os.path.lexists(self.path):
            self._renew(_make)
        elif self._version() != _current_version():
            self._renew(self._migrate)
        self._relocate()
        self._client = self._open(self.path)
        self._inode = self._identity()
        return self._client

    def close(self) -> None:
        """Let go of the file."""
        if self._client is not None:
            _dispose(self._client)
        if self._unlink is not None:
            self._unlink()
        self._client = self._unlink = self._inode = None

    def set_aside(self) -> Path:
        """Rename what is damaged, with all that belongs to it; return its new name."""
        self.close()
        name = aside = f"{self.path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        number = 1
        while os.path.lexists(aside):
            aside, number = f"{name}-{number}", number + 1
        for part in ("", *_PARTS):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.path}{part}", f"{aside}{part}")
        return Path(aside)

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def find_fault(self) -> str:
        """Return what is wrong with the file, looked at from end to end; empty if nothing is."""
        self.close()
        try:
            self._version("integrity_check") if os.path.lexists(self.path) else ""
        except DamagedError as error:
            return str(error)
        return ""

    def _version(self, check: str = "quick_check") -> str:
        """Return the version of the database's form; empty if nothing is in it yet."""
        if self.path.is_dir() or self.path.stat().st_size == 0:
            raise DamagedError("there is no database in it")
        try:
            with self.connect() as connection:
                (answer,) = connection.execute(f"PRAGMA {check}(1)").fetchone()
                if answer != "ok":
                    raise DamagedError(plain(answer))
                return _version_of(connection)
        except sqlite3.Error as error:
            if is_of_the_disk(error):
                raise
            raise DamagedError(str(error)) from error

    def _renew(self, how: Callable[[Path], None]) -> None:
        """Put a new file in place once it is complete."""
        making = self.path.with_name(f"{self.path.name}.making")
        try:
            _delete(making)
            how(making)
            with making.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(making, self.path)
        finally:
            _delete(making)

    def _migrate(self, making: Path) -> None:
        with self.connect() as source, contextlib.closing(sqlite3.connect(making)) as target:
            source.backup(target)
        try:
            _make(making)
        except Exception as error:
            if "Can't locate revision" in str(error):
                raise RuntimeError(
                    f"{self.path.name} was made by a newer version of MLflow: update MLflow, or "
                    f"move {self.path.name} away"
                ) from error
            if is_of_the_disk(error) or not any(_code(cause) for cause in chain(error)):
                raise
            raise DamagedError(said(error)) from error

    def _open(self, path: Path) -> MlflowClient:
        from mlflow import MlflowClient
        from mlflow.store.tracking import sqlalchemy_store  # noqa: F401 - before the folder is set

        # Or it makes a folder "mlruns" in the current one.
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = self.artifacts.as_uri()
        folder = tempfile.mkdtemp(prefix="imlbench-")
        self._unlink = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return MlflowClient(tracking_uri=_address(path, Path(folder)))

    def _relocate(self) -> None:
        """Let the database of a folder that was moved or copied speak of where it now is.

        MLflow stores absolute addresses. Those of the former place would lead there: into the
        original of a copy.
        """
        here = self.artifacts.as_uri().removesuffix("/mlartifacts")
        with self.connect() as connection:
            rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments")
            places = {
                str(location).rpartition("/mlartifacts")[0]
                for (location,) in rows.fetchall()
                if str(location).startswith("file:") and "/mlartifacts" in str(location)
            }
            for place in sorted(places - {here}):
                former = f"{place}/mlartifacts"
                for table, column in (
                    ("experiments", "artifact_location"),
                    ("runs", "artifact_uri"),
                ):
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE substr({column}, 1, ?) = ?",
                        (here, len(place) + 1, len(former), former),
                    )


@contextlib.contextmanager
def copied(database: Path) -> Iterator[MlflowClient]:
    """Open a copy of a database, as readers change nothing.

    Raises:
        FileNotFoundError: There is none.
    """
    if not database.exists():
        raise FileNotFoundError(f"there is no {database}")
    with tempfile.TemporaryDirectory(prefix="imlbench-") as folder:
        copy = Path(folder, "mlflow.db")
        address = f"{database.resolve().as_uri()}?mode=ro"
        with (
            contextlib.closing(sqlite3.connect(address, uri=True)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
            version = _version_of(target)
        from mlflow import MlflowClient

        if version != _current_version():
            _make(copy)
        client = MlflowClient(tracking_uri=f"sqlite:///{copy}")
        try:
            yield client
        finally:
            _dispose(client)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_of_the_disk(error: BaseException) -> bool:
    """Whether files cannot be read or written now, whatever they hold, as on a full disk."""
    return any(
        _code(cause) in _OF_THE_DISK
        or (isinstance(cause, OSError) and cause.errno in _OF_THE_SYSTEM)
        for cause in chain(error)
    )


def is_of_damage(error: BaseException) -> bool:
    """Whether a file is no database, or no longer one."""
    return any(isinstance(e, DamagedError) or _code(e) in _OF_DAMAGE for e in chain(error))


def _code(error: BaseException) -> int | None:
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def said(error: BaseException) -> str:
    """Return what an error says, in one line."""
    causes = list(chain(error))
    of_sqlite = [cause for cause in causes if isinstance(cause, sqlite3.Error | DamagedError)]
    of_the_system = [cause for cause in reversed(causes) if isinstance(cause, OSError)]
    cause = [*of_sqlite, *of_the_system, error][0]
    return plain(str(cause), 300) or type(cause).__name__


def _address(path: Path, link_in: Path) -> str:
    """Return the URI of a database by a plain name, whatever the path."""
    link = link_in / "mlflow.db"
    try:
        link.symlink_to(path)
    except OSError:  # where links cannot be made, neither can troublesome names
        return f"sqlite:///{path}"
    return f"sqlite:///{link}"


def _version_of(connection: sqlite3.Connection) -> str:
    """Return the version of the form of a database; empty if nothing is in it yet."""
    if connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
        return ""
    found = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    if len(found) != 1:
        raise DamagedError("its tables are incomplete")
    return str(found[0][0])


def _current_version() -> str:
    """Return the version of the form of databases of the MLflow that is installed."""
    import mlflow
    from alembic.script import ScriptDirectory

    folder = Path(mlflow.__file__).parent / "store" / "db_migrations"
    return str(ScriptDirectory(str(folder)).get_current_head())


def _make(path: Path) -> None:
    """Make a database's tables, or bring them to the form of the MLflow that is installed."""
    from mlflow.store.db import utils
    from sqlalchemy import event

    with contextlib.closing(sqlite3.connect(path)) as connection:
        is_new = connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None
    with tempfile.TemporaryDirectory(prefix="imlbench-") as folder:
        engine = utils.create_sqlalchemy_engine(_address(path, Path(folder)))
        event.listen(engine, "connect", _hurry)
        try:
            if is_new:
                utils._initialize_tables(engine)
            else:
                utils._upgrade_db(engine)
        finally:
            engine.dispose()


def _hurry(connection: sqlite3.Connection, record: object) -> None:
    """Wait for the disk once, at the end: what is not complete by then is thrown away."""
    connection.execute("PRAGMA synchronous = OFF")


def _dispose(client: MlflowClient) -> None:
    """Close the files that MLflow keeps open as long as the process lives."""
    store = client._tracking_client.store
    store._dispose_engine()
    getattr(store, "_engine_map", {}).pop(store.db_uri, None)


def _delete(database: Path) -> None:
    for part in ("", *_PARTS):
        path = Path(f"{database}{part}")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
