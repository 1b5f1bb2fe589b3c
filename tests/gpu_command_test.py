"""The command and GPUs: over a driver without a GPU (tests/fake_cuda, found through LD_LIBRARY_PATH), and without any.
Usage: gpu_command_test.py KILN FOLDER_OF_FAKE_LIBCUDA"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

FAKE = sys.argv.pop()
KILN = sys.argv.pop()
EMULATOR = os.environ.get("TEST_EMULATOR", "").split()
FP8 = ["fp8_block_bmm", "b=2", "m=5", "n=576", "k=1040"]
DESC = ["int4_mm", "m=1", "n=256", "k=512", "group=64"]


class Gpu(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def kiln(self, *words, driver=True, expect=0, **env):
        environment = {"PATH": "/usr/bin:/bin" if EMULATOR else "/nowhere", "HOME": str(self.folder), "KILN_CACHE_DIR": str(self.folder / "cache"),
                       **{name: os.environ[name] for name in ("QEMU_LD_PREFIX", "QEMU_CPU", "ASAN_OPTIONS") if name in os.environ}, **env}
        if driver:
            environment["LD_LIBRARY_PATH"] = FAKE
        done = subprocess.run([*EMULATOR, KILN, *words], env=environment, capture_output=True, text=True)
        self.assertEqual(expect, done.returncode, done.stderr)
        return done

    def json(self, *words, **how):
        return json.loads(self.kiln(*words, "--json", **how).stdout)

    def test_info_tells_of_the_devices(self):
        gpus = self.json("info")["gpus"]
        self.assertTrue(gpus["available"])
        self.assertEqual("13.0", gpus["driver"])
        self.assertEqual([("Fake H100", "nvptx:sm_90a", 4)] * 2, [(d["name"], d["target"], d["sms"]) for d in gpus["devices"]])
        self.assertIn("cuda:1", self.kiln("info").stdout)
        absent = self.json("info", driver=False)
        self.assertFalse(absent["gpus"]["available"])
        self.assertIn("no NVIDIA driver", absent["gpus"]["reason"])
        rows = [path for op in absent["ops"] for path in op["paths"] if path["device"] == "cuda"]
        self.assertTrue(rows)
        for row in rows:
            self.assertFalse(row["available"])
            self.assertIn("no NVIDIA driver", row["reason"])

    def test_the_driver_assembles_and_the_next_process_finds_the_cubin(self):
        first = self.json("warmup", *DESC, "device=cuda:1")
        self.assertEqual((1, 0), (first["compiled"], first["failed"]))
        second = self.json("warmup", *DESC, "device=cuda:0")  # an equal device: the same kernel
        self.assertEqual((1, 0), (second["hit"], second["compiled"]))
        kernel, = self.json("cache", "list")["kernels"]
        whole = self.json("cache", "inspect", kernel["key"])
        self.assertEqual(("cubin", "driver 13.0", 13000), (whole["format"], whole["compiler"], whole["driver_version"]))
        self.assertIn("cubin by driver 13.0", self.kiln("cache", "inspect", kernel["key"]).stdout)
        self.assertEqual("disk", self.json("explain", *DESC, "device=cuda")["tier"])
        verified = self.json("cache", "verify", "--recompile")
        self.assertEqual((1, 1, [], []), (verified["ok"], verified["recompiled"]["same"], verified["recompiled"]["different"],
                                          verified["recompiled"]["failed"]))

    def test_bundles_carry_cubins(self):
        self.kiln("warmup", *DESC, "device=cuda")
        bundle = str(self.folder / "gpu.bundle")
        self.kiln("cache", "export", bundle, "--target", "sm_90a")
        self.kiln("cache", "clear")
        self.kiln("cache", "import", bundle, "--allow-unsigned")
        self.assertEqual(1, self.json("warmup", *DESC, "device=cuda")["hit"])

    def test_another_machine_without_a_driver(self):
        made = self.json("warmup", *DESC, "--target", "sm_90a", driver=False)
        self.assertEqual(("nvptx:sm_90a", 1), (made["target"], made["compiled"]))
        again = self.json("warmup", *DESC, "--target", "nvptx:sm_90a", driver=False)
        self.assertEqual(1, again["hit"])
        kernel, = self.json("cache", "list")["kernels"]
        self.assertIn(self.json("cache", "inspect", kernel["key"])["format"], ("ptx", "cubin"))  # cubin beside a toolkit
        ptx = self.kiln("disasm", *DESC, "--target", "sm_80", driver=False).stdout
        for text in (".target sm_80\n", ".visible .entry main(", "mma.sync.aligned.m16n8k16"):
            self.assertIn(text, ptx)
        self.assertIn("needs sm_80 or later", self.kiln("explain", *DESC, "--target", "sm_75", driver=False, expect=1).stdout)

    def test_toggles(self):
        taken = lambda **env: self.json("explain", *DESC, "device=cuda", expect=env.pop("expect", 0), **env)  # noqa: E731
        self.assertEqual("mma_sync", taken(KILN_FORCE="mma_sync")["isa"])
        for env in ({"KILN_DISABLE": "nvidia"}, {"KILN_DISABLE": "ptx"}, {"KILN_DISABLE": "mma_sync,wgmma"}, {"KILN_FORCE": "int4_mm:amx"}):
            with self.subTest(**env):
                self.assertIsNone(taken(expect=1, **env)["isa"])
        self.assertIn("left out by KILN_DISABLE", self.kiln("run", *DESC, "device=cuda", KILN_DISABLE="nvidia", expect=1).stderr)
        self.kiln("run", *DESC, KILN_DISABLE="nvidia")
        self.kiln("run", *DESC, KILN_FORCE="mma_sync")  # no CPU has the path

    def test_without_a_driver_a_desc_for_a_gpu_is_refused_and_others_run(self):
        self.assertIn("no NVIDIA driver", self.kiln("run", *DESC, "device=cuda", driver=False, expect=1).stderr)
        self.assertTrue(self.json("run", *DESC, "--check", driver=False)["check"]["ok"])

    def test_fp8_names_the_sm_that_it_needs(self):
        refused = self.kiln("explain", *FP8, "--target", "sm_80", driver=False, expect=1).stdout
        self.assertIn("sm_80: needs sm_90a", refused)
        self.assertIn("needs sm_90a", self.kiln("warmup", *FP8, "--target", "sm_89", driver=False, expect=1).stderr)
        ptx = self.kiln("disasm", *FP8, "--target", "sm_90a", driver=False).stdout
        for text in (".target sm_90a\n", "wgmma.mma_async", ".param .align 64 .b8", "cp.async.bulk.tensor"):
            self.assertIn(text, ptx)
        self.assertTrue(self.json("run", *FP8, "--check", driver=False)["check"]["ok"])  # by the reference, on the CPU

    def test_tuning_is_kept_for_later_processes(self):
        explain = lambda: self.json("explain", *FP8, "device=cuda")  # noqa: E731
        heuristic = explain()
        self.assertEqual(("heuristic", "", "none"), (heuristic["configuration_from"], heuristic["tuned_for"], heuristic["tier"]))
        self.assertIn("(heuristic)", self.kiln("explain", *FP8, "device=cuda").stdout)
        self.assertIn("--tune with --target sm_90a", self.kiln("warmup", *FP8, "--tune", "--target", "sm_90a", expect=2).stderr)
        report = self.json("warmup", *FP8, "device=cuda", "--tune")
        self.assertEqual((1, 0, 0), (report["tuned"], report["warmed"], report["failed"]))
        result, = report["results"]
        # The fake's kernels take no time: nothing is faster than the heuristic's.
        self.assertEqual((heuristic["configuration"], "Fake H100"), (result["configuration"], result["device"]))
        self.assertGreater(len(result["candidates"]), 1)
        self.assertEqual([""] * len(result["candidates"]), [candidate["error"] for candidate in result["candidates"]])
        tuned = explain()
        self.assertEqual(("tuned", "Fake H100", "disk", heuristic["configuration"]),
                         (tuned["configuration_from"], tuned["tuned_for"], tuned["tier"], tuned["configuration"]))
        self.assertNotEqual(heuristic["key"], tuned["key"])
        self.assertIn("(tuned on Fake H100)", self.kiln("explain", *FP8, "device=cuda").stdout)
        self.assertIn("(tuned on Fake H100)", self.kiln("cache", "inspect", tuned["key"]).stdout)
        self.assertEqual("disk", self.json("run", *FP8, "device=cuda")["source"])
        verified = self.json("cache", "verify", "--recompile")
        self.assertEqual((1, 1, []), (verified["ok"], verified["recompiled"]["same"], verified["recompiled"]["different"]))
        bundle = str(self.folder / "tuned.bundle")
        self.kiln("cache", "export", bundle, "--target", "sm_90a")
        self.kiln("cache", "clear")
        self.assertEqual("heuristic", explain()["configuration_from"])
        self.kiln("cache", "import", bundle, "--allow-unsigned")
        self.assertEqual("tuned", explain()["configuration_from"])
        # What has nothing to choose from is warmed up.
        both = self.json("warmup", *DESC, "device=cuda", "--tune")
        self.assertEqual((0, 1, 0), (both["tuned"], both["warmed"], both["failed"]))

    def test_ptx_is_dumped(self):
        self.kiln("warmup", *DESC, "device=cuda", KILN_DUMP_DIR=str(self.folder / "dump"))
        dumped = {path.suffix: path for path in (self.folder / "dump").iterdir()}
        self.assertEqual({".ptx", ".cubin", ".txt"}, set(dumped))
        self.assertIn(".visible .entry main", dumped[".ptx"].read_text())
        self.assertIn("Used 32 registers", dumped[".txt"].read_text())  # the assembler's log


if __name__ == "__main__":
    unittest.main()
