"""The list of GPU kernels that are verified, and the PTX that the command makes of them. For tests and scripts/gpu-verify."""
import concurrent.futures
import hashlib
import os
import pathlib
import subprocess

LIST = pathlib.Path(__file__).resolve().parent / "gpu/kernels.txt"


def listed(path=LIST):
    """[(purpose, "op field=value …")]"""
    lines = [line.split(None, 1) for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [(purpose, desc.strip()) for purpose, desc in lines]


def split_path(desc):
    """("op field=value …", the ISA path that the line forces or None)"""
    words = desc.split()
    paths = [word.partition("=")[2] for word in words if word.startswith("path=")]
    return " ".join(word for word in words if not word.startswith("path=")), paths[0] if paths else None


def runs_on_older(desc):
    """Whether GPUs before sm_90 have a kernel for it."""
    return not desc.startswith("fp8_block_bmm") and split_path(desc)[1] != "wgmma"


def ptx(kiln, desc, target):
    """`kiln`: the command's words."""
    fields, path = split_path(desc)
    done = subprocess.run([*kiln, "disasm", *fields.split(), "--target", target], capture_output=True, text=True,
                          env={**os.environ, "KILN_CACHE": "off", "KILN_LOG": "error", "KILN_FORCE": path or ""})
    if done.returncode != 0:
        raise RuntimeError(f"{desc} for {target}: {done.stderr.strip()}")
    # The command's two lines of heading are not the kernel's text: the second is the key, which changes with any source.
    return "".join(line + "\n" for line in done.stdout.splitlines()[2:])


def all_ptx(kiln, target, descs):
    """{desc: text}, by several processes at once."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(descs, pool.map(lambda desc: ptx(kiln, desc, target), descs)))


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


# ---- what scripts/gpu-verify writes

# Figures of two records can stand in one only when these are the same.
SAME = ("target", "device", "driver", "torch")


def why_not_updated(older, record):
    """Why rows of `record` cannot stand beside those of `older`: what differs, or ""."""
    return ", ".join(f"{key} is {older.get(key)!r} there and {record[key]!r} here" for key in SAME if older.get(key) != record[key])


def updated(older, rows, date, listed_descs):
    """The record `older` with `rows`, which were verified at `date`: a row that was not verified now stays as it is. In the list's order; what the
    list no longer has comes last."""
    merged = {row["desc"]: row for row in older["kernels"]}
    merged.update({row["desc"]: {**row, "date": date} for row in rows})
    order = {desc: i for i, desc in enumerate(listed_descs)}
    return {**older, "kernels": sorted(merged.values(), key=lambda row: order.get(row["desc"], len(order)))}


def table(record):
    """Its figures, as Markdown."""
    lines = [f"Medians by CUDA events; an empty kernel takes {record['empty_us']} µs. L2 flushed by writing 512 MiB; in the second column by reading them.", "",
             "| kernel | µs | L2 clean | torch's operator | bf16 matmul | floor |", "| --- | --- | --- | --- | --- | --- |"]
    return lines + [f"| {r['desc']} | {r['us']} | {r['clean_us']} | {r.get('torch_us', '–')} | {r.get('bf16_us', '–')} | {r['floor_us']} |"
                    for r in record["kernels"] if "us" in r]
