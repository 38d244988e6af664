"""Makes `common/registry_pb2.py` and its types from `common/registry.proto`: `make proto`."""

from pathlib import Path
from tempfile import TemporaryDirectory

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = "homefire/common/registry.proto"
NAMES = ("registry_pb2.py", "registry_pb2.pyi")


def generate(folder: Path) -> dict[str, str]:
    """The text of the generated files by name.

    Args:
        folder: An empty one to work in.

    Raises:
        RuntimeError: The compiler refused the file.
    """
    place = f"-Ihomefire/common={ROOT / 'common'}"
    out = [f"--python_out={folder}", f"--pyi_out={folder}"]
    if code := protoc.main(["protoc", place, *out, PROTO]):
        raise RuntimeError(f"protoc ended with {code}")
    made = folder / "homefire" / "common"
    return {name: (made / name).read_text(encoding="utf-8") for name in NAMES}


def main() -> None:
    """Write the generated files."""
    with TemporaryDirectory() as folder:
        for name, text in generate(Path(folder)).items():
            (ROOT / "common" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
