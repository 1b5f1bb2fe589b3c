"""Every listed GPU kernel assembles without spills, a local stack or an advisory C75xx (lost speed), where a ptxas is found.
Usage: ptxas_test.py KILN…     a ptxas older than CUDA 12.0 knows no sm_90a: it checks sm_80 only"""
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import unittest

import gpu_kernels

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILN = sys.argv[1:]


def find_ptxas():
    for path in (shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas", str(ROOT / ".cache/ptxas/ptxas")):
        if path and os.access(path, os.X_OK):
            return path
    return None


PTXAS = find_ptxas()


def assemble(target, text):
    done = subprocess.run([PTXAS, "-v", f"-arch={target}", "-o", "/dev/null", "/dev/stdin"], input=text, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


class Ptxas(unittest.TestCase):
    def test_no_spills_and_no_advisories(self):
        release = subprocess.run([PTXAS, "--version"], capture_output=True, text=True, check=True).stdout
        major = int(re.search(r"release (\d+)\.", release)[1])
        descs = [desc for _, desc in gpu_kernels.listed()]
        # One test run has seconds: the whole list on the newest target, a part of it on the oldest.
        anywhere = [desc for desc in descs if gpu_kernels.split_path(desc)[1] is None and gpu_kernels.runs_on_older(desc)]
        targets = {"sm_90a": descs, "sm_80": anywhere[::6]} if major >= 12 else {"sm_80": anywhere}
        for target, some in targets.items():
            texts = {text: desc for desc, text in gpu_kernels.all_ptx(KILN, target, some).items()}  # kernels that serve several descs once
            texts = {desc: text for text, desc in texts.items()}
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                results = list(pool.map(lambda text: assemble(target, text), texts.values()))
            for desc, (status, log) in zip(texts, results):
                with self.subTest(target=target, desc=desc):
                    self.assertEqual(0, status, log)
                    self.assertNotRegex(log, r"\(C75\d\d\)")
                    self.assertRegex(log, r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
                    self.assertIsNone(re.search(r"[1-9]\d* bytes (stack frame|spill)", log), log)


if __name__ == "__main__":
    if PTXAS is None:
        print("no ptxas: scripts/ptxas fetches one")
        sys.exit(77)
    unittest.main(argv=sys.argv[:1])
