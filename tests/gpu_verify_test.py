"""What scripts/gpu-verify makes of a record when only some kernels are verified: no row is lost. Runs without a GPU."""
import copy
import json
import pathlib
import unittest

import gpu_kernels

HERE = pathlib.Path(__file__).resolve().parent
RECORD = {"target": "sm_90a", "device": "A GPU", "driver": "13.0", "torch": "2.11.0", "date": "2026-01-01", "empty_us": 2.5, "sm_80": [{"desc": "a", "ok": True}],
          "kernels": [{"desc": "a m=1", "ok": True}, {"desc": "b m=1", "ok": True, "us": 10.0, "clean_us": 9.0, "floor_us": 1.0, "torch_us": 20.0},
                      {"desc": "gone m=1", "ok": True, "us": 5.0, "clean_us": 4.0, "floor_us": 1.0}]}
LISTED = ["a m=1", "b m=1", "c m=1", "d m=1"]


class Update(unittest.TestCase):
    def test_a_row_that_was_not_verified_now_stays(self):
        before = copy.deepcopy(RECORD)
        now = [{"desc": "d m=1", "ok": False, "us": 1.0, "clean_us": 1.0, "floor_us": 0.5}, {"desc": "a m=1", "ok": True, "us": 3.0, "clean_us": 2.0, "floor_us": 1.0}]
        record = gpu_kernels.updated(RECORD, now, "2026-02-02", LISTED)
        self.assertEqual(before, RECORD)
        self.assertEqual(["a m=1", "b m=1", "d m=1", "gone m=1"], [row["desc"] for row in record["kernels"]])
        self.assertEqual({**now[1], "date": "2026-02-02"}, record["kernels"][0])
        self.assertEqual(RECORD["kernels"][1:], [record["kernels"][1], record["kernels"][3]])
        self.assertEqual({key: value for key, value in RECORD.items() if key != "kernels"}, {key: value for key, value in record.items() if key != "kernels"})
        self.assertEqual(record, gpu_kernels.updated(record, now, "2026-02-02", LISTED))
        table = gpu_kernels.table(record)
        self.assertEqual(["| a m=1 | 3.0 | 2.0 | – | – | 1.0 |", "| b m=1 | 10.0 | 9.0 | 20.0 | – | 1.0 |", "| d m=1 | 1.0 | 1.0 | – | – | 0.5 |",
                          "| gone m=1 | 5.0 | 4.0 | – | – | 1.0 |"], table[4:])

    def test_only_records_of_the_same_machine_mix(self):
        here = {key: RECORD[key] for key in gpu_kernels.SAME}
        self.assertEqual("", gpu_kernels.why_not_updated(RECORD, here))
        self.assertEqual("driver is '13.0' there and '13.1' here", gpu_kernels.why_not_updated(RECORD, {**here, "driver": "13.1"}))
        self.assertEqual("torch is None there and '2.11.0' here", gpu_kernels.why_not_updated({key: here[key] for key in here if key != "torch"}, here))

    def test_the_table_is_that_of_the_record(self):
        """Of the records kept here: neither was written without the other."""
        for path in sorted((HERE / "gpu").glob("sm_*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            written = (HERE / "gpu/table.md").read_text(encoding="utf-8").splitlines()
            self.assertEqual(gpu_kernels.table(record), written)


if __name__ == "__main__":
    unittest.main()
