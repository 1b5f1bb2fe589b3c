"""Arm processors as qemu gives them: what is detected, which paths run on which, and that a cache filled on another architecture serves
them. Usage: aarch64_test.py KILN OTHER_KILN
KILN is built for aarch64 and runs under TEST_EMULATOR, which takes the processor from QEMU_CPU; OTHER_KILN is of the same sources, and
runs here."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

KILN = []
OTHER_KILN = ""

# Processors of qemu 7.2, and the strings that name such machines.
BASE = "aarch64:neon"
DOT = BASE + ",dotprod,fullfp16"
MATRIX = BASE + ",dotprod,i8mm,bf16,fullfp16"
MACHINES = {
    "cortex-a72": BASE,
    "cortex-a76": DOT,
    "neoverse-n1": DOT,
    "a64fx": BASE + ",fullfp16,sve;sve=512",
    "max,sve=off,sme=off": MATRIX,
    "max,sve128=on,sme=off": MATRIX + ",sve,sve2;sve=128",
    "max,sve256=on,sme=off": MATRIX + ",sve,sve2;sve=256",
    "max,sme=off": MATRIX + ",sve,sve2;sve=512",
    "max": MATRIX + ",sve,sve2,sme;sve=512;sme=256",
    "max,sme512=on": MATRIX + ",sve,sve2,sme;sve=512;sme=512",
}
# One machine for each set of paths; later ones can do more.
RICHER_AND_RICHER = ["cortex-a72", "neoverse-n1", "max,sve=off,sme=off", "max,sve256=on,sme=off", "max,sme512=on"]
# One of each kind of kernel: vector times matrix, a small tile, the unbounded class.
SHAPES = [{"m": 1, "n": 33, "k": 70}, {"m": 4, "n": 40, "k": 64}, {"m": 100, "n": 33, "k": 70}]


class Machines(unittest.TestCase):
    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="kiln-aarch64-test-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("KILN_") and name != "QEMU_CPU"}
        self.env.update(KILN_CACHE_DIR=str(self.dir / "cache"), XDG_DATA_HOME=str(self.dir / "data"), KILN_THREADS="1")
        (self.dir / "shapes.json").write_text(json.dumps({"kernels": [{"op": "int8_mm", **shape} for shape in SHAPES]}))

    def kiln(self, command, *words, expect=0, **env):
        done = subprocess.run([*command, *words], env={**self.env, **env}, cwd=self.dir, capture_output=True, text=True, timeout=120)
        self.assertEqual(expect, done.returncode, f"{command} {words} {env}\n{done.stdout}{done.stderr}")
        return done

    def on(self, cpu, *words, expect=0, **env):
        return self.kiln(KILN, *words, expect=expect, QEMU_CPU=cpu, **env)

    def info(self, cpu):
        return json.loads(self.on(cpu, "info", "--json").stdout)

    def paths(self, cpu):
        (op,) = [op for op in self.info(cpu)["ops"] if op["op"] == "int8_mm"]
        return [path for path in op["paths"] if path["device"] == "cpu"]

    def computed(self, cpu, shape, **env):
        """The report of a call whose result equals the reference. Without the comparison for sme: qemu 7.2 never writes the odd rows of an
        8-bit SMOPA, so what it computes is tested elsewhere, in a way of its own."""
        words = ["run", "int8_mm", *(f"{name}={value}" for name, value in shape.items()), "--json"]
        isa = json.loads(self.on(cpu, "explain", *words[1:], **env).stdout)["isa"]
        report = json.loads(self.on(cpu, *words, *([] if isa == "sme" else ["--check"]), **env).stdout)
        self.assertEqual(isa, report["isa"])
        self.assertTrue(isa == "sme" or report["check"]["ok"], report)
        return report


class Detection(Machines):
    def test_targets(self):
        for cpu, target in MACHINES.items():
            with self.subTest(cpu=cpu):
                self.assertEqual(target + "\n", self.on(cpu, "info", "--target").stdout)

    def test_named_cores(self):
        known = {known["name"]: known["target"] for known in self.info("max")["known_targets"]}
        for cpu in set(MACHINES) & set(known):
            with self.subTest(cpu=cpu):
                self.assertEqual(MACHINES[cpu], known[cpu])
                self.assertEqual(cpu, self.info(cpu)["machine"]["cpu"])
        self.assertLessEqual({"cortex-a72", "cortex-a76", "neoverse-n1", "a64fx"}, set(known))


class Dispatch(Machines):
    def test_each_path_runs_where_its_features_are(self):
        """A path that is forced runs right or is refused with what the machine lacks: nothing ends in SIGILL."""
        for cpu in RICHER_AND_RICHER:
            features = set(MACHINES[cpu].split(":")[1].split(";")[0].split(","))
            for path in self.paths(cpu):
                with self.subTest(cpu=cpu, isa=path["isa"]):
                    force = {"KILN_FORCE": path["isa"], "KILN_CACHE": "off"}
                    if path["available"]:
                        self.assertLessEqual(set(path["needs"]), features)
                        self.assertEqual(path["isa"], self.computed(cpu, SHAPES[1], **force)["isa"])
                    else:
                        said = self.on(cpu, "run", "int8_mm", "m=4", "n=40", "k=64", expect=1, **force).stderr
                        self.assertIn(f"{path['isa']}: {path['reason']}", said)
                        self.assertRegex(path["reason"], "^(made for x86_64|the machine lacks .+)$")

    def test_each_path_can_be_left_out(self):
        for cpu in RICHER_AND_RICHER:
            left_out = []
            for path in self.paths(cpu):
                if not path["available"]:
                    continue
                explained = json.loads(self.on(cpu, "explain", "int8_mm", "m=4", "n=40", "k=64", "--json", KILN_DISABLE=",".join(["avx2", *left_out])).stdout)
                self.assertNotIn(explained["isa"], left_out, cpu)
                left_out.append(path["isa"])
            self.assertGreaterEqual(len(left_out), 2)


class Doctor(Machines):
    def test_runs_the_path_that_matters_on_this_machine(self):
        for cpu, isa in zip(RICHER_AND_RICHER, ("neon", "sdot", "i8mm", "sve_i8mm", "sme")):
            with self.subTest(cpu=cpu):
                # qemu 7.2 computes sme's SMOPA wrongly, and doctor must notice; another emulator may be right.
                done = subprocess.run([*KILN, "doctor"], env={**self.env, "QEMU_CPU": cpu}, capture_output=True, text=True, timeout=120)
                (line,) = [line for line in done.stdout.splitlines() if "run int8_mm" in line]
                self.assertRegex(line, rf"^ok +run int8_mm +{isa}: generated code .*" + (rf"|^fail +run int8_mm +{isa} gives a wrong result \(KILN_DISABLE={isa} .*" if isa == "sme" else ""))
                self.assertEqual(1 if line.startswith("fail") else 0, done.returncode, done.stdout + done.stderr)


class FilledElsewhere(Machines):
    def setUp(self):
        super().setUp()
        cache = {"KILN_CACHE_DIR": str(self.dir / "first")}
        self.kiln([OTHER_KILN], "warmup", "shapes.json", "--target", MACHINES["cortex-a72"], **cache)
        report = json.loads(self.on("cortex-a72", "cache", "verify", "--recompile", "--json", **cache).stdout)
        self.assertEqual(0, report["recompiled"]["skipped"], f"{OTHER_KILN} was built from other sources than {KILN[-1]}: build both")

    def fill(self, target, **env):
        report = json.loads(self.kiln([OTHER_KILN], "warmup", "shapes.json", "--target", target, "--json", **env).stdout)
        self.assertEqual(0, report["failed"])
        self.assertEqual(report["kernels"], report["compiled"] + report["hit"])

    def test_every_path_of_every_machine_is_found_on_disk(self):
        for cpu in RICHER_AND_RICHER:
            target = self.on(cpu, "info", "--target").stdout.strip()
            forced = [path["isa"] for path in self.paths(cpu) if path["available"] and path["generator"] != "none"]
            for force in [{}, *({"KILN_FORCE": isa} for isa in forced)]:
                self.fill(target, **force)
                for shape in SHAPES:
                    with self.subTest(cpu=cpu, force=force, shape=shape):
                        self.assertEqual("disk", self.computed(cpu, shape, KILN_MISS="error", **force)["source"])

    def test_a_named_class_of_cores(self):
        for cpu in ("cortex-a72", "neoverse-n1"):
            self.fill(cpu)
            for shape in SHAPES:
                with self.subTest(cpu=cpu, shape=shape):
                    self.assertEqual("disk", self.computed(cpu, shape, KILN_MISS="error")["source"])

    def test_the_same_bytes_come_out_here_and_there(self):
        for cpu in RICHER_AND_RICHER:
            self.fill(MACHINES[cpu])
        report = json.loads(self.on("cortex-a72", "cache", "verify", "--recompile", "--json").stdout)
        self.assertGreaterEqual(report["ok"], len(SHAPES))
        self.assertEqual({"same": report["ok"], "different": [], "failed": [], "skipped": 0}, report["recompiled"])

    def test_kernels_for_a_richer_machine_are_no_hits_on_a_poorer_one(self):
        for richer, cpu in zip(RICHER_AND_RICHER[::-1], RICHER_AND_RICHER[-2::-1]):
            self.fill(MACHINES[richer])
            with self.subTest(cpu=cpu, filled_for=richer):
                shape = SHAPES[1]
                taken = {machine: json.loads(self.on(machine, "explain", "int8_mm", *(f"{n}={v}" for n, v in shape.items()), "--json").stdout) for machine in (richer, cpu)}
                self.assertEqual("disk", taken[richer]["tier"])
                if taken[richer]["key"] == taken[cpu]["key"]:
                    continue  # the same kernel serves both
                self.assertEqual("none", taken[cpu]["tier"])
                said = self.on(cpu, "run", "int8_mm", *(f"{n}={v}" for n, v in shape.items()), "--check", KILN_LOG="debug").stderr
                self.assertIn(f"[debug] {taken[cpu]['key']} is not in ", said)
                self.assertIn("[debug] compiled int8_mm", said)


if __name__ == "__main__":
    KILN = [*os.environ.get("TEST_EMULATOR", "").split(), str(pathlib.Path(sys.argv.pop(1)).resolve())]
    OTHER_KILN = sys.argv.pop(1)
    if not os.access(OTHER_KILN, os.X_OK):
        sys.exit(f"{OTHER_KILN} is not there: build the preset release first, or configure with -DKILN_OTHER_KILN=FILE, a kiln of these sources for this machine")
    unittest.main()
