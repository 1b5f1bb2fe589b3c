"""What was verified on a GPU is what is emitted now: the PTX of every listed kernel has the digest that scripts/gpu-verify wrote down.
Usage: gpu_record_test.py KILN…"""
import json
import pathlib
import re
import sys
import unittest

import gpu_kernels

HERE = pathlib.Path(__file__).resolve().parent
KILN = sys.argv[1:]
RECORDS = sorted((HERE / "gpu").glob("sm_*.json"))


class Record(unittest.TestCase):
    def test_every_listed_kernel_is_as_it_was_verified(self):
        descs = [desc for _, desc in gpu_kernels.listed()]
        self.assertEqual(len(set(descs)), len(descs), "a kernel is listed twice")
        for path in RECORDS:
            record = json.loads(path.read_text(encoding="utf-8"))
            self.assertEqual(path.stem, record["target"])
            self.assertRegex(record["driver"], r"^\d+\.\d+$")
            recorded = {row["desc"]: row for row in record["kernels"]}
            emitted = gpu_kernels.all_ptx(KILN, path.stem, descs)
            for desc in descs:
                with self.subTest(target=path.stem, desc=desc):
                    self.assertIn(desc, recorded, "was never verified: run scripts/gpu-verify on a GPU")
                    self.assertTrue(recorded[desc]["ok"], recorded[desc])
                    self.assertEqual(recorded[desc]["ptx_sha256"], gpu_kernels.digest(emitted[desc]),
                                     "its PTX has changed since it was verified: run scripts/gpu-verify on a GPU")
            older = {row["desc"]: row for row in record["sm_80"]}
            shapes = [desc for purpose, desc in gpu_kernels.listed() if purpose == "shape" and gpu_kernels.runs_on_older(desc)]
            for desc, text in gpu_kernels.all_ptx(KILN, "sm_80", shapes).items():
                with self.subTest(target="sm_80", desc=desc):
                    self.assertIn(desc, older, "was never verified: run scripts/gpu-verify on a GPU")
                    self.assertTrue(older[desc]["ok"], older[desc])
                    self.assertEqual(older[desc]["ptx_sha256"], gpu_kernels.digest(text),
                                     "its PTX has changed since it was verified: run scripts/gpu-verify on a GPU")

    def test_emission_is_deterministic_and_for_its_target(self):
        _, desc = gpu_kernels.listed()[0]
        for target in ("sm_80", "sm_86", "sm_89", "sm_90a"):
            text = gpu_kernels.ptx(KILN, desc, target)
            self.assertEqual(text, gpu_kernels.ptx(KILN, desc, target))
            self.assertRegex(text, re.compile(rf"^\.target {target}$", re.MULTILINE))


if __name__ == "__main__":
    if not RECORDS:
        print("no record yet: scripts/gpu-verify has not run on a GPU")
        sys.exit(77)
    unittest.main(argv=sys.argv[:1])
