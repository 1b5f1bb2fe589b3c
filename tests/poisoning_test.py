"""The poisoning set: what others could plant where a cache lies, or was tampered with in it. A host must refuse each, say why, compile for
itself and compute right. Prints a line for each member and their count. Usage: poisoning_test.py KILN"""
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile

KILN = [*os.environ.get("TEST_EMULATOR", "").split(), str(pathlib.Path(sys.argv[1]).resolve())]
SHAPE, OTHER = ("int8_mm", "m=3", "n=40", "k=24"), ("int8_mm", "m=1", "n=48", "k=200")
NOBODY = 65534
OK, INTEGRITY = 0, 3


class Place:
    """A user's cache with the kernels of SHAPE and OTHER, the secret key and list of trusted keys of an administrator, and the same of an
    attacker, whose kernel is not that of SHAPE, all of it rightly authenticated with the attacker's own keys."""

    def __init__(self, root):
        self.root = root
        self.cache, self.keys = root / "cache", root / "data" / "kiln"
        self.database, self.key_file = self.cache / "kernels.db", self.keys / "cache.key"
        self.evil, self.evil_keys = root / "evil" / "cache", root / "evil" / "data" / "kiln"
        self.system, self.trusted = root / "system", root / "trusted.keys"
        self.bundle = self.system / "kernels.bundle"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("KILN_")}
        self.env.update(KILN_CACHE_DIR=str(self.cache), XDG_DATA_HOME=str(root / "data"), KILN_THREADS="1", KILN_TRUSTED_KEYS=str(self.trusted))
        self.evil_env = {"KILN_CACHE_DIR": str(self.evil), "XDG_DATA_HOME": str(root / "evil" / "data")}

    def kiln(self, *arguments, env={}, expect=OK):
        done = subprocess.run([*KILN, *map(str, arguments)], env={**self.env, **env}, cwd=self.root, capture_output=True, text=True, timeout=120)
        assert done.returncode == expect, f"kiln {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def json(self, *arguments, env={}):
        return json.loads(self.kiln(*arguments, "--json", env=env).stdout)

    def fill(self):
        for shape in (SHAPE, OTHER):
            self.json("run", *shape)
        self.json("run", *SHAPE, env=self.evil_env)
        evil = Row(self.evil / "kernels.db", self.key())
        evil["code"] = changed(evil["code"])
        evil.authenticate(self.evil_keys / "cache.key").write()
        for name in ("administrator", "attacker"):
            public = self.kiln("cache", "keygen", name).stdout
            if name == "administrator":
                self.trusted.write_text(public)
        self.system.mkdir()
        return self

    keys_of = {}  # the same wherever the cache lies

    def explained(self, shape=SHAPE):
        if shape not in self.keys_of:
            self.keys_of[shape] = self.json("explain", *shape)
        return self.keys_of[shape]

    def key(self, shape=SHAPE):
        return self.explained(shape)["key"]

    def publish(self, *, signer="administrator", rows_of={}):
        """The system cache, and no cache of the user's own."""
        self.kiln("cache", "export", self.bundle, *(("--key", signer) if signer else ()), env=rows_of)
        shutil.rmtree(self.cache)
        self.env["KILN_CACHE_SYSTEM_DIR"] = str(self.system)


class Row(dict):
    """A row of a database, to be changed and put back."""

    def __init__(self, database, key):
        self.database = database
        with contextlib.closing(sqlite3.connect(database)) as db:
            db.row_factory = sqlite3.Row
            super().__init__(db.execute("SELECT * FROM kernels WHERE key = ?", (bytes.fromhex(key),)).fetchone())
            (self.schema,) = db.execute("PRAGMA user_version").fetchone()

    def authenticate(self, key_file, schema=None):
        """As cache/store.cpp does, with this key file."""
        secret = pathlib.Path(key_file).read_bytes()
        blob = lambda content: struct.pack("<Q", len(content)) + content
        message = struct.pack("<I", schema or self.schema) + blob(self["key"])
        message += b"".join(blob(self[name].encode()) for name in ("op", "desc", "isa", "target", "generator"))
        message += struct.pack("<qq", self["compile_us"], self["created_at"]) + blob(b"") + blob(self["code"])
        self["code_bytes"] = len(self["code"])
        self["mac"] = hashlib.blake2b(message, key=secret, digest_size=32).digest()
        self["mac_key"] = struct.unpack("<q", hashlib.blake2b(key=secret, digest_size=32).digest()[:8])[0]
        return self

    def write(self, database=None):
        with contextlib.closing(sqlite3.connect(database or self.database)) as db:
            columns = [name for name in self if name != "id"]
            db.execute(f"INSERT OR REPLACE INTO kernels ({', '.join(columns)}) VALUES ({', '.join(':' + name for name in columns)})", self)
            db.commit()
        return self


def changed(code):
    code = bytearray(code)
    code[len(code) // 2] ^= 1
    return bytes(code)


def sql(database, script):
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.executescript(script)


def replace_by_link(path, target):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


def tree(path):
    return {entry: entry.read_bytes() for entry in sorted(path.rglob("*")) if entry.is_file()}


members = []


def member(name, says, served=False, needs_root=False):
    """`says`: on stderr. `served`: an authentic kernel, which may be."""

    def add(poison):
        members.append((name, says, served, needs_root, poison))
        return poison

    return add


# Links: the last part of every path, to something of the attacker's that would authenticate under the attacker's key.
@member("link: the cache directory", "cache is not trusted: it is a symbolic link")
def _(place):
    replace_by_link(place.cache, place.evil)


@member("link: the database", "kernels.db is not trusted: it is a symbolic link")
def _(place):
    replace_by_link(place.database, place.evil / "kernels.db")


@member("link: the key directory", "kiln is not trusted: it is a symbolic link")
def _(place):
    replace_by_link(place.keys, place.evil_keys)


@member("link: the key file", "cache.key is not trusted: it is a symbolic link")
def _(place):
    replace_by_link(place.key_file, place.evil_keys / "cache.key")


@member("link: cache directory and key directory", "is not trusted: it is a symbolic link")
def _(place):
    replace_by_link(place.cache, place.evil)
    replace_by_link(place.keys, place.evil_keys)


@member("link: the system cache's bundle", "kernels.bundle is not trusted: it is a symbolic link")
def _(place):
    place.publish()
    place.bundle.rename(place.root / "elsewhere")
    place.bundle.symlink_to(place.root / "elsewhere")


@member("link: a directory above the system cache", "system is not trusted: it is a symbolic link")
def _(place):
    place.publish()
    place.system.rename(place.root / "elsewhere")
    place.system.symlink_to(place.root / "elsewhere")


@member("link: the list of trusted keys", "trusted.keys is not trusted: it is a symbolic link")
def _(place):
    place.publish()
    place.trusted.rename(place.root / "elsewhere")
    place.trusted.symlink_to(place.root / "elsewhere")


# Owners and modes.
def owned_by_nobody(what):
    def poison(place):
        if what in ("system", "bundle", "trusted"):
            place.publish()
        os.chown(getattr(place, what), NOBODY, NOBODY)

    return poison


for what, name in (
    ("cache", "the cache directory"),
    ("database", "the database"),
    ("keys", "the key directory"),
    ("key_file", "the key file"),
    ("system", "the system cache's directory"),
    ("bundle", "the system cache's bundle"),
    ("trusted", "the list of trusted keys"),
):
    member(f"foreign owner: {name}", f"uid {NOBODY}", needs_root=True)(owned_by_nobody(what))


def with_mode(what, mode):
    def poison(place):
        if what in ("system", "bundle", "trusted"):
            place.publish()
        getattr(place, what).chmod(mode)

    return poison


for what, mode, name in (
    ("cache", 0o770, "the cache directory, group-writable"),
    ("cache", 0o707, "the cache directory, writable by others"),
    ("database", 0o660, "the database, group-writable"),
    ("database", 0o606, "the database, writable by others"),
    ("keys", 0o770, "the key directory, group-writable"),
    ("key_file", 0o660, "the key file, group-writable"),
    ("key_file", 0o604, "the key file, readable by others"),
    ("system", 0o775, "the system cache's directory, group-writable"),
    ("bundle", 0o664, "the system cache's bundle, group-writable"),
    ("trusted", 0o664, "the list of trusted keys, group-writable"),
):
    member(f"mode: {name}", f"mode {mode:04o}")(with_mode(what, mode))


# Rows.
@member("row swap: two kernels of one cache", "fails authentication: it was changed, or is that of another key")
def _(place):
    one, other = place.key(), place.key(OTHER)
    sql(place.database, f"UPDATE kernels SET key = zeroblob(32) WHERE key = x'{one}'; UPDATE kernels SET key = x'{one}' WHERE key = x'{other}';"
                        f"UPDATE kernels SET key = x'{other}' WHERE key = zeroblob(32)")


@member("row swap: the code alone", "fails authentication: it was changed")
def _(place):
    one, other = Row(place.database, place.key()), Row(place.database, place.key(OTHER))
    one["code"], one["code_bytes"] = other["code"], other["code_bytes"]
    one.write()


@member("forged checksum: the attacker's row with the attacker's MAC", "fails authentication: it was stored under another key file")
def _(place):
    Row(place.evil / "kernels.db", place.key()).write(place.database)


@member("forged checksum: the same, said to be made with this user's key file", "fails authentication: it was changed")
def _(place):
    row = Row(place.evil / "kernels.db", place.key())
    row["mac_key"] = Row(place.database, place.key())["mac_key"]
    row.write(place.database)


def forged(make):
    def poison(place):
        row = Row(place.database, place.key())
        honest = bytes(row["mac"])
        row["code"] = changed(row["code"])
        row["mac"] = make(honest, row)
        row.write()

    return poison


for name, make in (
    ("the true row's MAC over other code", lambda honest, row: honest),
    ("zeros", lambda honest, row: bytes(32)),
    ("none", lambda honest, row: b""),
    ("the true MAC's first byte", lambda honest, row: honest[:1]),
    ("a digest without a key", lambda honest, row: hashlib.blake2b(row["code"], digest_size=32).digest()),
):
    member(f"forged checksum: {name}", "fails authentication: it was changed")(forged(make))


@member("copied cache: another user's database", "fails authentication: it was stored under another key file")
def _(place):
    shutil.copy(place.evil / "kernels.db", place.database)


@member("copied cache: with the copied key inside the cache directory", "lies inside the cache directory")
def _(place):
    shutil.copy(place.evil / "kernels.db", place.database)
    shutil.copytree(place.evil_keys, place.cache / "kiln")
    place.env["XDG_DATA_HOME"] = str(place.cache)


@member("no key file, so that the attacker's rows might do", "there is no key to authenticate")
def _(place):
    shutil.copy(place.evil / "kernels.db", place.database)
    place.key_file.unlink()


# Older and other formats.
@member("old schema: the whole database", "")
def _(place):
    sql(place.database, "PRAGMA user_version = 1")


@member("old schema: a row authenticated under it", "fails authentication")
def _(place):
    row = Row(place.database, place.key())
    row.authenticate(place.key_file, schema=row.schema - 1).write()


@member("newer schema: the whole database", "")
def _(place):
    sql(place.database, "PRAGMA user_version = 1000")


@member("another program's database", "another program's")
def _(place):
    sql(place.database, "PRAGMA application_id = 7")


@member("a trigger that changes what is read", "")
def _(place):
    sql(place.database, f"DELETE FROM kernels WHERE key = x'{place.key()}';"
                        "CREATE TRIGGER evil AFTER INSERT ON kernels BEGIN UPDATE kernels SET isa = 'avx2'; END")


@member("a view in the place of the table", "malformed")
def _(place):
    sql(place.database, "ALTER TABLE kernels RENAME TO hidden; CREATE VIEW kernels AS SELECT * FROM hidden")


# Bundles.
@member("unsigned bundle: as the system cache", "is unsigned: a system cache needs a signature")
def _(place):
    place.publish(signer=None)


@member("bundle of another signer: as the system cache", "which is not in the list of trusted keys")
def _(place):
    place.publish(signer="attacker")


@member("no list of trusted keys", "which does not exist")
def _(place):
    place.publish()
    place.trusted.unlink()


@member("changed bytes in a signed bundle's kernels", "its digest is wrong")
def _(place):
    place.publish()
    content = place.bundle.read_bytes()
    kernels = 50 + 72 * 2 + 64  # what follows header, index and signature (api/doc/bundle.md)
    place.bundle.write_bytes(content[:kernels] + bytes(byte ^ 1 for byte in content[kernels:]))


@member("a changed byte in a signed bundle's index", "the signature is not that of key")
def _(place):
    place.publish()
    content = bytearray(place.bundle.read_bytes())
    content[60] ^= 1
    place.bundle.write_bytes(content)


def imported(bundle, *arguments, signer, says, change=lambda content: content):
    """Refused by `kiln cache import`; what is there stays."""

    def poison(place):
        place.kiln("cache", "export", bundle, *(("--key", signer) if signer else ()), env=place.evil_env)
        (place.root / bundle).write_bytes(change((place.root / bundle).read_bytes()))
        shutil.rmtree(place.cache)
        done = place.kiln("cache", "import", bundle, *arguments, expect=INTEGRITY)
        assert says in done.stderr, done.stderr
        assert place.json("cache", "list")["kernels"] == []

    return poison


member("unsigned bundle: imported", "")(imported("a.bundle", signer=None, says="--allow-unsigned"))
member("bundle of another signer: imported", "")(imported("a.bundle", signer="attacker", says="none of the 1 trusted here"))
member("unsigned bundle, changed: imported with --allow-unsigned", "")(
    imported("a.bundle", "--allow-unsigned", signer=None, says="its digest is wrong", change=lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]))


# An older authentic file is served only where the full key matches.
def older_key(place):
    """Of SHAPE's kernel by another generator."""
    fields = place.explained()["key_text"].split("\n")
    fields = ["generator=" + "0" * 64 if field.startswith("generator=") else field for field in fields]
    return hashlib.blake2b("\n".join(fields).encode(), digest_size=32).hexdigest()


def older_row(place):
    row = Row(place.database, place.key())
    row.update(key=bytes.fromhex(older_key(place)), generator="0" * 64, code=changed(row["code"]))
    return row.authenticate(place.key_file)


@member("older file: an authentic row of an older generator, under its own key", "")
def _(place):
    older_row(place).write()
    sql(place.database, f"DELETE FROM kernels WHERE key = x'{place.key()}'")


@member("older file: the same under the key of today", "fails authentication: it was changed, or is that of another key")
def _(place):
    row = older_row(place)
    row["key"] = bytes.fromhex(place.key())
    row.write()


@member("older file: the database before this kernel was stored", "")
def _(place):
    sql(place.database, f"DELETE FROM kernels WHERE key = x'{place.key()}'")


@member("older file: put back, with the very kernel in it", "", served=True)
def _(place):
    old = place.database.read_bytes()
    place.json("run", "int8_mm", "m=9", "n=40", "k=24")
    place.database.write_bytes(old)


def main():
    as_root = os.geteuid() == 0
    refused = skipped = served = failed = 0
    with tempfile.TemporaryDirectory(prefix="kiln-poisoning-test-") as directory:
        root = pathlib.Path(directory).resolve()
        template = Place(root / "template")
        template.root.mkdir(mode=0o700)
        template.fill()
        # That each would be served, were it not poisoned: and so would a row that the key file's holder changed.
        assert template.json("run", *SHAPE)["source"] == "disk"
        for number, (name, says, may_be_served, needs_root, poison) in enumerate(members):
            if needs_root and not as_root:
                skipped += 1
                print(f"skipped   {name}: only the superuser can make another user's files")
                continue
            shutil.copytree(template.root, root / str(number), symlinks=True)
            place = Place(root / str(number))
            poison(place)
            evil = tree(place.root / "evil")
            done = place.kiln("run", *SHAPE, "--check", "--json")
            report = json.loads(done.stdout)
            source = "disk" if may_be_served else "compiled"
            good = report["source"] == source and report["check"]["ok"] and says in done.stderr and tree(place.root / "evil") == evil
            failed += not good
            refused += good and not may_be_served
            served += good and may_be_served
            print(f"{'FAILED' if not good else 'served' if may_be_served else 'refused':9} {name}")
            if not good:
                print(f"          expected: {source}, {says!r}; got: {report['source']}, {report['check']}, {done.stderr!r}")
    print(f"poisoning set: {refused} refused, {served} served rightly, {skipped} skipped, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
