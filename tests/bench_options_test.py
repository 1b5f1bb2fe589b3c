"""The command line that all benches share. Usage: bench_options_test.py BENCH…"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

BENCHES = []


def run(bench, *words):
    emulator = os.environ.get("TEST_EMULATOR")
    return subprocess.run([*([emulator] if emulator else []), bench, *words], capture_output=True, text=True, timeout=100)


class Options(unittest.TestCase):
    def groups(self, bench):
        """As --help lists them."""
        done = run(bench, "--help")
        self.assertEqual((0, ""), (done.returncode, done.stderr), bench)
        listed = re.search(r"groups to run, of: ([a-z0-9_, \n]+?)\s*--", done.stdout)
        self.assertIsNotNone(listed, done.stdout)
        return re.split(r",\s*", listed[1])

    def test_what_is_not_understood_is_an_error_that_lists_what_is(self):
        for bench in BENCHES:
            name, groups = pathlib.Path(bench).name, self.groups(bench)
            self.assertGreater(len(groups), 1)
            for words, says in {
                ("--only", "nosuch"): ["--only", "'nosuch' is not a group: allowed is " + ", ".join(groups)],
                ("--only", f"{groups[0]},nosuch"): ["'nosuch' is not a group"],
                ("--only", ""): ["--only"],
                ("--only",): ["--only"],
                (groups[0],): [groups[0]],
                ("--only", groups[0], groups[1]): [groups[1]],
                ("limits",): ["limits"],
                ("--nosuch",): ["--nosuch"],
                ("--json",): ["--json"],
                **({("--rows", "0"): ["--rows", "1 to 1000000000"], ("--rows", "abc"): ["--rows"]} if name == "bench_latency" else {}),
            }.items():
                with self.subTest(bench=name, words=words):
                    done = run(bench, *words)
                    self.assertEqual((2, ""), (done.returncode, done.stdout))
                    for part in says:
                        self.assertIn(part, done.stderr)
                    self.assertEqual(1, done.stderr.count("\n"))
                    self.assertTrue(done.stderr.startswith(name + ": "), done.stderr)

    def test_smoke_takes_what_it_heeds(self):
        for bench in BENCHES:
            name, group = pathlib.Path(bench).name, self.groups(bench)[0]
            with self.subTest(bench=name):
                listed = "--smoke" in run(bench, "--help").stdout
                self.assertEqual(name != "bench_arm_mca", listed)
                if name in ("bench_int8_mm", "bench_int8_linear", "bench_arm_mca"):  # the first two run everything or nothing
                    done = run(bench, "--smoke", "--only", group)
                    self.assertEqual((2, ""), (done.returncode, done.stdout))
                    self.assertIn("--smoke", done.stderr)

    def test_figures_go_where_they_are_wanted(self):
        latency = [bench for bench in BENCHES if pathlib.Path(bench).name == "bench_gpu_latency"]
        for bench in latency:  # the quickest
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "figures.json"
                done = run(bench, "--smoke", "--only", "launch", "--json", str(path))  # nothing without a GPU
                self.assertEqual(0, done.returncode, done.stderr)
                self.assertTrue(path.exists())
                done = run(bench, "--smoke", "--only", "launch", "--json", folder)
                self.assertEqual(1, done.returncode, done.stderr)
                self.assertIn("cannot write", done.stderr)


if __name__ == "__main__":
    BENCHES = sys.argv[1:]
    unittest.main(argv=sys.argv[:1])
