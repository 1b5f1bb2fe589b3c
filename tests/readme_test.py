"""README says what is so: its C program is api/examples/minimal.c (which other tests compile and run), its support table is that of the
implementation table, its environment what `kiln info` tells, its links lead somewhere. Usage: readme_test.py SOURCE_ROOT KILN"""
import json
import os
import pathlib
import re
import subprocess
import sys
import unittest


class Readme(unittest.TestCase):
    root = pathlib.Path()
    kiln = []

    def setUp(self):
        self.text = (self.root / "README.md").read_text(encoding="utf-8")

    def test_c_program(self):
        blocks = re.findall(r"^```c\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        self.assertEqual([(self.root / "api/examples/minimal.c").read_text(encoding="utf-8")], blocks)

    def test_support_table(self):
        made = subprocess.run([self.root / "scripts/support-table", "--check", *self.kiln], capture_output=True, text=True)
        self.assertEqual(0, made.returncode, made.stderr)

    def test_environment(self):
        told = json.loads(subprocess.run([*self.kiln, "info", "--json"], check=True, capture_output=True, text=True).stdout)
        rows = re.findall(r"^\| (`KILN_[^|]*) \|", self.text, re.MULTILINE)
        self.assertEqual([row["name"] for row in told["environment"]], re.findall(r"KILN_[A-Z_]+", " ".join(rows)))

    def test_links(self):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", self.text)
        self.assertTrue(links)
        for link in links:
            if not link.startswith("https://"):
                self.assertTrue((self.root / link).exists(), f"README links to {link}")


if __name__ == "__main__":
    Readme.root = pathlib.Path(sys.argv.pop(1)).resolve()
    Readme.kiln = [*os.environ.get("TEST_EMULATOR", "").split(), sys.argv.pop(1)]
    unittest.main()
