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
