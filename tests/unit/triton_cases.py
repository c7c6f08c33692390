"""What the Triton kernels must do. `python -m tests.unit.triton_cases DEVICE` runs all of it and prints JSON.

In a process of its own, because TRITON_INTERPRET=1 counts only before the first import of triton.
DEVICE is "cpu" (interpreter), "cuda", or "compile" (machine code for an sm_80, which needs no GPU).
"""

import json
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 256
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def random_factors(m: int, n: int, r: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(m * n + r)
    return tuple(torch.randn(size, r, generator=draw).to(device, dtype) for size in (m, n))


def random_pairs(m: int, n: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    flat = torch.randperm(m * n, generator=torch.Generator().manual_seed(k))[:k].to(device)
    return flat // n, flat % n


def check_product(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> None:
    """Against the float64 truth, and against the plain-torch twin."""
    from crosslore.kernels import reference
    from crosslore.kernels.triton_sampled import sampled_product

    found = sampled_product(a, b, rows, cols)
    assert found.dtype == torch.float32 and found.shape == rows.shape and found.device == a.device
    truth = (a.double() @ b.double().mT)[rows.long(), cols.long()]
    # The terms of a sum cancel; its rounding is relative to their size, not to the result's.
    size = (a.double().abs() @ b.double().abs().mT)[rows.long(), cols.long()]
    assert ((found.double() - truth).abs() <= 1e-5 * size + 1e-7).all()
    torch.testing.assert_close(found, reference.sampled_product(a.float(), b.float(), rows.long(), cols.long()))


def any_rank_gives_the_product(device: str) -> None:
    # Below, at and above one block of r; odd; two blocks and a rest.
    for r in (1, 2, 7, 33, 64, 65, 131):
        check_product(*random_factors(11, 23, r, device), *random_pairs(11, 23, 100, device))


def any_number_of_pairs_gives_the_product(device: str) -> None:
    for k in (1, 31, 32, 33, 253):
        check_product(*random_factors(11, 23, 5, device), *random_pairs(11, 23, k, device))


def no_pairs_give_an_empty_tensor(device: str) -> None:
    check_product(*random_factors(11, 23, 5, device), *random_pairs(11, 23, 0, device))


def strided_factors_give_the_product(device: str) -> None:
    rows, cols = random_pairs(11, 23, 100, device)
    a, b = random_factors(11, 23, 9, device)
    check_product(a, b.mT.contiguous().mT, rows, cols)  # layout.factors, side "left"
    check_product(a.mT.contiguous().mT, b, rows, cols)
    wide_a, wide_b = random_factors(22, 46, 30, device)
    check_product(wide_a[1::2, 3:28:3], wide_b[::2, 4:13], rows, cols)
    check_product(a[:1].expand(11, 9), b, rows, cols)


def bf16_factors_are_summed_in_fp32(device: str) -> None:
    factors = random_factors(11, 23, 131, device, torch.bfloat16)
    check_product(*factors, *random_pairs(11, 23, 100, device))


def no_rank_needs_a_compilation_of_its_own(device: str) -> None:
    from crosslore.kernels.triton_sampled import _sampled_product_kernel as kernel

    pairs, counts = random_pairs(64, 64, 100, device), set()
    for r in (66, 70, 130, 134):  # none a multiple of 16, which Triton treats apart
        check_product(*random_factors(64, 64, r, device), *pairs)
        if device == "cuda":
            counts.add(sum(len(found[0]) for found in kernel.device_caches.values()))
    assert len(counts) <= 1, f"compilations after each rank: {counts}"


def int32_indices_in_any_order_and_repeated_give_the_product(device: str) -> None:
    rows, cols = random_pairs(11, 23, 100, device)
    rows, cols = (torch.cat([index.flip(0), index[:7]]).int() for index in (rows, cols))
    check_product(*random_factors(11, 23, 9, device), rows, cols)


def codebooks(device: str) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import create_dynamic_map

    signed, unsigned = (create_dynamic_map(signed=signed).to(device) for signed in (True, False))
    assert (signed.diff() > 0).all() and (unsigned.diff() > 0).all()
    return signed, unsigned


def quantised(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return bitsandbytes' codes and scales of fp32 values, all zeros coded as the value 0, no second moment as 0.

    On the CPU through its fp64 entry, which takes the nearest code. Its fp32 entry looks the value up in a table of
    65536 equal bins (0.50.2), and with that gives every small value the code of 1.6e-5.
    """
    values = values.double() if values.device.type == "cpu" else values
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise.default(values, code, BLOCK)
    zero = (scales == 0).repeat_interleave(BLOCK)[: values.numel()].view_as(codes)
    codes = codes.masked_fill(zero, int((code == 0).nonzero().item()))
    return codes.clamp(min=0 if (code < 0).any() else 1), scales


def dequantised(codes: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    return code[codes.long()] * scales.repeat_interleave(BLOCK)[: codes.numel()].view_as(codes)


def twin_step_(state: list[Tensor], low: Tensor, t: int, books: tuple[Tensor, Tensor]) -> Tensor:
    """Dequantise, one step of `AdamW`, quantise: what `AdamW8bit` does."""
    from crosslore.config import Hyper
    from crosslore.rules.adamw import AdamW

    hp = Hyper(lr=1.0, scale=1.0, weight_decay=0.0, betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"])
    first, second = dequantised(*state[:2], books[0]), dequantised(*state[2:], books[1])
    update = AdamW().update(low.float(), {"exp_avg": first, "exp_avg_sq": second}, t, hp)
    for kept, new in zip(state, (*quantised(first, books[0]), *quantised(second, books[1])), strict=True):
        kept.copy_(new)
    return update


def fused_step_(state: list[Tensor], low: Tensor, t: int, books: tuple[Tensor, Tensor], **options: Tensor) -> Tensor:
    from crosslore.kernels.triton_adamw8bit import adamw8bit_update_

    return adamw8bit_update_(low, *state, code_signed=books[0], code_unsigned=books[1], t=t, **HYPER, **options)


def zero_state(low: Tensor, books: tuple[Tensor, Tensor]) -> list[Tensor]:
    if not low.numel():  # bitsandbytes' CUDA quantiser ends the process on an empty tensor
        return [part for _ in books for part in (torch.zeros_like(low, dtype=torch.uint8), low.new_zeros(0).float())]
    return [part for code in books for part in quantised(torch.zeros_like(low, dtype=torch.float32), code)]


def gradient(shape: tuple[int, ...], seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries of very different sizes, some of them 0."""
    draw = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-6, 1, shape, generator=draw)
    grad = torch.randn(shape, generator=draw) * size * (torch.rand(shape, generator=draw) > 0.02)
    return grad.to(device, dtype)


def assert_same_state(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal scales up to rounding; 99.9 % equal codes, the others, near a midpoint, adjacent."""
    for codes, other in zip(found[::2], wanted[::2], strict=True):
        gap = (codes.int() - other.int()).abs()
        assert gap.max() <= 1, f"codes differ by up to {gap.max()}"
        assert (gap == 0).float().mean() >= 0.999, f"{(gap != 0).sum()} of {gap.numel()} codes differ"
    for scales, other in zip(found[1::2], wanted[1::2], strict=True):
        torch.testing.assert_close(scales, other, rtol=1e-6, atol=0)


def check_steps(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> None:
    """Five steps; each from the same state as the twin, and all of them from the twin's own."""
    books = codebooks(device)
    fused = zero_state(torch.empty(shape, device=device), books)
    alone = [part.clone() for part in fused]
    for t in range(1, 6):
        low = gradient(shape, t, device, dtype)
        kept, twin = low.clone(), [part.clone() for part in fused]
        addresses = [part.data_ptr() for part in fused]
        found = fused_step_(fused, low, t, books)
        assert found.dtype == torch.float32 and found.shape == shape and torch.equal(low, kept)
        assert addresses == [part.data_ptr() for part in fused]
        torch.testing.assert_close(found, twin_step_(twin, low, t, books))
        assert_same_state(fused, twin)
        twin_step_(alone, low, t, books)
    assert_same_state(fused, alone)


def steps_of_whole_blocks_agree_with_the_twin(device: str) -> None:
    check_steps((8, 1024), device)


def steps_of_sizes_that_are_no_multiple_of_the_block_agree_with_the_twin(device: str) -> None:
    for shape in ((67, 73), (300,), (255,), (257,), (1, 1)):
        check_steps(shape, device)


def steps_on_bf16_gradients_agree_with_the_twin(device: str) -> None:
    check_steps((67, 73), device, torch.bfloat16)


def blocks_of_zeros_stay_zero_beside_others(device: str) -> None:
    books = codebooks(device)
    low = gradient((3 * BLOCK + 10,), 1, device)
    low[BLOCK : 2 * BLOCK] = 0
    low[3 * BLOCK :] = 0
    state = zero_state(low, books)
    twin = [part.clone() for part in state]
    for t in range(1, 4):
        torch.testing.assert_close(fused_step_(state, low, t, books), twin_step_(twin, low, t, books))
        assert_same_state(state, twin)
    for codes, scales, code in ((*state[:2], books[0]), (*state[2:], books[1])):
        assert scales.isfinite().all() and scales.tolist()[1::2] == [0, 0] and (scales[::2] > 0).all()
        values = dequantised(codes, scales, code)
        assert not values[BLOCK : 2 * BLOCK].any() and not values[3 * BLOCK :].any()


def entries_that_rest_between_gradients_keep_a_bounded_update(device: str) -> None:
    # Rows of an embedding that are seen in every third step, with entries of very different size.
    books = codebooks(device)
    size = torch.where(torch.arange(4 * BLOCK, device=device) % 2 == 0, 1.0, 1e-4)
    state = zero_state(size, books)
    for t in range(1, 8):
        low = gradient((4 * BLOCK,), t, device).sign() * size * (t % 3 == 1)
        assert fused_step_(state, low, t, books).abs().max() < 5  # exact: 1; with a second moment of 0: 1e4


def an_empty_tensor_takes_a_step(device: str) -> None:
    books, low = codebooks(device), torch.zeros(0, 5, device=device)
    assert fused_step_(zero_state(low, books), low, 1, books).shape == (0, 5)


def the_smallest_scales_lose_no_code(device: str) -> None:
    # 1 / scale would be infinite. The first step makes the moment 1 - beta1 times the gradient.
    books, low = codebooks(device), torch.linspace(-1, 1, BLOCK, device=device) * 1e-38
    state = zero_state(low, books)
    fused_step_(state, low, 1, books)
    assert 0 < state[1].item() < 2**-128
    torch.testing.assert_close(
        dequantised(*state[:2], books[0]).double() * 1e39, low.double() * 1e38, rtol=0, atol=0.01
    )


def every_code_survives_and_ties_go_to_the_even_code(device: str) -> None:
    # beta1 = 0 makes the new first moment the gradient itself, and the largest entry 1 makes the scale 1.
    books = codebooks(device)
    code = books[0]
    between = (code[:-1] + code[1:]) * 0.5
    after = torch.nextafter(between, torch.full_like(between, 2.0))
    number = torch.arange(255, device=device)
    wanted = torch.cat([number, number + number % 2, number + 1])
    for low, codes in zip(torch.cat([code[:-1], between, after]).split(255), wanted.split(255), strict=True):
        from crosslore.kernels.triton_adamw8bit import adamw8bit_update_

        low = torch.cat([low, low.new_ones(1)])
        state = zero_state(low, books)
        options = {"code_signed": code, "code_unsigned": books[1], "beta1": 0.0, "beta2": 0.999, "eps": 1e-8}
        adamw8bit_update_(low, *state, t=1, **options)
        assert state[0][:255].tolist() == codes.tolist() and state[0][255] == 255 and state[1].item() == 1


def the_update_goes_where_it_is_told_even_over_the_gradient(device: str) -> None:
    books, low = codebooks(device), gradient((300,), 1, device)
    state = zero_state(low, books)
    wanted = fused_step_([part.clone() for part in state], low, 1, books)
    assert fused_step_(state, low, 1, books, update=low) is low
    assert torch.equal(low, wanted)


def named(state: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"), state, strict=True))


def many_tensors_at_once_take_the_step_of_each(device: str) -> None:
    from crosslore.kernels.triton_adamw8bit_many import adamw8bit_update_many_

    books = codebooks(device)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = ((8, 64), (300,), (67, 73), (1,), (0, 5), (4 * BLOCK,))
        states = [zero_state(torch.empty(shape, device=device), books) for shape in shapes]
        alone = [[part.clone() for part in state] for state in states]
        options = {"code_signed": books[0], "code_unsigned": books[1], **HYPER}
        for t in range(1, 4):
            lows = [gradient(shape, 10 * t + i, device, dtype) for i, shape in enumerate(shapes)]
            found = adamw8bit_update_many_(lows, [named(state) for state in states], t=t, **options)
            for update, low, state, one in zip(found, lows, states, alone, strict=True):
                assert torch.equal(update, fused_step_(one, low, t, books)) and update.shape == low.shape
                assert all(torch.equal(a, b) for a, b in zip(state, one, strict=True))


def a_whole_weight_takes_the_step_of_its_update(device: str) -> None:
    from crosslore.kernels.triton_adamw8bit_many import adamw8bit_weight_

    books = codebooks(device)
    for dtype in (torch.float32, torch.bfloat16):
        weight = gradient((67, 73), 5, device, dtype)
        state = zero_state(weight, books)
        twin = [part.clone() for part in state]
        options = {"code_signed": books[0], "code_unsigned": books[1], **HYPER}
        for t in range(1, 4):
            grad, before = gradient((67, 73), t, device, dtype), weight.clone()
            adamw8bit_weight_(weight, grad, named(state), t=t, weight_factor=0.9, update_factor=-0.1, **options)
            wanted = fused_step_(twin, grad, t, books) * -0.1 + before.float() * 0.9
            torch.testing.assert_close(weight, wanted.to(dtype))
            assert all(torch.equal(a, b) for a, b in zip(state, twin, strict=True))


def tensors_that_the_kernel_would_misread_are_refused(device: str) -> None:
    books, low = codebooks(device), gradient((30, 20), 1, device)
    state = zero_state(low, books)
    wrong = {
        "strided": (low.mT, state),
        "fp64": (low.double(), state),
        "short scales": (low, [state[0], state[1][:-1], *state[2:]]),
        "fp32 codes": (low, [state[0].float(), *state[1:]]),
    }
    for name, (grad, parts) in wrong.items():
        try:
            fused_step_(parts, grad, 1, books)
        except ValueError as error:
            assert "CROSSLORE_TRITON=0" in str(error), error
        else:
            raise AssertionError(f"{name}: no error")


def dispatch_takes_the_kernel_and_leaves_fp64_to_the_reference(device: str) -> None:
    from crosslore.kernels import dispatch

    (a, b), pairs = random_factors(11, 23, 9, device), random_pairs(11, 23, 100, device)
    assert "crosslore.kernels.triton_sampled" not in sys.modules
    assert not dispatch.use_triton(a.double()) and not dispatch.use_triton(pairs[0])
    assert dispatch.sampled_product(a.double(), b.double(), *pairs).dtype == torch.float64
    assert "crosslore.kernels.triton_sampled" not in sys.modules
    assert dispatch.use_triton(a) and dispatch.use_triton(a.bfloat16())
    found = dispatch.sampled_product(a, b, *pairs)
    assert "crosslore.kernels.triton_sampled" in sys.modules
    torch.testing.assert_close(found, (a @ b.mT)[pairs])


CASES: tuple[Callable[[str], None], ...] = (
    dispatch_takes_the_kernel_and_leaves_fp64_to_the_reference,  # first: it looks at what is imported
    any_rank_gives_the_product,
    any_number_of_pairs_gives_the_product,
    no_pairs_give_an_empty_tensor,
    strided_factors_give_the_product,
    bf16_factors_are_summed_in_fp32,
    int32_indices_in_any_order_and_repeated_give_the_product,
    no_rank_needs_a_compilation_of_its_own,
    steps_of_whole_blocks_agree_with_the_twin,
    steps_of_sizes_that_are_no_multiple_of_the_block_agree_with_the_twin,
    steps_on_bf16_gradients_agree_with_the_twin,
    blocks_of_zeros_stay_zero_beside_others,
    entries_that_rest_between_gradients_keep_a_bounded_update,
    an_empty_tensor_takes_a_step,
    the_smallest_scales_lose_no_code,
    every_code_survives_and_ties_go_to_the_even_code,
    the_update_goes_where_it_is_told_even_over_the_gradient,
    many_tensors_at_once_take_the_step_of_each,
    a_whole_weight_takes_the_step_of_its_update,
    tensors_that_the_kernel_would_misread_are_refused,
)


def all_kernels_compile_to_machine_code(_: str) -> None:
    """The interpreter accepts what the compiler does not; this finds it without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from crosslore.kernels.triton_adamw8bit import _adamw8bit_kernel
    from crosslore.kernels.triton_adamw8bit_many import _many_kernel, _weight_kernel
    from crosslore.kernels.triton_sampled import _sampled_product_kernel

    strides = dict.fromkeys(("a_row_stride", "a_rank_stride", "b_row_stride", "b_rank_stride"), "i64")
    sampled = {"out": "*fp32", "pairs": "i32", "rank": "i32", **strides}
    moments = {"exp_avg": "*u8", "exp_avg_sq": "*u8", "exp_avg_scale": "*fp32", "exp_avg_sq_scale": "*fp32"}
    adamw = {"update": "*fp32", "code_signed": "*fp32", "code_unsigned": "*fp32", "elements": "i32", **moments}
    many = {"table": "*i64", "owner": "*i32", "first_block": "*i64", "code_signed": "*fp32", "code_unsigned": "*fp32"}
    for dtype, index in (("*fp32", "*i64"), ("*bf16", "*i32")):
        for kernel, types, sizes in (
            (
                _sampled_product_kernel,
                {**sampled, "a": dtype, "b": dtype, "rows": index, "cols": index},
                {"BLOCK_PAIRS": 32, "BLOCK_RANK": 64},
            ),
            (_adamw8bit_kernel, {**adamw, "low": dtype}, {"BLOCK_SIZE": BLOCK, "LOWEST_SECOND": 1}),
            (_weight_kernel, {**adamw, "weight": dtype, "grad": dtype}, {"BLOCK_SIZE": BLOCK, "LOWEST_SECOND": 1}),
            (_many_kernel, many, {"BF16": dtype == "*bf16", "BLOCK_SIZE": BLOCK, "LOWEST_SECOND": 1}),
        ):
            names = [name for name in kernel.arg_names if name not in sizes]
            signature = {name: types.get(name, "fp32") for name in names} | dict.fromkeys(sizes, "constexpr")
            source = ASTSource(kernel, signature, constexprs=sizes)
            compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
            assert len(compiled.asm["cubin"]) > 0


def main(device: str) -> None:
    """Run every case on `device`; print {case: "passed" or the traceback}."""
    torch.set_num_threads(1)
    outcomes = {}
    for case in (all_kernels_compile_to_machine_code,) if device == "compile" else CASES:
        try:
            case(device)
            outcomes[case.__name__] = "passed"
        except Exception:  # every outcome is reported, by the test of its name
            outcomes[case.__name__] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
