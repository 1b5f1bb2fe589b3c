"""Includes go one way only: api → backends → jit → cache; sibling backends never include each other; a library that one layer wraps
is included nowhere else. Usage: layers_test.py SOURCE_ROOT"""
import pathlib
import re
import sys
import unittest

LAYERS = ["cache", "jit", "backends", "api"]  # lowest first
OUTSIDE = ["tests", "bench"]  # may include any layer, and no layer includes them

# The only places, as path prefixes, that may include a third-party library.
LIBRARIES = {
    r"asmjit/.*": ["backends/x86/", "backends/arm/"],
    r"llvm(-c)?/.*": ["backends/llvm/generator/"],
    r"sqlite3\.h": ["cache/"],
    r"sodium\.h|sodium/.*": ["cache/"],
    r"spdlog/.*": ["cache/"],
    r"zstd\.h": ["cache/"],
    r"hiredis/.*": ["cache/"],
    r"pthreadpool\.h": ["jit/"],
    r"CLI/.*": ["api/cli/"],
}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def violations(files):
    """`files`: text by path from the root. Returns one line for each include that breaks a rule."""
    found = []
    for path, text in sorted(files.items()):
        layer = path.split("/")[0]
        for quoted, angled in INCLUDE.findall(text):
            reason = refused(path, layer, quoted, files) if quoted else refused_library(path, layer, angled)
            if reason:
                found.append(f"{path}: includes {quoted or angled}: {reason}")
    return found


def refused(path, layer, included, files):
    if included not in files:
        return "no such file from the root; includes are written from there"
    other = included.split("/")[0]
    if layer in OUTSIDE:
        return None
    if other not in LAYERS:
        return f"{other}/ is no layer"
    if LAYERS.index(other) > LAYERS.index(layer):
        return f"{layer}/ stands below {other}/"
    if layer == other == "backends":
        own, theirs = path.split("/")[1], included.split("/")[1]
        if path.count("/") > 1 and own != theirs:
            return f"backends/{own} reaches beyond itself"
    return None


def refused_library(path, layer, included):
    if layer in OUTSIDE:
        return None
    for library, places in LIBRARIES.items():
        if re.fullmatch(library, included) and not path.startswith(tuple(places)):
            return f"only for {', '.join(places)}"
    return None


class Layers(unittest.TestCase):
    root = pathlib.Path()

    def test_tree(self):
        files = {}
        for folder in LAYERS + OUTSIDE:
            for path in (self.root / folder).rglob("*"):
                if path.suffix in (".h", ".c", ".cpp", ".inc"):
                    files[path.relative_to(self.root).as_posix()] = path.read_text(encoding="utf-8")
        self.assertGreater(len(files), 50, f"{self.root} is not the source tree")
        self.assertEqual([], violations(files))

    def test_each_rule_refuses(self):
        good = {
            "cache/a.h": "#include <string>",
            "jit/b.h": '#include "cache/a.h"',
            "backends/x86/c.h": '#include "jit/b.h"\n#include <asmjit/x86.h>',
            "backends/llvm/d.h": "",
            "backends/table.cpp": '#include "backends/x86/c.h"\n#include "backends/llvm/d.h"',
            "backends/table.h": "",
            "api/e.h": '#include "backends/table.h"\n# include "cache/a.h"',
            "tests/f.h": '#include "api/e.h"\n#include <sqlite3.h>',
        }
        self.assertEqual([], violations(good))
        for path, text in [
            ("cache/up.h", '#include "jit/b.h"'),
            ("jit/up.h", '  #  include "backends/table.h"'),
            ("backends/x86/up.h", '#include "api/e.h"'),
            ("backends/x86/sibling.h", '#include "backends/llvm/d.h"'),
            ("backends/x86/table.h", '#include "backends/table.h"'),
            ("api/test.h", '#include "tests/f.h"'),
            ("jit/relative.h", '#include "b.h"'),
            ("jit/dotted.h", '#include "../cache/a.h"'),
            ("jit/library.h", "#include <asmjit/core.h>"),
            ("backends/llvm/library.h", "#include <llvm/IR/Module.h>"),
        ]:
            with self.subTest(path):
                self.assertEqual(1, len(violations({**good, path: text})))


if __name__ == "__main__":
    Layers.root = pathlib.Path(sys.argv.pop(1)).resolve()
    unittest.main()
