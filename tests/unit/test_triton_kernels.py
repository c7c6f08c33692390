"""The Triton kernels in triton's interpreter, on a GPU where there is one, and the choice between them and torch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.unit import triton_cases

from crosslore.kernels import dispatch

ROOT = Path(__file__).parents[2]
NAMES = [case.__name__ for case in triton_cases.CASES]
COMPILES = triton_cases.all_kernels_compile_to_machine_code.__name__

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which runs on Linux"
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, the 8-bit kernel's oracle"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def python(*arguments: str, **environment: str) -> str:
    """Return what a fresh interpreter prints, with only these of triton's variables set."""
    kept = {key: value for key, value in os.environ.items() if "TRITON" not in key}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def outcomes(device: str, **environment: str) -> dict[str, str]:
    """Return what each case came to: "passed" or its traceback."""
    found = json.loads(python("-m", "tests.unit.triton_cases", device, **environment).splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return outcomes("cpu", TRITON_INTERPRET="1", CROSSLORE_TRITON="1")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes("cuda", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@needs_triton
@needs_bitsandbytes
@pytest.mark.parametrize("case", NAMES)
def test_in_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    assert interpreted[case] == "passed", interpreted[case]


@pytest.mark.gpu
@needs_cuda
@needs_triton
@needs_bitsandbytes
@pytest.mark.parametrize("case", NAMES)
def test_on_a_gpu(case: str, on_gpu: dict[str, str]) -> None:
    assert on_gpu[case] == "passed", on_gpu[case]


@needs_triton
def test_all_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    found = outcomes("compile", TRITON_CACHE_DIR=str(tmp_path))
    assert found == {COMPILES: "passed"}, found[COMPILES]


@pytest.mark.parametrize("switch", [None, "0", "1"])
def test_the_cpu_path_never_imports_triton(switch: str | None) -> None:
    script = (
        "import sys, torch; from crosslore.kernels import dispatch\n"
        "i = torch.tensor([0, 1]); a = torch.ones(2, 3, dtype=torch.bfloat16)\n"
        "assert dispatch.sampled_product(a, a, i, i).tolist() == [3, 3]\n"
        "assert not dispatch.use_triton(a.float())\n"
        "print([name for name in sys.modules if 'triton' in name.split('.')[0] or 'kernels.triton' in name])"
    )
    assert python("-c", script, **({} if switch is None else {"CROSSLORE_TRITON": switch})).split() == ["[]"]


@pytest.mark.parametrize(
    ("switch", "interpret", "cuda", "dtype", "wanted"),
    [
        (None, None, True, torch.float32, True),
        (None, None, True, torch.bfloat16, True),
        ("1", None, True, torch.float32, True),
        ("0", None, True, torch.float32, False),
        (None, None, True, torch.float64, False),
        (None, None, True, torch.float16, False),
        (None, None, False, torch.float32, False),
        ("1", None, False, torch.float32, False),
        (None, "1", False, torch.float32, False),
        ("1", "1", False, torch.float32, True),
        ("1", "1", False, torch.float64, False),
        ("0", "1", False, torch.float32, False),
    ],
)
def test_the_choice_depends_on_device_dtype_and_the_two_variables(
    monkeypatch: pytest.MonkeyPatch,
    switch: str | None,
    interpret: str | None,
    cuda: bool,
    dtype: torch.dtype,
    wanted: bool,
) -> None:
    for name, value in (("CROSSLORE_TRITON", switch), ("TRITON_INTERPRET", interpret)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    tensor = SimpleNamespace(is_cuda=cuda, dtype=dtype)  # a CUDA tensor cannot be made here
    monkeypatch.setattr(dispatch, "_triton_imports", lambda: True)
    assert dispatch.use_triton(tensor) is wanted  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "_triton_imports", lambda: False)
    assert dispatch.use_triton(tensor) is False  # type: ignore[arg-type]


def test_without_triton_the_choice_is_the_reference() -> None:
    script = (
        "import sys, types; sys.modules['triton'] = None; import torch; from crosslore.kernels import dispatch\n"
        "print(dispatch.use_triton(types.SimpleNamespace(is_cuda=True, dtype=torch.float32)))"
    )
    assert python("-c", script).split() == ["False"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_reference_path_returns_fp32_or_fp64_as_the_kernel_does(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 3).to(dtype), torch.randn(4, 3).to(dtype)
    rows, cols = torch.tensor([0, 4, 2]), torch.tensor([3, 0, 1])
    found = dispatch.sampled_product(a, b, rows, cols)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, (a.to(found.dtype) @ b.to(found.dtype).mT)[rows, cols])
